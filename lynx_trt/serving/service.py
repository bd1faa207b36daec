"""The served model: requests in, pieces of text out, without the server's own types.

Three threads meet here. The server's calls `accept`, which checks and queues; the engine's makes tokens and only
notes each piece; a third sends the pieces, watches for clients that went away, and looks after metrics and dial.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from lynx_trt.errors import BusyError, GenerationError, LynxError, UsageError
from lynx_trt.runtime.answers import Parts
from lynx_trt.runtime.backend import Array, Backend
from lynx_trt.runtime.control import Control
from lynx_trt.runtime.engine import Engine
from lynx_trt.runtime.pace import Target
from lynx_trt.runtime.scheduler import Policy, Scheduler, StepReport
from lynx_trt.runtime.sequence import Generated
from lynx_trt.serving.dial import DialSetting
from lynx_trt.serving.metrics import Metrics
from lynx_trt.serving.requests import Parser
from lynx_trt.serving.schema import FAILED

CANCEL_SECONDS = 0.25  # between two looks whether clients are still there
METRICS_SECONDS = 1.0
DIAL_SECONDS = 1.0


class Reply(Protocol):
    """The way back to one client."""

    def send(self, outputs: Mapping[str, Array], *, final: bool) -> None:
        """Send one response; after the final one nothing follows."""
        ...

    def fail(self, kind: str, message: str) -> None:
        """Send an error, which is final; `kind` is invalid, busy or internal."""
        ...

    def cancelled(self) -> bool:
        """Whether the client has gone away."""
        ...


@dataclass(eq=False)
class _Answer:
    """One request that is being answered."""

    sequence: Generated
    reply: Reply
    stream: bool
    parts: Parts | None
    pieces: deque[str] = field(default_factory=deque)
    begun: bool = False  # the first piece has gone out
    ended: bool = False

    def outputs(self, *, end: bool) -> dict[str, Array]:
        """The outputs of what came since the last time; at the end all that is left."""
        text = _drain(self.pieces)
        if self.parts is None:
            return {"text_output": _strings(text)}
        text, thoughts, calls = self.parts.take(text, end=end)
        made = {"text_output": _strings(text), "thought_output": _strings(thoughts)}
        # Where there are none it is left out: some servers have no tensor without values.
        return {**made, "tool_calls": _strings(*map(json.dumps, calls))} if calls else made


class Service:
    """One model, from request to response."""

    def __init__(self, backend: Backend, parser: Parser, metrics: Metrics, dial_file: Path | None = None) -> None:
        """Start to serve. `dial_file` holds the default quality and the target, and is looked at every second."""
        settings = parser.settings
        self._parser, self._metrics, self._dial_file = parser, metrics, dial_file
        policy = Policy(
            queue=settings.queue,
            chunk=settings.chunk,
            prefill_tokens=settings.prefill_tokens,
            reuse=settings.reuse,
            check=settings.check,
        )
        self._rewinds = backend.rewinds
        self._control = Control(
            parser.limits.experts, self._target(DialSetting.of(settings)), settings.max_kl, settings.check
        )
        self._dial_text: str | None = None
        self._read_dial()
        restriction = self._control.restriction
        self._engine = Engine(Scheduler(backend, parser.limits, restriction=restriction, policy=policy, observer=self))
        self._answers: list[_Answer] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._send_forever, name="lynx-replies", daemon=True)
        self._thread.start()

    def accept(self, values: Mapping[str, Array], parameters: str, reply: Reply) -> None:
        """Take a request; whatever is wrong with it is answered at once and changes nothing for others."""
        try:
            asked = self._parser.read(values, parameters)
            sequence = asked.sequence
            answer = _Answer(sequence, reply, asked.stream, asked.parts)
            sequence.on_text = lambda piece: self._note(answer, piece)
            sequence.on_end = lambda: self._note(answer, None)
            with self._lock:
                self._engine.submit(sequence)
                self._answers.append(answer)
        except BusyError as error:
            self._metrics.rejected("busy")
            reply.fail("busy", str(error))
        except LynxError as error:
            self._metrics.rejected("invalid")
            reply.fail("invalid", str(error))
        except Exception as error:  # a defect of ours: this client is told, the others don't notice
            _log(f"{type(error).__name__}: {error}")
            self._metrics.rejected("error")
            reply.fail("internal", f"{FAILED}: see the server's log")

    def close(self) -> None:
        """End everything; requests that are still here get an error."""
        self._engine.stop()
        self._stopping.set()
        self._wake.set()
        self._thread.join()
        self._send_all(pieces=True)

    def _note(self, answer: _Answer, piece: str | None) -> None:
        """On the engine's thread: new text, or (None) the end."""
        if piece is None:
            answer.ended = True
            self._wake.set()
            return
        answer.pieces.append(piece)
        # Only the first piece is worth waking the other thread; it comes for the next ones by itself.
        if answer.stream and (not answer.begun or not self._parser.settings.stream_interval):
            self._wake.set()

    # --- On the engine's thread, see Observer.

    def on_step(self, report: StepReport) -> None:
        """Count a step, and let it turn the default quality."""
        self._metrics.on_step(report)
        self._control.on_step(report)
        self._engine.scheduler.set_restriction(self._control.restriction)

    def on_end(self, sequence: Generated) -> None:
        """Count a request that has ended."""
        self._metrics.on_end(sequence)

    # --- On the replies' thread.

    def _send_forever(self) -> None:
        interval = self._parser.settings.stream_interval
        next_pieces = next_cancel = next_metrics = next_dial = 0.0
        while not self._stopping.is_set():
            self._wake.clear()  # before looking, so that what comes meanwhile wakes again
            now = time.monotonic()
            # All streams have their pieces at the same moments: one round of sending, not one for each stream.
            streaming = self._send_all(pieces=now >= next_pieces)
            try:
                if now >= next_pieces:
                    next_pieces = now + interval
                if now >= next_cancel:
                    next_cancel = now + CANCEL_SECONDS
                    self._drop_gone()
                if now >= next_metrics:
                    next_metrics = now + METRICS_SECONDS
                    self._flush()
                if now >= next_dial:
                    next_dial = now + DIAL_SECONDS
                    self._read_dial()
                    self._engine.scheduler.set_restriction(self._control.restriction)
            except Exception as error:  # the thread serves all, so it goes on
                _log(f"{type(error).__name__}: {error}")
            due = min(next_cancel, next_metrics, next_pieces if streaming and interval else next_cancel)
            self._wake.wait(max(0.0, due - time.monotonic()))

    def _send_all(self, *, pieces: bool) -> bool:
        """Send ends and first pieces, and all other pieces if it is time; whether any stream goes on."""
        with self._lock:
            answers = list(self._answers)
        streaming = False
        for answer in answers:
            try:
                if answer.ended:
                    self._forget(answer)
                    self._finish(answer)
                elif answer.stream and answer.pieces and (pieces or not answer.begun):
                    answer.begun = True
                    answer.reply.send(answer.outputs(end=False), final=False)
                streaming |= answer.begun and not answer.ended
            except Exception as error:
                # One client's trouble ends its own request and nothing else.
                _log(f"{type(error).__name__}: {error}")
                self._engine.cancel(answer.sequence)
                self._forget(answer)
                with contextlib.suppress(Exception):  # it may have been the reply that failed
                    answer.reply.fail("internal", f"{FAILED}: see the server's log")
        return streaming

    def _forget(self, answer: _Answer) -> None:
        with self._lock:
            if answer in self._answers:
                self._answers.remove(answer)

    def _finish(self, answer: _Answer) -> None:
        sequence = answer.sequence
        if sequence.error is not None:
            late = sequence.times.started is None and not self._stopping.is_set()
            if late:
                answer.reply.fail("busy", str(sequence.error))
            else:
                answer.reply.fail("internal", f"{FAILED}: {sequence.error}")
        else:
            answer.reply.send({**answer.outputs(end=True), **statistics(sequence)}, final=True)

    def _drop_gone(self) -> None:
        with self._lock:
            answers = list(self._answers)
        for answer in answers:
            if not answer.ended and answer.reply.cancelled():
                self._engine.cancel(answer.sequence)

    def _flush(self) -> None:
        scheduler, control = self._engine.scheduler, self._control
        self._metrics.flush(
            running=scheduler.running,
            waiting=scheduler.waiting,
            default=control.restriction,
            pace=control.pace.position,
            guard=control.guard.share,
        )

    def _read_dial(self) -> None:
        """Take the default quality and the target from the dial file; one that can't be read changes nothing."""
        if self._dial_file is None:
            return
        try:
            text = self._dial_file.read_text(encoding="utf-8")
        except OSError:
            return
        if text == self._dial_text:
            return
        try:
            setting = DialSetting.read(text, self._parser.settings)
            setting.within(self._parser.settings).check_model(self._parser.dial, self._rewinds)
            self._control.set(self._target(setting), setting.max_kl)
        except (UsageError, GenerationError) as error:
            _log(f"{self._dial_file} can't be read ({error}); the default quality stays")
        else:
            _log(f"the default quality is {setting.in_words()}")
        finally:
            self._dial_text = text  # whatever it was, it isn't read again

    def _target(self, setting: DialSetting) -> Target:
        dial, lowest = self._parser.dial, self._parser.settings.lowest
        return Target(dial.restriction(setting.quality), dial.restriction(lowest), setting.tpot / 1e3)


