"""What a request is refused with, in OpenAI's form."""

from __future__ import annotations

from typing import Any

_KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what was expected, what came, what to do.
        param: the field that it is about.
        code: a short name of it.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """``{"error": ...}``."""
        kind = _KINDS.get(self.status, "timeout_error" if self.status in (408, 504) else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unknown(what: str, name: str) -> Refusal:
    """The same for what there is not and for what belongs to somebody else."""
    return Refusal(404, f"expected the id of one of your {what}s, got another: {name[:80]!r}", code=f"{what}_not_found")
