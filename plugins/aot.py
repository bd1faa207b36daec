"""Kernels compiled ahead of time: what an engine carries so that it needs a launcher, and no compiler or Python.

`compile_for` turns a description of an engine's ops into `Kernels`: cubins for each SM asked for, and for each op and
SM the plans (`plan.py`) that say how to launch them. Equal ops of different layers share everything, and `to_bytes`
is one blob for the whole engine. No GPU is needed.

Compiled kernels are kept in the cache (`kernels` in `loader.cache_root()`), by a hash of all that they depend on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lynx_trt import __version__
from lynx_trt.console import new_app, print_json, run
from lynx_trt.errors import TensorRTError, UsageError
from lynx_trt.machine import cores
from lynx_trt.plugins.blob import Cubin, Kernels, lookup
from lynx_trt.plugins.launch import SMS
from lynx_trt.plugins.plan import MODULES, SCRATCH_BYTES, Kernel, Plan
from lynx_trt.plugins.plans import plans
from lynx_trt.plugins.specs import Op, Spec
from lynx_trt.tensorrt.loader import cache_root

__all__ = ["Cubin", "Kernels", "compile_for", "lookup", "report_table"]

INSTALL = 'pip install "lynx-trt[kernels]"'
# Counts up when a change of ours, and not of a kernel's source, makes cached kernels useless.
_CACHE_VERSION = 4
# What the compiler makes: code for an SM, or the text that its assembler takes.
Images = Literal["cubin", "ptx"]


def compile_for(
    ops: Iterable[Op],
    sms: Sequence[int],
    *,
    jobs: int | None = None,
    progress: Callable[[float], None] | None = None,
    images: Images = "cubin",
) -> Kernels:
    """Compile what some ops need for some SMs, `jobs` kernels at a time (None: as many as there are processors).

    images: "ptx" for kernels as text, with the lines of their sources, for tests that read it; a driver takes either.

    Raises UsageError (an SM that kernels can't be built for), TensorRTError (the compiler is missing) and
    RuntimeError (a kernel does not compile).
    """
    for sm in sms:
        if sm not in SMS:
            raise UsageError(f"kernels can't be built for SM {sm}: choose from {_list(SMS)}")
    chosen = _plans(ops, sms)
    options = [(sm, plan) for by_sm in chosen.values() for sm, each in by_sm.items() for plan in each]
    wanted = dict.fromkeys((step.kernel, sm) for sm, plan in options for step in plan.steps)
    cubins = _compile_all(list(wanted), jobs or cores(), progress or (lambda _: None), images=images)

    def with_cubins(plan: Plan[Kernel], sm: int) -> Plan[Cubin]:
        return plan.with_kernels(lambda kernel: cubins[kernel, sm])

    built = {
        key: {sm: tuple(with_cubins(plan, sm) for plan in options) for sm, options in by_sm.items()}
        for key, by_sm in chosen.items()
    }
    return Kernels(tuple(cubins.values()), built, (__version__, _triton_version()))


def compile_each(
    kernels: Iterable[Kernel],
    sm: int,
    *,
    jobs: int | None = None,
    progress: Callable[[float], None] | None = None,
    images: Images = "cubin",
) -> dict[Kernel, Cubin]:
    """Compile kernels for one SM, for the tuner: those that don't compile are not in the result.

    images: as `compile_for` has them.

    Raises TensorRTError: the compiler is missing.
    """
    wanted = [(kernel, sm) for kernel in dict.fromkeys(kernels)]
    found = _compile_all(wanted, jobs or cores(), progress or (lambda _: None), keep_going=True, images=images)
    return {kernel: cubin for (kernel, _), cubin in found.items()}


def _plans(ops: Iterable[Op], sms: Sequence[int]) -> dict[str, dict[int, tuple[Plan[Kernel], ...]]]:
    """Each op's plans by key and SM, without those for numbers of tokens that no profile has."""
    ranges: dict[Spec, set[tuple[int, int]]] = {}
    for op in ops:
        ranges.setdefault(op.spec, set()).update(op.ranges)
    chosen: dict[str, dict[int, tuple[Plan[Kernel], ...]]] = {}
    for spec, wanted in ranges.items():
        for sm in sorted(set(sms)):
            options = plans(spec, sm, max(high for _, high in wanted))
            lows = (0, *(plan.max_tokens for plan in options))
            kept = [
                plan
                for low, plan in zip(lows, options, strict=False)
                if any(first <= plan.max_tokens and low < last for first, last in wanted)
            ]
            chosen.setdefault(spec.key, {})[sm] = tuple(kept)
    return chosen


def _compile_all(
    wanted: list[tuple[Kernel, int]],
    jobs: int,
    progress: Callable[[float], None],
    *,
    keep_going: bool = False,
    images: Images = "cubin",
) -> dict[tuple[Kernel, int], Cubin]:
    """From the cache, or else by worker processes."""
    cache = cache_root() / "kernels"
    names = {each: _cache_name(*each, images) for each in wanted}
    found: dict[tuple[Kernel, int], Cubin] = {}
    for each in wanted:
        if (cubin := _read_cached(cache / names[each])) is not None:
            found[each] = cubin
    missing = [each for each in wanted if each not in found]
    if missing:
        _make_folder(cache)
        for each, cubin in _compile(missing, min(jobs, len(missing)), images, keep_going=keep_going):
            _write_cached(cache / names[each], cubin)
            found[each] = cubin
            progress(len(found) / len(wanted))
    progress(1.0)
    return {each: found[each] for each in wanted if each in found}


def _compile(
    wanted: list[tuple[Kernel, int]], jobs: int, images: Images = "cubin", *, keep_going: bool = False
) -> Iterable[tuple[tuple[Kernel, int], Cubin]]:
    """Compile in worker processes; yields as they come. The first failure ends it, or (keep_going) is left out."""
    if importlib.util.find_spec("triton") is None:
        raise TensorRTError(f"the Triton language, which compiles the GPU kernels, is not installed: {INSTALL}")
    # Heaviest first, so that the last worker does not start on a long one.
    tasks: queue.SimpleQueue[tuple[Kernel, int]] = queue.SimpleQueue()
    for each in sorted(wanted, key=lambda each: -len(each[0].constants)):
        tasks.put(each)
    answers: queue.SimpleQueue[tuple[tuple[Kernel, int], Cubin] | BaseException] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="lynx-kernels-") as scratch:
        workers = [_Worker(Path(scratch) / str(number), images) for number in range(jobs)]
        try:
            for worker in workers:
                threading.Thread(target=_serve, args=(worker, tasks, answers, keep_going), daemon=True).start()
            for _ in wanted:
                answer = answers.get()
                if not isinstance(answer, BaseException):
                    yield answer
                elif not keep_going:
                    raise answer
        finally:
            for worker in workers:
                worker.stop()


