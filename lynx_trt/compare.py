"""`python -m lynx_trt.compare`: an artifact against what a user would otherwise run: right, fast, and at what cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from lynx_trt.console import Progress, fail, json_text, new_app, print_json, run
from lynx_trt.errors import LynxError, UsageError

REPORT, PAGE = "report.json", "report.html"

app = new_app()


@app.command()
def main(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder, as python -m lynx_trt.build writes it.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.json and report.html; made if it isn't there.")
    ] = Path("out/compare"),
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="ort-moe, ort-plain or hf-eager; repeatable [default: all]. Ratios are to the first there."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Candidates: off, own (the artifact's), a number of experts, a fraction or a file; repeatable "
            "[default: off and own]."
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; repeatable [default: 1, 4, 16].")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The checkpoint that the artifact was built from, for hf-eager.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to decode [default: a module of Python].")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 32,
    steps: Annotated[int, typer.Option(help="Decode steps measured in a round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds; in each one every runner has its turn.")] = 5,
    sequences: Annotated[
        int,
        typer.Option(help="Sequences of the batch in which logits and text are judged, at least the largest --batch."),
    ] = 4,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            help="Where ONNX Runtime runs, cpu or cuda; repeatable [default: cpu]. cuda wants onnxruntime-gpu, and has "
            "not been run on a GPU yet."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads [default: all cores].", min=1)] = None,
    memory: Annotated[bool, typer.Option(help="Measure each runner's memory in a process of its own.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of where in the text the sequences begin.", min=0)] = 0,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help='Exit with 1 where this holds: "decode_ratio<1.2", "perplexity[lynx@own]>5"; repeatable.'),
    ] = None,
    against: Annotated[Path | None, typer.Option(help="An earlier report to compare this one with.")] = None,
    verify: Annotated[bool, typer.Option(help="Check the artifact's sums first.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON; no progress.")] = False,
) -> None:
    """Compare an artifact with ONNX Runtime's own fused op, the plain graph and Hugging Face eager."""
    from lynx_trt.artifact import open_artifact
    from lynx_trt.comparison.against import changes, read_report
    from lynx_trt.comparison.conditions import Condition
    from lynx_trt.comparison.run import CompareOptions, compare
    from lynx_trt.comparison.runners import BASELINES
    from lynx_trt.machine import check_threads

    check_threads(threads)
    conditions = [Condition.parse(item) for item in fail_if or ()]
    earlier = read_report(against) if against else None
    options = CompareOptions(
        artifact=artifact,
        baselines=tuple(baseline or BASELINES),
        budgets=tuple(budget or ("off", "own")),
        batches=tuple(batch or (1, 4, 16)),
        checkpoint=checkpoint,
        text=text,
        prompt=prompt,
        steps=steps,
        rounds=rounds,
        sequences=sequences,
        providers=tuple(provider or ("cpu",)),
        threads=threads,
        memory=memory,
        seed=seed,
    )
    check_output(output)
    with Progress(quiet=json_output) as progress:
        opened = open_artifact(artifact, verify=verify, on_progress=progress.sums())
        report = compare(opened, options, progress)
    report["failures"] = [line for condition in conditions for line in condition.failures(report)]
    if earlier:
        report["against"] = {"created": earlier["created"], "changes": changes(earlier, report)}
    write(report, output)
    if json_output:
        print_json(report)
    else:
        _tell(report, output)
    for line in report["failures"]:
        fail(line)
    if report["failures"]:
        raise typer.Exit(1)


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json and report.html, each aside and then renamed: a report that is there is whole.

    Raises:
        LynxError: there is no room for them, or the folder can't be written to.
    """
    from lynx_trt.comparison.page import page

    files = {PAGE: page(report), REPORT: json_text(report) + "\n"}
    asides = {folder / f"{name}.partial-{os.getpid()}": folder / name for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for aside, text in zip(asides, files.values(), strict=True):
            aside.write_text(text, encoding="utf-8")
        for aside, path in asides.items():
            aside.replace(path)
    except OSError as error:
        raise LynxError(
            f"can't write to {folder}: {error.strerror or error}; make room, or choose another --output"
        ) from None
    finally:
        for aside in asides:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def check_output(folder: Path) -> None:
    """Refuse what can't be a folder to write to before anything is measured; nothing is made yet.

    Raises:
        UsageError: it, or a folder that it is to lie in, is a file or can't be written to.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"--output {folder} can't be a folder: {there} is a file; choose another --output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--output {folder} can't be written to: no permission for {there}; choose another --output")


def _tell(report: Mapping[str, Any], folder: Path) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True)
    console.print(_table(report["baseline"], report["summary"], report["right"]))
    for problem in report["problems"]:
        console.print(f"Not compared: {problem}", markup=False)
    for row in report["runners"]:
        for note in row["notes"]:
            console.print(f"{row['name']}: {note}", markup=False)
    for row in report.get("against", {}).get("changes", ()):
        ratio = "other baseline" if row["decode_ratio"] is None else " -> ".join(map(_number, row["decode_ratio"]))
        perplexity = " -> ".join(map(_number, row["perplexity"]))
        console.print(f"{row['runner']} at batch {row['batch']}: ratio {ratio}, perplexity {perplexity}", markup=False)
    console.print(f"{folder / PAGE}, {folder / REPORT}", markup=False)


def _table(baseline: str | None, summary: Sequence[Mapping[str, Any]], right: Mapping[str, Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for head in ("batch", "tokens/s", f"x {baseline}", "active", "perplexity", "logits RMS"):
        table.add_column(head, justify="right")
    for row in sorted(summary, key=lambda row: row["batch"]):
        quality = right[row["runner"]]
        table.add_row(
            row["runner"],
            str(row["batch"]),
            f"{row['decode_tokens_per_second']:.1f}",
            _number(row["decode_ratio"]),
            _number(row["active_experts"]),
            f"{quality['perplexity']:.3f}",
            f"{quality['rms']:.1e}",
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    run(app)
