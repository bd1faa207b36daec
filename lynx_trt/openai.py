"""`python -m lynx_trt.openai`: OpenAI's API in front of a model that Triton Inference Server serves."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Annotated

import typer

from lynx_trt.console import new_app, run
from lynx_trt.errors import ServingError

app = new_app()

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="The model's name in the server.")],
    server: Annotated[str, typer.Option(help="Host and port of the server's HTTP.")] = "127.0.0.1:8000",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 9000,
    drain: Annotated[int, typer.Option(help="Seconds that requests in flight have after SIGTERM.", min=0)] = 30,
    parent: Annotated[int, typer.Option(hidden=True, help="The process with which this one ends.")] = 0,
) -> None:
    """Answer OpenAI's API (/v1/chat/completions, /v1/completions, /v1/models) with a served model."""
    try:
        from aiohttp import web

        from lynx_trt.openai_api.app import make_app
    except ImportError as error:
        raise ServingError(f'{error.name} is missing, which this needs: pip install "lynx-trt[serve]"') from None
    from lynx_trt.serving.server import check_port

    if parent:
        end_with(parent)
    check_port(host, port, "--port")
    if not parent:
        typer.echo(f"OpenAI's API at http://{host}:{port}/v1 for {model}")
    web.run_app(
        make_app(server, model),
        host=host,
        port=port,
        print=None,
        access_log=None,
        shutdown_timeout=drain,
        handler_cancellation=True,
    )


def end_with(parent: int) -> None:
    """Have this process ended with SIGTERM when its parent ends, however that does."""
    ctypes.CDLL(None, use_errno=True).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
    if os.getppid() != parent:  # it was faster
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    run(app)
