"""Are promises kept? Three targets and three seeds on the shipped model, searched for as the command does.

The seed draws other text, and splits it differently into the half to choose on and the held-out half. What is measured
for one target is at hand for the next, so that nine searches cost little more than four.

    python benchmarks/calibration_promises.py
    python benchmarks/calibration_promises.py --seeds 3,4,5 --name calibration_promises_witness
    python benchmarks/calibration_promises.py --dial budgets --name calibration_promises_budgets

The second are seeds that nothing was made or mended with, the third what the other dial needs for the same promises.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from calibration_common import LENGTH, PROMPT, measured, parts, record, shipped

from lynx_trt.calibration.journal import Journal
from lynx_trt.calibration.promise import Promise
from lynx_trt.calibration.study import Parts, run_study
from lynx_trt.selection import DEFAULT_PRESET, PRESETS

TARGETS = {
    "KL at most 0.01": Promise(max_kl=0.01),
    "perplexity at most 2% above": Promise(max_perplexity_increase=0.02),
    "agreement at least 0.9": Promise(min_agreement=0.9),
}


def one(halves: Parts, promise: Promise, dial: str) -> dict[str, Any]:
    """One search: what was chosen, and how held-out text came out."""
    started = time.perf_counter()
    study = run_study(halves, PRESETS[DEFAULT_PRESET], promise, silent, dial_name=dial, compare=False)
    if study.chosen is None or study.held_out is None:
        return {"kept": False, "says": study.nearest()}
    (check,) = study.checks
    (chosen,) = promise.checks(study.chosen, halves.check.meter.sequences, study.company)
    return {
        "kept": study.kept,
        **study.held_out.setting.restriction.to_dict(),
        "natural": sum(study.natural) / len(study.natural),
        "active": study.held_out.active.mean,
        "active_p99": study.held_out.active_p99,
        "limit": check.limit,
        "chosen_on": chosen.value,
        "bound": chosen.bound,
        "held_out": check.value,
        "company": asdict(study.company),
        "settings": len(study.search.steps),
        "seconds": round(time.perf_counter() - started, 1),
    }


def silent(_: str) -> Callable[[float], None]:
    """No progress bar."""
    return lambda _: None


def main(
    batch: Annotated[int, typer.Option(help="Sequences that decode together.")] = 16,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them.")] = "0,1,2",
    count: Annotated[int, typer.Option(help="Sequences: half to choose on, half held out.")] = 64,
    dial: Annotated[str, typer.Option(help="floors or budgets.")] = "floors",
    name: Annotated[str, typer.Option(help="File of the results.")] = "calibration_promises",
    journal: Annotated[Path | None, typer.Option(help="Folder to go on in after an interruption.")] = None,
) -> None:
    """Run every target with every seed; exit 1 if a promise is broken."""
    probed, rows = shipped(), []
    for seed in (int(part) for part in seeds.split(",")):
        identity = {"batch": batch, "count": count, "seed": seed, "length": LENGTH, "prompt": PROMPT}
        log = Journal(journal / str(seed), identity, resume=True) if journal else None
        halves = measured(parts(probed, count, seed), batch, log)
        for target, promise in TARGETS.items():
            rows.append({"target": target, "seed": seed, **one(halves, promise, dial)})
            typer.echo(rows[-1])
    typer.echo(record(name, rows))
    raise typer.Exit(0 if all(row["kept"] for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
