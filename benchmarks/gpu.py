"""Everything that needs a GPU, in one command: is it right, is it fast, and what of what was asked for is met?

    python benchmarks/gpu.py [--output FOLDER] [--minutes 20] [--part NAME ...] [--tune] [--vllm FOLDER] [--dry-run]
    python benchmarks/gpu.py --merge FOLDER FOLDER ... --output FOLDER

Parts run one after another in processes of their own: the machine, with --tune the tuner, whose launches all that
follows runs with, the engines (does TensorRT run on this SM?), the kernels' compilation and tests, the benchmarks. One
that fails or hangs is written down and the next begins. A part may use the time that those before it left over; all of
them together take at most --minutes.

FOLDER has results.json, written as it grows, table.md and log.txt. Needs no installation: the packages are found
through a folder of links, build/gpu. Exit code 1 if a part failed or a target was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import IO, Any

from gpu_common import ROOT, command_words, commit, environment, write_json
from gpu_targets import Verdict, table, verdicts

BENCHMARKS = Path(__file__).resolve().parent
MODELS = (
    "mixtral-8x7b",
    "qwen3-30b-a3b",
    "gpt-oss-120b",
    "gpt-oss-120b-mxfp4",
    "qwen3-30b-a3b-fp8",
    "qwen3-30b-a3b-int4",
    "deepseek-v2-lite",
)
# Where parts run: `python -m` looks in the current folder first, and the repository's own lynx_trt/ is not all of it.
WORK = ROOT / "build" / "gpu"
# What the tuner writes and the kernels' plans read.
TABLE = ROOT / "plugins" / "launch_table.py"
# A part is told to begin nothing new so many seconds before it is ended.
GRACE = 10.0


@dataclass(frozen=True)
class Part:
    """A command that writes FILE.json; `weight` is its share of the time. `timed` ones are told how long they have."""

    name: str
    command: tuple[str, ...]
    weight: float
    timed: bool = True
    records: bool = True

    @property
    def script(self) -> Path | None:
        """The file that it needs."""
        return Path(self.command[1]) if self.command[1].endswith(".py") else None


def parts(options: argparse.Namespace) -> list[Part]:
    """All parts in their order: one that crashes on one model has to leave the others'."""
    extra = ["--dry-run"] if options.dry_run else []
    peers = ["--vllm", str(options.vllm.resolve())] if options.vllm else []
    kit = ["--kit", str(options.kit.resolve())]

    def script(name: str, weight: float, *arguments: str, part: str | None = None) -> Part:
        return Part(part or name, (sys.executable, str(BENCHMARKS / f"gpu_{name}.py"), *extra, *arguments), weight)

    def engines(name: str, weight: float) -> Part:
        return Part(name, (sys.executable, str(BENCHMARKS / f"gpu_{name}.py"), *kit), weight, timed=False)

    # A dry run has five models: the forms of experts that there are.
    models = (MODELS[0], *MODELS[2:6]) if options.dry_run else MODELS
    tune = (sys.executable, "-m", "lynx_trt.plugins.tune", "--output", str(TABLE))
    every = [
        script("machine", 0.3),
        *((Part("tune", tune, 10.0, timed=False, records=False),) if options.tune else ()),
        engines("engine", 5.0),
        script("compile", 0.7),
        *(Part(name, command, 2.0, timed=False, records=False) for name, command in pytest_commands().items()),
        script("select", 1.0, *peers),
        script("states", 0.7),
        *(script("experts_decode", 1.5, "--model", name, *peers, part=f"decode-{name}") for name in models),
        *(script("experts_prefill", 1.0, "--model", name, *peers, part=f"prefill-{name}") for name in models),
        script("decode_model", 2.0, *peers, part="model"),
        engines("end_to_end", 3.0),
    ]
    return [part for part in every if not options.part or part.name.split("-")[0] in options.part]


