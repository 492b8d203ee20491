"""Models: what there is, what it can do, loading and unloading."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from app.dependencies import Models
from app.domain.models import ModelState
from app.errors import ModelNotFoundError, ShuttingDownError
from app.problems import responses_for
from app.schemas.models import ModelList, ModelOut

router = APIRouter(prefix="/api/v1/models", tags=["models"])

# Names hold a slash (`openbmb/VoxCPM2`), hence the path converters.
Name = Annotated[
    str, Path(description="A model's name, slash included.", examples=["hibari/heart"])
]


@router.get("", summary="List the models", responses=responses_for(ShuttingDownError))
async def list_models(models: Models) -> ModelList:
    """Every model that this server knows, the default first."""
    default = models.catalog.default_name
    return ModelList(models=[ModelOut.of(one, default_name=default) for one in models.statuses()])


@router.post(
    "/{name:path}/load",
    summary="Load a model",
    responses=responses_for(ModelNotFoundError, ShuttingDownError)
    | {202: {"model": ModelOut, "description": "On its way; ask again for its state."}},
)
async def load_model(name: Name, models: Models, response: Response) -> ModelOut:
    """Download the model if need be and load it. 200 when it is ready, else 202."""
    status = models.begin_loading(name)
    response.status_code = 200 if status.state is ModelState.READY else 202
    return ModelOut.of(status, default_name=models.catalog.default_name)


@router.post(
    "/{name:path}/unload",
    summary="Unload a model",
    responses=responses_for(ModelNotFoundError, ShuttingDownError)
    | {202: {"model": ModelOut, "description": "In use; it leaves when its requests are done."}},
)
async def unload_model(name: Name, models: Models, response: Response) -> ModelOut:
    """Take the model out of memory. 200 when it is gone, 202 while requests still use it."""
    status = await models.unload(name)
    response.status_code = 202 if status.state is ModelState.UNLOADING else 200
    return ModelOut.of(status, default_name=models.catalog.default_name)


@router.get(
    "/{name:path}",
    summary="Show a model",
    responses=responses_for(ModelNotFoundError, ShuttingDownError),
)
async def show_model(name: Name, models: Models) -> ModelOut:
    """One model: its state, and what it can do."""
    return ModelOut.of(models.status(name), default_name=models.catalog.default_name)
