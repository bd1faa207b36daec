"""What all commands share: how errors, progress and interruptions reach a person or a machine."""

from __future__ import annotations

import functools
import io
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import typer

from lynx_trt.errors import LynxError


def new_app() -> typer.Typer:
    """A one-command application without shell completion (which would write to the user's shell profile)."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class _Interrupted(BaseException):
    """Ctrl-C, under a name that typer doesn't know: it ends a KeyboardInterrupt with 130 and no word."""


def run(app: typer.Typer) -> None:
    """Run a command; a LynxError becomes one line on stderr and its exit code, Ctrl-C becomes 130."""
    # Hub look-ups would only wait for a time-out: checkpoints are folders here.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it otherwise (nohup)
        signal.signal(signal.SIGINT, _on_interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # text that a terminal has no letters for is no reason to end
    for command in app.registered_commands:
        if command.callback:
            command.callback = _tell_interrupts(command.callback)
    try:
        try:
            app()
        finally:
            if sys.stdout:
                sys.stdout.flush()  # at exit Python would only say that it ignores what goes wrong with it
    except LynxError as error:
        fail(str(error))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, _Interrupted):
        fail("interrupted; nothing was left behind")
        sys.exit(130)
    except BrokenPipeError:
        # The reader went away (`| head`): nothing to say, and nobody to say it to.
        _silence_stdout()
        sys.exit(1)
    except OSError as error:
        if not _stdout_fails():
            raise
        _silence_stdout()
        fail(f"the output can't be written: {error.strerror or error}; free some space, or send it elsewhere")
        sys.exit(1)


def _tell_interrupts(callback: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(callback)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return callback(*args, **kwargs)
        except KeyboardInterrupt:
            raise _Interrupted from None

    return wrapped


def _stdout_fails() -> bool:
    try:
        print(flush=True)  # noqa: T201
    except OSError:
        return True
    return False


def _silence_stdout() -> None:
    """What is still to be written to stdout goes nowhere: Python tries once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_interrupted = False


def _on_interrupt(*_: object) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def check_interrupted() -> None:
    """Raise a Ctrl-C again that a library has swallowed: importing and tracing run code that catches everything.

    Raises:
        KeyboardInterrupt: there was one.
    """
    if _interrupted:
        raise KeyboardInterrupt


def fail(message: str) -> None:
    """One line on stderr."""
    print(f"error: {message}", file=sys.stderr)  # noqa: T201


def note(message: str) -> None:
    """One line on stderr: what a user should know, and no error."""
    print(f"note: {message}", file=sys.stderr)  # noqa: T201


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Progress:
    """Named phases with a bar on a terminal, a line each elsewhere, or nothing at all when quiet. To stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Choose the form; nothing is printed yet."""
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bars = Bars(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._plain = not quiet and not self._console.is_terminal

    def __enter__(self) -> Progress:
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self._bars.stop()

    def say(self, message: str) -> None:
        """One line above the bars."""
        self._console.print(message, markup=False, soft_wrap=True)

    def phase(self, description: str) -> Callable[[float], None]:
        """Begin a phase; the result is called with its fraction done, 1.0 when it ends."""
        check_interrupted()
        if self._plain:
            self.say(f"{description} ...")
        task = self._bars.add_task(description, total=1.0)

        def update(fraction: float) -> None:
            check_interrupted()
            self._bars.update(task, completed=min(fraction, 1.0))

        return update

    def sums(self) -> Callable[[float], None]:
        """For `on_progress` of what checks an artifact's sums: a phase that begins with the first call."""
        update: Callable[[float], None] | None = None

        def begin(fraction: float) -> None:
            nonlocal update
            update = update or self.phase("Checking the files' sums")
            update(fraction)

        return begin


def print_json(value: Any) -> None:
    """A JSON document on stdout."""
    typer.echo(json_text(value))


def json_text(value: Any) -> str:
    """JSON that every reader takes, which knows no NaN and no infinity: they are null."""
    import json

    return json.dumps(_with_nulls(value), indent=2, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_nulls(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
