"""Is it alive, is it ready, and a welcome."""

from fastapi import APIRouter, Request, Response

from app import __version__
from app.dependencies import AppResources
from app.errors import ShuttingDownError
from app.problems import responses_for
from app.schemas.models import Live, Ready, Welcome
from app.services.readiness import readiness

router = APIRouter(tags=["server"])


@router.get("/", summary="Welcome", responses=responses_for(ShuttingDownError))
async def welcome(request: Request) -> Welcome:
    """What this is, and where its documentation is."""
    root_path = request.scope.get("root_path", "")
    return Welcome(message="Welcome to Bawabah AI", version=__version__, docs=f"{root_path}/docs")


@router.get("/health/live", summary="Is the process up?", responses=responses_for())
async def live() -> Live:
    """Always 200 while the process answers, whatever the models do."""
    return Live(live=True)


# Its 503 says what is missing in the shape of its 200; a server that stops sends a problem.
_READY_RESPONSES = responses_for(ShuttingDownError)
_READY_RESPONSES[503]["model"] = Ready
_READY_RESPONSES[503]["description"] += ", or not ready yet"


@router.get(
    "/health/ready",
    summary="Can it serve?",
    responses=_READY_RESPONSES,
)
async def ready(resources: AppResources, response: Response) -> Ready:
    """503 while the default model is being downloaded or a preload is on its way, else 200.

    `degraded` is true when the default model is out of reach and another stands in.
    """
    state = readiness(resources.models, preload=resources.settings.models.preload)
    response.status_code = 200 if state.ready else 503
    return Ready(ready=state.ready, degraded=state.degraded, reason=state.reason)