def _serve(
    worker: _Worker, tasks: queue.SimpleQueue[Any], answers: queue.SimpleQueue[Any], keep_going: bool = False
) -> None:
    """Give a worker tasks until there are none left, or one fails; with keep_going a dead one is started again."""
    while True:
        try:
            kernel, sm = tasks.get_nowait()
        except queue.Empty:
            return
        try:
            answers.put(((kernel, sm), worker.compile(kernel, sm)))
        except Exception as error:  # handed to the thread that waits for the answers
            if keep_going:
                worker.revive()  # before the answer, after which the workers may be stopped
            answers.put(error)
            if not keep_going:
                return


class _Worker:
    """A process of `aot_worker.py`."""

    def __init__(self, folder: Path, images: Images = "cubin") -> None:
        folder.mkdir()
        self._folder, self._images = folder, images
        self._start()

    def _start(self) -> None:
        folder = self._folder
        self._image = folder / "image"
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
        if self._images == "cubin":  # line tables are a third of one, and name files of the machine that compiled it
            environment["TRITON_DISABLE_LINE_INFO"] = "1"
        environment.pop("TRITON_INTERPRET", None)
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lynx_trt.plugins.aot_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def compile(self, kernel: Kernel, sm: int) -> Cubin:
        """Compile one kernel. Raises RuntimeError: it does not compile."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer: dict[str, Any] = {}
        request = {"kernel": asdict(kernel), "sm": sm, "image": str(self._image), "images": self._images}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or "{}")
        except (BrokenPipeError, ValueError):
            pass  # the process is gone, or was stopped
        if "entry" not in answer:
            reason = answer.get("error") or self._end()
            raise RuntimeError(f"{kernel.function} does not compile for SM {sm}: {reason}\n{kernel}")
        if answer["scratch"] > SCRATCH_BYTES:
            raise RuntimeError(f"{kernel.function} for SM {sm} wants {answer['scratch']} bytes of scratch a program")
        return Cubin(sm, kernel.function, **answer, image=self._image.read_bytes())

    def _end(self) -> str:
        """How the process ended, and its last words."""
        code = self._process.wait()
        self._log.seek(0)
        how = f"exit code {code}" if code >= 0 else f"signal {-code}; memory may have run out"
        return f"the compiler's process ended ({how}) {self._log.read()[-2000:]}".strip()

    def revive(self) -> None:
        """Start another process if this one has ended."""
        if self._process.poll() is not None:
            self._log.close()
            self._start()

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._log.close()


def _cache_name(kernel: Kernel, sm: int, images: Images = "cubin") -> str:
    description = {"kernel": asdict(kernel), "sm": sm, "triton": _triton_version(), "images": images}
    description["sources"] = _sources_hash(MODULES[kernel.function])
    text = json.dumps({"version": _CACHE_VERSION, **description}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _sources_hash(module: str) -> str:
    """A hash of the files that a module's kernels are made from: itself, what it imports of ours, the worker."""
    folder = Path(__file__).parent
    files, found = ["aot_worker"], [module]
    while found:
        files.append(name := found.pop())
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        imported = re.findall(r"^from lynx_trt\.plugins\.(\w+) import", text, re.MULTILINE)
        found += [each for each in imported if each not in files + found]
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update((folder / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise TensorRTError(
            f"can't make {folder}, where compiled kernels are kept: {error.strerror}. "
            "Set LYNX_TRT_CACHE to a folder you can write to"
        ) from error


def _write_cached(path: Path, cubin: Cubin) -> None:
    """A line of JSON, then the image; written aside and renamed, so that others see all of it or nothing."""
    header = asdict(replace(cubin, image=b"")) | {"image": hashlib.sha256(cubin.image).hexdigest()}
    descriptor, aside = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(json.dumps(header).encode() + b"\n" + cubin.image)
    Path(aside).replace(path)


def _read_cached(path: Path) -> Cubin | None:
    """A cached kernel; None if there is none, or what there is is damaged."""
    try:
        header, _, image = path.read_bytes().partition(b"\n")
        values = json.loads(header)
        if values.pop("image") != hashlib.sha256(image).hexdigest():
            return None
        return Cubin(**values, image=image)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


app = new_app()


@app.command()
def main(
    report: Annotated[bool, typer.Option(help="Print each kernel's registers, shared memory and spills.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the kernels to this file.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="A known model's sizes; repeat for several.")] = None,
    sm: Annotated[str, typer.Option(help="SMs to compile for, separated by commas.")] = _list(SMS).replace(" ", ""),
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "bfloat16",
    jobs: Annotated[int | None, typer.Option(help="Kernels to compile at a time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Compile the kernels of known models ahead of time; no GPU is needed."""
    from lynx_trt.console import Progress
    from lynx_trt.plugins.shapes import SHAPES, STATES, ops_of

    unknown = sorted(set(shape or ()) - {*SHAPES, *STATES})
    if unknown:
        raise UsageError(f"unknown shape {_list(unknown)}: choose from {_list([*SHAPES, *STATES])}")
    if not report and output is None:
        raise UsageError("nothing to do: give --report, or --output FILE")
    try:
        sms = [int(word) for word in sm.split(",")]
    except ValueError:
        raise UsageError(f"--sm is {sm!r}: it has to be numbers separated by commas, as in 80,90") from None
    ops = [op for name in shape or [*SHAPES, *STATES] for op in ops_of(name, dtype)]
    with Progress() as bars:
        kernels = compile_for(ops, sms, jobs=jobs, progress=bars.phase("Compiling kernels"))
    if output is not None:
        output.write_bytes(kernels.to_bytes())
    if report and as_json:
        print_json([{**asdict(replace(each, image=b"")), "image": len(each.image)} for each in kernels.cubins])
    elif report:
        typer.echo(report_table(kernels))


def report_table(kernels: Kernels) -> str:
    """A line a kernel and SM: the least and the most of its variants."""
    groups: dict[tuple[str, int], list[Cubin]] = {}
    for cubin in kernels.cubins:
        groups.setdefault((cubin.function, cubin.sm), []).append(cubin)
    columns = f"{'variants':>8} {'registers':>9} {'shared memory':>15} {'spills':>6} {'cubin kB':>9}"
    lines = [f"{'kernel':<24} {'SM':>3} {columns}"]
    for (function, sm), each in sorted(groups.items()):
        registers, shared, sizes = (
            _range([getattr(c, name) if name != "image" else len(c.image) // 1000 for c in each])
            for name in ("registers", "shared", "image")
        )
        spills = max(c.spills for c in each)
        lines.append(f"{function:<24} {sm:>3} {len(each):>8} {registers:>9} {shared:>15} {spills:>6} {sizes:>9}")
    return "\n".join(lines)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


if __name__ == "__main__":
    run(app)
