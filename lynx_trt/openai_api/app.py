"""The HTTP side: routes, streams as server-sent events, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from aiohttp import web

from lynx_trt.openai_api.errors import ApiError
from lynx_trt.openai_api.replies import Form, as_call
from lynx_trt.openai_api.requests import Body, ChatBody, CompletionBody, Inputs
from lynx_trt.openai_api.upstream import End, Piece, Upstream, whole

# Of a request; no model takes a prompt as long as that.
MOST_BYTES = 1 << 25

_UPSTREAM = web.AppKey("upstream", Upstream)
_log = logging.getLogger("lynx_trt.openai")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(address: str, model: str) -> web.Application:
    """The application in front of one model of the server whose HTTP is at `address`.

    It counts on handlers being cancelled when their client goes away (`handler_cancellation` of aiohttp).
    """
    started = int(time.time())

    async def connection(app: web.Application) -> AsyncIterator[None]:
        app[_UPSTREAM] = Upstream(address, model)
        yield
        await app[_UPSTREAM].close()

    async def card(request: web.Request) -> dict[str, Any]:
        about = await request.app[_UPSTREAM].about()
        card = {"id": model, "object": "model", "created": started, "owned_by": "lynx-trt"}
        return {**card, "max_model_len": about.max_length}

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [await card(request)]})

    async def one_model(request: web.Request) -> web.Response:
        _check_model(request.match_info["name"], model)
        return web.json_response(await card(request))

    async def health(request: web.Request) -> web.Response:
        return web.Response(status=200 if await request.app[_UPSTREAM].ready() else 503)

    async def completions(request: web.Request) -> web.StreamResponse:
        return await _answer(request, CompletionBody.read(await _body(request)), chat=False)

    async def chats(request: web.Request) -> web.StreamResponse:
        return await _answer(request, ChatBody.read(await _body(request)), chat=True)

    app = web.Application(client_max_size=MOST_BYTES, middlewares=[_with_errors])
    app.cleanup_ctx.append(connection)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/models/{name:.+}", one_model)
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chats)
    app.router.add_get("/health", health)
    return app


@web.middleware
async def _with_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong before an answer begins, in OpenAI's form."""
    try:
        return await handler(request)
    except ApiError as error:
        told = error
    except web.HTTPException as error:
        told = ApiError(error.status, f"{request.method} {request.path[:100]}: {error.reason.lower()}")
        if error.status == 413:
            told = ApiError(413, f"the request has more than {MOST_BYTES} bytes")
    except ConnectionError:  # the client is gone
        raise
    except Exception as error:
        told = _defect(error)
    retry = {"Retry-After": "1"} if told.status == 503 else None
    return web.json_response(told.body, status=told.status, headers=retry)


def _defect(error: Exception) -> ApiError:
    """A defect of ours: this client is told so, and the log has it."""
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "an internal error ended this request; see the log")


def _check_model(name: str, served: str) -> None:
    if name != served:
        raise ApiError(404, f"there is no model {name[:100]!r} here; it is {served!r}", "model")


async def _body(request: web.Request) -> bytes:
    if request.content_type != "application/json":  # a page of somebody else's can send others without being asked
        raise ApiError(415, f"the content type is {request.content_type!r}; send application/json")
    return await request.read()


async def _answer(request: web.Request, body: Body, *, chat: bool) -> web.StreamResponse:
    upstream = request.app[_UPSTREAM]
    _check_model(body.model, upstream.model)
    choices = body.choices((await upstream.about()).sampling)
    form, prompts = Form.new(upstream.model, chat=chat), len(choices) // body.n
    async with contextlib.aclosing(_events(upstream, choices, body)) as events:
        if not body.stream:
            return web.json_response(form.whole(await _whole(events, len(choices)), prompts))
        first = await anext(events)  # what is wrong with a request is known by now
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        usage = body.stream_options is not None and body.stream_options.include_usage
        async for chunk in _chunks(form, first, events, len(choices), prompts if usage else 0):
            await response.write(f"data: {chunk}\n\n".encode())
        return response


async def _whole(events: AsyncIterator[tuple[int, Piece]], number: int) -> list[Piece]:
    """Every answer to its end. Raises ApiError."""
    pieces: list[list[Piece]] = [[] for _ in range(number)]
    async for index, piece in events:
        pieces[index].append(piece)
    return [whole(each) for each in pieces]


async def _events(upstream: Upstream, choices: Sequence[Inputs], body: Body) -> AsyncGenerator[tuple[int, Piece], None]:
    """Pieces of all answers as they come, each with its index; all of them end when one fails or this is closed.

    An answer that has to be a call is one when it is whole.
    """
    forced = body.forced
    texts: dict[int, str] = {}
    called: set[int] = set()
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def ask(index: int, inputs: Inputs) -> None:
        try:
            ended = False
            async with contextlib.aclosing(upstream.answer(inputs)) as pieces:
                async for piece in pieces:
                    ended = ended or piece.end is not None
                    queue.put_nowait((index, piece))
            if not ended:
                raise ApiError(500, "the server ended an answer without a word")
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(ask(index, inputs)) for index, inputs in enumerate(choices)]
    try:
        open_ones = len(choices)
        while open_ones:
            index, found = await queue.get()
            if isinstance(found, Exception):
                raise found
            open_ones -= found.end is not None
            if forced is not None:
                texts[index] = texts.get(index, "") + found.text
                found = as_call(replace(found, text=texts[index] if found.end else ""), forced)
            if found.calls and not body.parallel_tool_calls:
                found = replace(found, calls=() if index in called else found.calls[:1])
                called.add(index)
            yield index, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _chunks(
    form: Form, first: tuple[int, Piece], events: AsyncIterator[tuple[int, Piece]], number: int, prompts: int
) -> AsyncIterator[str]:
    """The data of a stream's events; with `prompts` the last but one says how many tokens there were."""
    calls: dict[int, int] = {}  # of each answer that has begun, how many
    ends: dict[int, End] = {}

    def chunks(index: int, piece: Piece) -> list[dict[str, Any]]:
        begin = form.begin(index) if index not in calls else None
        before = calls.setdefault(index, 0)
        calls[index] += len(piece.calls)
        if piece.end is not None:
            ends[index] = piece.end
        made = form.piece(index, piece, before)
        return [each for each in (begin, made) if each is not None]

    try:
        for chunk in chunks(*first):
            yield json.dumps(chunk, ensure_ascii=False)
        async for event in events:
            for chunk in chunks(*event):
                yield json.dumps(chunk, ensure_ascii=False)
        if prompts:
            yield json.dumps(form.usage([ends[index] for index in range(number)], prompts))
    except Exception as error:  # the status has gone out, so it is told here
        told = error if isinstance(error, ApiError) else _defect(error)
        yield json.dumps(told.body, ensure_ascii=False)
    yield "[DONE]"
