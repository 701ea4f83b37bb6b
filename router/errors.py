"""What a user may be told, once: shared by HTTP and gRPC."""

import grpc
import msgspec

INVALID_REQUEST = "invalid_request_error"
RATE_LIMIT = "rate_limit_error"
UNAVAILABLE = "service_unavailable_error"
SERVER_ERROR = "server_error"

GRPC_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ABORTED,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}


class RequestError(Exception):
    """A request that gets an error for an answer. Handled by the endpoints of both protocols."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        """As HTTP counts them; `grpc_status` maps it."""
        self.message = message
        self.type = type
        self.param = param
        """The field at fault."""
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def grpc_status(self) -> grpc.StatusCode:
        return GRPC_STATUS.get(self.status, grpc.StatusCode.INVALID_ARGUMENT)

    def body(self) -> bytes:
        """OpenAI's error object."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def invalid(param: str | None, message: str, *, code: str | None = None) -> RequestError:
    return RequestError(400, message, param=param, code=code)


def model_not_found(name: str, served: str) -> RequestError:
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    return RequestError(
        404,
        f"the model {shown!r} does not exist; `model` is {served!r} here",
        param="model",
        code="model_not_found",
    )


def overloaded(message: str, *, retry_after_s: float = 1.0) -> RequestError:
    return RequestError(429, message, type=RATE_LIMIT, code="overloaded", retry_after_s=retry_after_s)


def unavailable(message: str, *, code: str = "unavailable", retry_after_s: float = 1.0) -> RequestError:
    return RequestError(503, message, type=UNAVAILABLE, code=code, retry_after_s=retry_after_s)


def internal() -> RequestError:
    """For a defect of ours: it says nothing of the cause, the log does."""
    return RequestError(500, "internal error of the router", type=SERVER_ERROR, code="internal_error")
