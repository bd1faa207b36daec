"""Errors as OpenAI's clients read them: a status, and a JSON object with a sentence."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """What is answered in the place of what was asked for."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        """`param` is the field of the request that is wrong, where it is one."""
        super().__init__(message)
        self.status, self.param = status, param

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of it; clients try again by themselves where the status is 429 or 500 and more."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": None}}
