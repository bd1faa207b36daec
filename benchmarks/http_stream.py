"""A streaming client that costs little: many requests at once on one thread, for load on a small machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """One request: its text, what came last, and when things happened (seconds of time.perf_counter())."""

    started: float
    first: float | None = None
    ended: float | None = None
    text: str = ""
    last: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    status: int = 0

    @property
    def tokens(self) -> int:
        """Tokens written, as the server counted them."""
        return int(self.last.get("output_tokens", 0))


async def ask(host: str, port: int, model: str, body: dict[str, Any], *, leave_after: float | None = None) -> Answer:
    """One streamed request; with `leave_after` the client goes away after that many seconds.

    Raises OSError if the server can't be reached.
    """
    answer = Answer(time.perf_counter())
    reader, writer = await asyncio.open_connection(host, port)
    data = json.dumps({"stream": True, **body}).encode()
    head = (
        f"POST /v2/models/{model}/generate_stream HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode() + data)
        await asyncio.wait_for(_read(reader, answer), leave_after)
    except TimeoutError:
        answer.error = "left"
    except asyncio.IncompleteReadError:
        answer.error = "the connection ended"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return answer


async def _read(reader: asyncio.StreamReader, answer: Answer) -> None:
    status = (await reader.readline()).split()
    answer.status = int(status[1]) if len(status) > 1 else 0
    while (await reader.readline()).strip():
        pass
    buffer = b""
    while size := int((await reader.readline()).strip() or b"0", 16):
        buffer += (await reader.readexactly(size + 2))[:-2]
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            _take(event, answer)
    if buffer.strip():
        _take(buffer, answer)
    answer.ended = time.perf_counter()


def _take(event: bytes, answer: Answer) -> None:
    event = event.strip().removeprefix(b"data: ")
    if not event:
        return
    response = json.loads(event)
    if "error" in response:
        answer.error = response["error"]
        return
    answer.first = answer.first or time.perf_counter()
    answer.text += response["text_output"]
    answer.last = response