def pytest_commands() -> dict[str, tuple[str, ...]]:
    """The kernels' tests: those that need a GPU, and the interpreter's in tiny, which take one where there is one.

    Of the former each model's are one process', which holds its weights. Of the latter the random selections are left
    out, each of which is a kernel to compile.
    """
    tests = ROOT / "tests"
    common = ["-q", "--maxfail=20", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    # The fixtures of tests/conftest.py are not wanted, nor what they import.
    common += [f"--config-file={ROOT / 'pyproject.toml'}", f"--confcutdir={tests / 'gpu'}"]
    tiny = [str(tests / name) for name in ("test_experts_kernels.py", "test_select_kernel.py", "test_state_kernels.py")]
    pytest = (sys.executable, "-m", "pytest", *common)
    return {
        "kernels": (*pytest, "-n", "4", "--dist", "loadgroup", str(tests / "gpu")),
        "kernels-tiny": (*pytest, "-n", "8", "--dist", "load", "-k", "not odd_batches", *tiny),
    }


class Runner:
    """Runs parts one after another and keeps what they say."""

    def __init__(self, folder: Path, minutes: float, log: IO[str], *, dry: bool = False) -> None:
        self.folder, self.log = folder, log
        self.end = time.monotonic() + 60 * minutes
        self.results: dict[str, Any] = {"environment": about(), "minutes": minutes, "dry": dry, "parts": {}}

    def run(self, every: list[Part]) -> list[Verdict]:
        """All parts, then the verdicts."""
        links()
        with tempfile.TemporaryDirectory(prefix="lynx-gpu-") as scratch:
            for number, part in enumerate(every):
                left = self.end - time.monotonic()
                share = part.weight / sum(each.weight for each in every[number:])
                self.results["parts"][part.name] = {"status": "running"}
                self.one(part, Path(scratch) / f"{part.name}.json", max(left, 0.0) * share)
                self.write()
                last = self.results["parts"][part.name]
                if part.name == "tune":
                    shutil.copy2(TABLE, self.folder)  # what has been measured, also where the rest was not
                self.say(f"{part.name}: {last['status']}, {last.get('seconds', 0):.0f} s {last.get('summary', '')}")
        return self.write()

    def one(self, part: Part, record: Path, seconds: float) -> None:
        """One part, for at most so long."""
        script = part.script
        if script is not None and not script.exists():
            self.results["parts"][part.name] = {"status": "missing", "summary": f"{script.name} is not here"}
            return
        command = list(part.command) + (["--output", str(record)] if part.records else [])
        if part.timed:
            command += ["--seconds", str(round(max(seconds - GRACE, seconds / 2), 1))]
        self.say(f"{part.name}: at most {seconds:.0f} s")
        start, began = (self.folder / "log.txt").stat().st_size, time.monotonic()
        code = self.watch(command, part, record, seconds)
        status = "ok" if code == 0 else "timed out" if code is None else "failed"
        said = (self.folder / "log.txt").read_bytes()[start:].decode(errors="replace")
        entry = {"status": status, "exit_code": code, "limit": round(seconds, 1), "command": command_words(command)}
        entry |= {"seconds": round(time.monotonic() - began, 1)}
        if status != "ok" or not part.records:
            entry |= {"summary": last_line(said), "tail": said[-2000:]}
        self.results["parts"][part.name] = entry
        self.take(part.name, record)

    def watch(self, command: list[str], part: Part, record: Path, seconds: float) -> int | None:
        """Start it in a session of its own, all of which ends when its time is over. None: it was ended."""
        child = subprocess.Popen(  # noqa: S603 -- our own commands
            command,
            cwd=WORK,
            env=child_environment(),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + seconds
        try:
            while True:
                try:
                    return child.wait(timeout=min(1.0, max(end - time.monotonic(), 0.01)))
                except subprocess.TimeoutExpired:
                    if self.take(part.name, record):
                        self.write()
                    if time.monotonic() >= end:
                        return None
        finally:
            stop(child)

    def take(self, name: str, record: Path) -> bool:
        """What a part has recorded so far; whether that is more than before."""
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        entry = self.results["parts"][name]
        new = entry.get("result") != found
        entry["result"] = found
        return new

    def write(self) -> list[Verdict]:
        """results.json and table.md."""
        return write_results(self.folder, self.results)

    def say(self, message: str) -> None:
        """A line for whoever waits, and in the log."""
        print(message, flush=True)
        self.log.write(f"\n==== {message}\n")
        self.log.flush()


def stop(child: subprocess.Popen[Any]) -> None:
    """End a part and whatever it started; processes that have ended are no matter."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def write_results(folder: Path, results: dict[str, Any]) -> list[Verdict]:
    """The whole run as JSON and the table as Markdown."""
    found = verdicts(results["parts"])
    if results.get("dry"):
        found = [replace(verdict, passed=None) for verdict in found]
    results["verdicts"] = [{**vars(verdict), "word": verdict.word} for verdict in found]
    write_json(folder / "results.json", results)
    (folder / "table.md").write_text(f"{table(found)}\n", encoding="utf-8")
    return found


def merge(folders: list[Path], output: Path) -> list[Verdict]:
    """Several runs as one: of a part that is in several, the last that is ok, else the last."""
    merged: dict[str, Any] = {"environment": None, "minutes": 0.0, "parts": {}, "runs": []}
    for folder in folders:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        merged["environment"] = merged["environment"] or results["environment"]
        merged["runs"].append(results["environment"])
        merged["minutes"] += results["minutes"]
        for name, part in results["parts"].items():
            if part["status"] == "ok" or merged["parts"].get(name, {}).get("status") != "ok":
                merged["parts"][name] = part
    return write_results(output, merged)


def last_line(text: str) -> str:
    """The last line that says something, without colours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def links() -> None:
    """Make WORK a folder from which `lynx_trt` and its packages of the top level can be imported, made anew."""
    folder = WORK / "lynx_trt"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    wanted = [*(ROOT / "lynx_trt").iterdir(), *(ROOT / name for name in ("export", "plugins", "models"))]
    for path in wanted:
        if path.name != "__pycache__":
            (folder / path.name).symlink_to(path)


def child_environment() -> dict[str, str]:
    """Packages found without an installation, output as it comes, and no look at a hub."""
    path = [str(WORK), os.environ.get("PYTHONPATH", "")]
    known = {"LYNX_COMMIT": commit() or "unknown", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **known, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def about() -> dict[str, Any]:
    """The environment; a machine without PyTorch still has its results written."""
    try:
        import torch

        return environment(dry=not torch.cuda.is_available())
    except ImportError as error:
        return {"error": str(error), "commit": commit()}


def default_folder(found: dict[str, Any]) -> Path:
    """benchmarks/results/gpu/<gpu>-<date>."""
    gpu = found.get("gpu")
    name = str(gpu.get("name")) if isinstance(gpu, dict) else "no-gpu"
    return BENCHMARKS / "results" / "gpu" / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{date.today().isoformat()}"


def command_line() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where results go (benchmarks/results/gpu/<gpu>-<date>)")
    parser.add_argument("--minutes", type=float, default=20.0, help="for everything together")
    names = ("machine", "tune", "engine", "compile", "kernels", "select", "decode", "prefill", "model", "end_to_end")
    parser.add_argument("--part", action="append", choices=names, help="only this part; repeat for several")
    parser.add_argument("--tune", action="store_true", help="first measure launches, into plugins/launch_table.py")
    parser.add_argument("--kit", type=Path, default=ROOT / "build" / "gpu-kit", help="the engines' kit (build/gpu-kit)")
    parser.add_argument("--vllm", type=Path, help="a folder with vLLM's fused_moe.py, as a peer")
    parser.add_argument("--dry-run", action="store_true", help="the scripts on a CPU in tiny sizes; no figure counts")
    parser.add_argument("--merge", type=Path, nargs="+", help="no run: several folders' results as one")
    return parser.parse_args()


def main() -> int:
    """Run or merge; print the table."""
    options = command_line()
    if options.minutes <= 0:
        sys.exit(f"error: --minutes is {options.minutes:g}: it has to be more than 0")
    options.output = (options.output or default_folder(about())).resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.merge:
        found = merge(options.merge, options.output)
    else:
        options.tune = options.tune or "tune" in (options.part or ())
        with (options.output / "log.txt").open("w", encoding="utf-8") as log:
            runner = Runner(options.output, options.minutes, log, dry=options.dry_run)
            found = runner.run(parts(options))
        for name, part in runner.results["parts"].items():
            if part["status"] != "ok":
                print(f"{name}: {part['status']}: {part.get('summary', '')}")
    print(table(found))
    print(f"in {options.output}")
    results = json.loads((options.output / "results.json").read_text(encoding="utf-8"))
    broken = any(part["status"] != "ok" for part in results["parts"].values())
    return int(broken or any(verdict.passed is False for verdict in found))


if __name__ == "__main__":
    sys.exit(main())
