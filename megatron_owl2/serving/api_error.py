"""Refusals and failures as clients of the API see them: a status and OpenAI's error body."""

from collections.abc import Mapping
from typing import Any

from megatron_owl2.errors import Owl2Error


class ApiError(Owl2Error):
    """An answer with an error status; `param` names the field of the request that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """The body `{"error": {message, type, param, code}}`."""
        kind = {429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        fields = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


def shutting_down() -> ApiError:
    """The error of requests that a server which ends does not take, or does not finish."""
    return ApiError(503, "the server is shutting down; ask again later", code="shutting_down")
