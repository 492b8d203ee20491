"""What a route may ask for, as annotated types."""

from typing import Annotated

from fastapi import Depends, Request

from app.resources import Resources
from app.services.model_loader import ModelLoader


def _resources(request: Request) -> Resources:
    resources: Resources = request.state.resources
    return resources


def _models(request: Request) -> ModelLoader:
    return _resources(request).models


AppResources = Annotated[Resources, Depends(_resources)]
Models = Annotated[ModelLoader, Depends(_models)]
