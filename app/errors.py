"""Every failure a caller can meet, as a class with its HTTP status and title.

    AppError
    ├── ValidationError            400  a field of the request is wrong
    │   ├── UnsupportedParameterError   400  the chosen model cannot honour a field
    │   ├── UnspeakableTextError        400  the chosen model cannot speak this text
    │   ├── TextTooLongError            400  more text than the server or the model takes
    │   └── AudioRejectedError          400  an uploaded clip that cannot serve as a voice
    ├── AuthenticationError        401  who is calling is not known
    ├── AuthorizationError         403  the caller may not do this
    ├── NotFoundError              404  nothing at this address
    │   └── ModelNotFoundError          404  no model of this name
    ├── MethodNotAllowedError      405  the address exists, the method does not
    ├── PayloadTooLargeError       413  the body is over the limit
    ├── UnsupportedMediaTypeError  415  a file that is not audio
    ├── RateLimitError             429  too much, too fast
    │   └── QueueFullError              429  the model's queue is full
    ├── InternalError              500  our fault; the log has the details
    ├── UnavailableError           503  not now; try again
    │   ├── ModelLoadingError           503  the model is on its way
    │   ├── ModelUnavailableError       503  the model cannot be had at present
    │   └── ShuttingDownError           503  the server is stopping
    └── DeadlineExceededError      504  the request took longer than allowed

Raise these anywhere; `app.problems` alone turns them into responses. The `detail` is shown to
the caller: never put an exception's text, a path or the text to be spoken into it.
"""

import re
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class FieldError:
    """One wrong field: its wire name, what is wrong, and the limit it broke, if there is one."""

    field: str
    message: str
    limit: float | None = None


class AppError(Exception):
    """The base: a status and a title on the class, a detail for the caller on the instance."""

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Error"

    def __init__(
        self,
        detail: str,
        *,
        retry_after_seconds: int | None = None,
        progress: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors: tuple[FieldError, ...] = ()
        self.retry_after_seconds = retry_after_seconds
        self.progress = progress

    @classmethod
    def type_name(cls) -> str:
        """The problem type: the class name in kebab-case without `Error` (`model-loading`)."""
        stem = cls.__name__.removesuffix("Error")
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", stem).lower()


class ValidationError(AppError):
    """A field of the request is wrong; `errors` names each one."""

    status = 400
    title = "Invalid request"

    def __init__(self, detail: str, *, errors: tuple[FieldError, ...] = ()) -> None:
        super().__init__(detail)
        self.errors = errors

    @classmethod
    def of_field(cls, field: str, message: str, *, limit: float | None = None) -> "ValidationError":
        """The usual case: one wrong field."""
        return cls(f"{field}: {message}", errors=(FieldError(field, message, limit),))


class UnsupportedParameterError(ValidationError):
    """The chosen model cannot honour a field that the request set."""

    title = "Parameter not supported by this model"


class UnspeakableTextError(ValidationError):
    """The chosen model cannot speak this text (nothing to say, or another script)."""

    title = "Text cannot be spoken by this model"


class TextTooLongError(ValidationError):
    """More text than the server or the model takes in one request."""

    title = "Text too long"


class AudioRejectedError(ValidationError):
    """An uploaded clip that is audio, but cannot serve as a voice."""

    title = "Audio cannot be used"


class AuthenticationError(AppError):
    """Who is calling is not known."""

    status = 401
    title = "Authentication required"


class AuthorizationError(AppError):
    """The caller is known and may not do this."""

    status = 403
    title = "Not allowed"


class NotFoundError(AppError):
    """Nothing at this address."""

    status = 404
    title = "Not found"


class ModelNotFoundError(NotFoundError):
    """No model of this name is known to this server."""

    title = "Model not found"


class MethodNotAllowedError(AppError):
    """The address exists, the method does not."""

    status = 405
    title = "Method not allowed"


class PayloadTooLargeError(AppError):
    """The body, or a file in it, is over the limit."""

    status = 413
    title = "Payload too large"


class UnsupportedMediaTypeError(AppError):
    """A body or a file of a type that this route does not read."""

    status = 415
    title = "Unsupported media type"


class RateLimitError(AppError):
    """Too much, too fast."""

    status = 429
    title = "Too many requests"


class QueueFullError(RateLimitError):
    """As many requests as the model's queue holds are waiting already."""

    title = "Queue full"


class InternalError(AppError):
    """Our fault. The caller gets the request id, the log gets the details."""

    status = 500
    title = "Internal error"


class UnavailableError(AppError):
    """Not now; the same request may succeed later."""

    status = 503
    title = "Service unavailable"


class ModelLoadingError(UnavailableError):
    """The model is being downloaded or loaded; `progress` is the share that is done, 0 to 1."""

    title = "Model loading"


class ModelUnavailableError(UnavailableError):
    """The model cannot be had at present: out of reach, broken, or no memory for it."""

    title = "Model unavailable"


class ShuttingDownError(UnavailableError):
    """The server finishes what it has begun and takes nothing new."""

    title = "Shutting down"


class DeadlineExceededError(AppError):
    """The request took longer than `TTS_REQUEST_TIMEOUT_SECONDS` and was stopped."""

    status = 504
    title = "Deadline exceeded"
