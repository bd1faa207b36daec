"""The served model, by Triton Inference Server's HTTP: a connection for each answer, closed when nobody wants it.

Not by gRPC: there a stream tells the kind of an error only with the header `triton_grpc_error`, and a server of 2.5x
ends itself when many such streams are cancelled at once (an assertion in its gRPC library), as they are when a client
with many answers goes away.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import aiohttp

from lynx_trt.openai_api.errors import ApiError
from lynx_trt.openai_api.requests import Inputs, Sampling
from lynx_trt.serving.schema import BUSY, FAILED

# Of questions that a server answers at once.
_SHORT = aiohttp.ClientTimeout(total=5)
# The longest event, which is a whole answer; the reader takes lines of twice that.
_BUFFER = 1 << 24


@dataclass(frozen=True)
class End:
    """What the last response of an answer says; see lynx_trt.serving.schema."""

    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    queue_seconds: float
    first_token_seconds: float
    token_seconds: float
    active_experts: list[float]
    cached_tokens: int = 0  # which servers of before don't say

    def rounded(self) -> dict[str, Any]:
        """For people to read: microseconds, and hundredths of experts."""
        seconds = {name: round(value, 6) for name, value in asdict(self).items() if name.endswith("_seconds")}
        return {**asdict(self), **seconds, "active_experts": [round(each, 2) for each in self.active_experts]}


@dataclass(frozen=True)
class Piece:
    """New text of an answer, new thoughts, new calls of tools (JSON), and of its last piece the end."""

    text: str
    end: End | None = None
    thought: str = ""
    calls: tuple[str, ...] = ()


def whole(pieces: Sequence[Piece]) -> Piece:
    """All pieces of an answer as one."""
    text, thought = ("".join(getattr(piece, name) for piece in pieces) for name in ("text", "thought"))
    return Piece(text, pieces[-1].end, thought, tuple(call for piece in pieces for call in piece.calls))


@dataclass(frozen=True)
class Model:
    """What the server says of its model."""

    sampling: Sampling
    max_length: int | None


class Upstream:
    """One model of one server."""

    def __init__(self, address: str, model: str) -> None:
        """`address` is the host and port of the server's HTTP. To be made where an event loop runs."""
        self.address, self.model = address, model
        self._url = f"http://{address}/v2/models/{model}"
        self._session = aiohttp.ClientSession(
            # A connection that is kept would keep a server from ending that has been told to.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            read_bufsize=_BUFFER,
        )
        self._about: Model | None = None

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def ready(self) -> bool:
        """Whether the model can be asked."""
        try:
            async with self._session.get(f"{self._url}/ready", timeout=_SHORT) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def about(self) -> Model:
        """What the model's configuration says; asked for once.

        Raises:
            ApiError: the server can't be reached, or has no such model.
        """
        if self._about is None:
            try:
                async with self._session.get(f"{self._url}/config", timeout=_SHORT) as response:
                    found = _json(await response.read())
            except (aiohttp.ClientError, TimeoutError) as error:
                raise self._unreachable(error) from None
            if "error" in found:
                raise ApiError(503, f"the server at {self.address} has no model {self.model}: {found['error']}")
            values = {name: each["string_value"] for name, each in found.get("parameters", {}).items()}
            length = values.get("lynx_max_length")
            sampling = Sampling(**json.loads(values.get("lynx_sampling", "{}")))
            self._about = Model(sampling, int(length) if length else None)
        return self._about

    async def answer(self, inputs: Inputs) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer as they come; whoever stops to iterate ends it.

        Raises:
            ApiError: the model refuses the request, or fails.
        """
        try:
            async with self._session.post(f"{self._url}/generate_stream", json=inputs) as response:
                if response.status != 200:
                    raise _error(str(_json(await response.read()).get("error", "the server gave no reason")))
                async for line in response.content:
                    if line.startswith(b"data: "):
                        found = _json(line)
                        if "error" in found:
                            raise _error(str(found["error"]))
                        yield _piece(found)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> ApiError:
        if isinstance(error, aiohttp.ClientConnectorError):
            return ApiError(503, f"nothing answers at {self.address}: is the server up?")
        return ApiError(503, f"the connection to the server at {self.address} broke: {error!s}")


def _json(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text.removeprefix(b"data: "))
    except ValueError:
        return {"error": f"the server's answer is no JSON: {text[:80]!r}"}
    return found if isinstance(found, dict) else {"error": f"the server's answer is {text[:80]!r}"}


def _error(message: str) -> ApiError:
    """The server has one status for all that a model answers, so the model's own words have to tell."""
    if message.startswith(BUSY):
        return ApiError(503, message)
    return ApiError(500 if message.startswith(FAILED) else 400, message)


def _piece(found: Mapping[str, Any]) -> Piece:
    """A response's outputs."""
    end = None
    if "finish_reason" in found:
        values = {field.name: found[field.name] for field in fields(End) if field.name in found}
        end = End(**{**values, "active_experts": _list(values["active_experts"])})
    return Piece(found["text_output"], end, found.get("thought_output", ""), tuple(_list(found.get("tool_calls", []))))


def _list(value: Any) -> list[Any]:
    """Of one value the server leaves the list away."""
    return value if isinstance(value, list) else [value]
