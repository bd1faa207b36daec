"""`python -m lynx_trt.calibrate`: artifact + text -> floors or budgets for each layer that keep a quality promise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lynx_trt.calibration.options import PAGE, RESULT, CalibrateOptions, Device, DialName, Hardware, output_folder
from lynx_trt.console import Progress, fail, new_app, print_json, run, size
from lynx_trt.errors import CalibrationError

app = new_app()


@app.command()
def main(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder, as python -m lynx_trt.build writes it.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text of the kind that is served, or chats (.jsonl: docs/calibration.md); repeatable "
            "[default for lynx-tiny: its own]."
        ),
    ] = None,
    validation_text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Check the promise on this text, of another source or day; repeatable [default: the other half of "
            "--text's sequences]."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint that the artifact was built from [default: the shipped lynx-tiny].")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the report [default: ARTIFACT-calibration].")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Promise: mean KL to all experts, nats a token [default: 0.01].")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Promise: perplexity at most this share above all experts'; 0.01 is 1%.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Promise: share of tokens with the same likeliest successor, 0 to 1.")
    ] = None,
    batch: Annotated[
        str,
        typer.Option(
            help="Sequences that decode together; several with commas. The artifact gets what keeps the promise at all."
        ),
    ] = "16",
    sequences: Annotated[int, typer.Option(help="Sequences to draw: half to choose on, half held out.")] = 64,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence [default: 512, or what the artifact takes].")
    ] = None,
    prompt_length: Annotated[int, typer.Option(help="Tokens of prefill in each sequence, with all experts.")] = 64,
    dial: Annotated[
        DialName | None,
        typer.Option(
            help="What is searched for in each layer: vote floors, which cost less quality, or budgets, which bound "
            "every step tightly [default: floors; budgets for a preset that guarantees no expert]."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Only measure these budgets (a number, a fraction or a file, as for build); no search."),
    ] = None,
    floor: Annotated[float | None, typer.Option(help="Only measure this vote floor, as for build; no search.")] = None,
    hardware: Annotated[Hardware, typer.Option(help="GPU whose decode time is predicted and minimised.")] = "h100",
    bandwidth: Annotated[float | None, typer.Option(help="Instead of --hardware: measured bandwidth in TB/s.")] = None,
    layer_overhead: Annotated[
        float | None, typer.Option(help="Fixed cost of a MoE layer in microseconds [default: 34].")
    ] = None,
    search_parameters: Annotated[
        bool, typer.Option("--search-parameters", help="Try other guarantees (k0) and sensitivities (tau) as well.")
    ] = False,
    compare: Annotated[bool, typer.Option(help="Measure every preset, the same in all layers, too.")] = True,
    write: Annotated[bool, typer.Option(help="Put what was found into the artifact.")] = True,
    seed: Annotated[int, typer.Option(help="Decides which text is drawn, and the intervals.", min=0)] = 0,
    device: Annotated[Device, typer.Option(help="Where the checkpoint runs.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads [default: all cores].", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report that is there.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings along.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON; no progress.")] = False,
) -> None:
    """Find the floors or budgets that keep a promise about quality on your text, and put them into the artifact."""
    options = CalibrateOptions(
        artifact=artifact,
        checkpoint=checkpoint,
        text=tuple(text or ()),
        validation_text=tuple(validation_text or ()),
        output=output,
        batch=batch,
        sequences=sequences,
        length=length,
        prompt_length=prompt_length,
        max_kl=max_kl,
        max_perplexity_increase=max_perplexity_increase,
        min_agreement=min_agreement,
        dial=dial,
        budget=budget,
        floor=floor,
        hardware=hardware,
        bandwidth=bandwidth,
        layer_overhead=layer_overhead,
        search_parameters=search_parameters,
        compare=compare,
        write=write,
        seed=seed,
        device=device,
        threads=threads,
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    _check_early(options)
    from lynx_trt.calibration.run import calibrate

    with Progress(quiet=json_output) as progress:
        try:
            result = calibrate(options, progress)
        except KeyboardInterrupt:
            fail("interrupted; what was measured so far is kept: give the same command with --resume to go on")
            sys.exit(130)
    folder = output_folder(options, finished=True)
    if json_output:
        print_json(summary(result, folder))
    else:
        _tell(result, folder)
    if not result["kept"]:
        raise CalibrationError(f"{result['reason']}; what was measured is in {folder}")


def _check_early(options: CalibrateOptions) -> None:
    """What can be seen without the imports that take seconds."""
    from lynx_trt.calibration.options import batch_sizes
    from lynx_trt.machine import check_threads

    check_threads(options.threads)
    output_folder(options)
    batch_sizes(options)


def summary(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a calibration came to, for --json; everything else is in the folder."""
    from lynx_trt.calibration.report import measured_on

    same = ("kept", "reason", "promise", "budgets", "floors", "selection", "seconds", "peak_bytes")
    return {
        "report": str(folder / PAGE),
        "calibration": str(folder / RESULT),
        "measured_on": measured_on(result),
        "batch": result.get("batch"),
        "dial": result.get("dial"),
        "artifact_updated": result.get("artifact_updated", False),
        **{name: result[name] for name in same},
        "batches": [_batch_summary(study) for study in result["batches"]],
    }


def _batch_summary(study: dict[str, Any]) -> dict[str, Any]:
    chosen = study["held_out"] or {}
    metrics = ("kl", "agreement", "perplexity", "bits_a_byte", "active", "active_p99", "step_seconds")
    return {
        "batch": study["batch"],
        "budgets": chosen.get("budgets"),
        "floors": chosen.get("floors"),
        "checks": study["checks"],
        **{name: {"all_experts": study["unrestricted"][name], "chosen": chosen.get(name)} for name in metrics},
    }


def _tell(result: dict[str, Any], folder: Path) -> None:
    from rich.console import Console

    from lynx_trt.calibration.report import about_text, measured_on, terminal_tables

    # A pipe has no width of its own, and rich's default of 80 would break the rows.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    for table in terminal_tables(result):
        console.print(table)
        console.print()
    if result["promise"]:
        kept = f"kept on {measured_on(result)}" if result["kept"] else "NOT kept"
        typer.echo(f"Promise: {result['promise']['text']}; {kept}")
        if result["kept"] and about_text(result):
            typer.echo(about_text(result))
    if result["budgets"] is not None:
        _tell_restriction(result)
    if result.get("artifact_updated"):
        typer.echo("The artifact decodes with them from now on.")
    typer.echo(f"Report: {folder / PAGE} in {result['seconds']:.1f} s; memory at its peak {size(result['peak_bytes'])}")


def _tell_restriction(result: dict[str, Any]) -> None:
    below = f" (batch of {result['batch']} and below)" if "batch" in result else ""
    caps = " (caps: the most experts that any measured step used)" if below else ""
    if any(result["floors"]):
        typer.echo(f"Floors: {result['floors']}{below}")
    typer.echo(f"Budgets: {result['budgets']}{caps if any(result['floors']) else below}")


if __name__ == "__main__":
    run(app)