def statistics(sequence: Generated) -> dict[str, Array]:
    """What the last response of a request has beside the rest of the answer: how it ended, and its times."""
    times, tokens = sequence.times, len(sequence.tokens)
    submitted = times.submitted or 0.0
    started = times.started if times.started is not None else times.ended
    first, ended = times.first_token, times.ended or submitted
    each = (ended - first) / (tokens - 1) if first is not None and tokens > 1 else 0.0
    return {
        "finish_reason": _strings(sequence.finish or ""),
        "prompt_tokens": np.array([len(sequence.prompt)], dtype=np.int32),
        "cached_tokens": np.array([sequence.reused], dtype=np.int32),
        "output_tokens": np.array([tokens], dtype=np.int32),
        "queue_seconds": np.array([(started or submitted) - submitted], dtype=np.float32),
        "first_token_seconds": np.array([(first or ended) - submitted], dtype=np.float32),
        "token_seconds": np.array([each], dtype=np.float32),
        "active_experts": np.array(sequence.active, dtype=np.float32),
    }


def _log(message: str) -> None:
    """To the server's log."""
    print(f"lynx: {message}", file=sys.stderr, flush=True)  # noqa: T201


def _drain(pieces: deque[str]) -> str:
    text = []
    while pieces:
        text.append(pieces.popleft())
    return "".join(text)


def _strings(*texts: str) -> Array:
    return np.array([text.encode("utf-8") for text in texts], dtype=object)
