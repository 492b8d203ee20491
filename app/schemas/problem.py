"""The body of every error: RFC 9457 problem details."""

from pydantic import BaseModel, Field


class FieldProblem(BaseModel):
    """One wrong field."""

    field: str = Field(description="Wire name of the field.", examples=["text"])
    message: str = Field(description="What is wrong with it.")
    limit: float | None = Field(None, description="The bound that was broken, if there is one.")


class Problem(BaseModel):
    """An error, as `application/problem+json`."""

    type: str = Field(description="Kind of error, in kebab-case.", examples=["queue-full"])
    title: str = Field(description="The kind in words.", examples=["Queue full"])
    status: int = Field(description="HTTP status code.", examples=[429])
    detail: str = Field(description="What happened, for people.")
    instance: str = Field(description="Path of the request.")
    request_id: str = Field(description="Also in the X-Request-Id header and in the server's log.")
    errors: list[FieldProblem] = Field(default=[], description="Each wrong field of a 400.")
    progress: float | None = Field(
        None, description="Share of a model's download that is done, 0 to 1."
    )
