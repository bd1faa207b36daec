"""From an artifact's folder and the model's parameters to a running service."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lynx_trt.artifact import TOKENIZER, read
from lynx_trt.errors import ArtifactError
from lynx_trt.machine import cores
from lynx_trt.runtime.chat import ChatTemplate
from lynx_trt.runtime.guide import Guides
from lynx_trt.runtime.open import Name, limits_of, open_backend
from lynx_trt.runtime.quality import Dial
from lynx_trt.runtime.text import Tokenizer
from lynx_trt.serving.metrics import Metrics, ServerSink
from lynx_trt.serving.requests import Parser
from lynx_trt.serving.service import Service
from lynx_trt.serving.settings import Settings

SWITCH_SECONDS = 0.0005


def start_service(
    artifact: Path, parameters: Mapping[str, str], dial_file: Path, utils: Any, labels: Mapping[str, str]
) -> Service:
    """Open the artifact and serve it.

    Args:
        artifact: its folder.
        parameters: of the model's configuration.
        dial_file: where an operator changes the default quality.
        utils: the module of the server's Python backend.
        labels: put on every metric.

    Raises:
        LynxError: the artifact can't be served here.
    """
    # Between two steps the engine's thread wants the interpreter at once, not after the usual 5 ms of another thread.
    sys.setswitchinterval(SWITCH_SECONDS)
    opened = read(artifact)
    settings = Settings.of(parameters)
    name = cast("Name", settings.backend)
    there = cores()
    asked = min(settings.threads, there)  # the repository may have been written on a larger machine
    if asked < settings.threads:
        print(f"lynx: {settings.threads} threads were asked for; there are {there} cores", file=sys.stderr)  # noqa: T201
    # Threads that wait for each other at every operator lose far more to a busy core than they win with it, and the
    # server and its streams need one. Pieces of a decode step meet once, so they may have all.
    threads, pieces = asked or max(1, there - 1), asked or there
    backend = open_backend(opened, settings.slots, threads=threads, pieces=pieces, name=name)
    print(f"lynx: runs with {type(backend).__name__}", file=sys.stderr, flush=True)  # noqa: T201
    dial = Dial.of(opened.manifest)
    layers = [layer.name for layer in opened.manifest.model.moe_layers]
    limits, tokenizer = limits_of(opened.manifest), opened.path(TOKENIZER)
    guides = Guides(tokenizer, limits.vocabulary, limits.end_tokens)
    guides.prepare()  # and not while the first who asks for one holds up all others
    parser = Parser(Tokenizer(tokenizer), limits, dial, settings, guides, _template(opened.folder))
    return Service(backend, parser, Metrics(ServerSink(utils, labels), layers, dial), dial_file)


def _template(folder: Path) -> ChatTemplate | None:
    """The model's chat template; one that can't be read is none, for text is served without it."""
    try:
        return ChatTemplate.find(folder)
    except ArtifactError as error:
        print(f"lynx: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return None
