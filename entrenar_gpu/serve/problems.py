"""What is wrong with a request, in the shape of OpenAI's errors."""

from __future__ import annotations

import re
from typing import Any

from entrenar_gpu.errors import UserError
from entrenar_gpu.infer import ContextExceeded

_FLAG = re.compile(r"^(?:--)?([a-z][a-z_-]*): ")


class Problem(Exception):
    """An answer that is an error: HTTP status, message, and OpenAI's `type`, `param` and `code`."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def kind(self) -> str:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(error: UserError) -> Problem:
    """A UserError about what a client sent: the flag that it names is the body's field."""
    message = " ".join(str(error).split())
    found = _FLAG.match(message)
    param = found[1].replace("-", "_") if found else None
    message = f"{param}: {message[found.end() :]}" if found else message
    code = "context_length_exceeded" if isinstance(error, ContextExceeded) else None
    return Problem(400, message, param, code)
