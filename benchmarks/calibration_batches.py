"""Does what was found for one batch size hold at another? On the shipped model, for both dials.

For each batch size the fewest experts with a KL of 0.01 are searched for on one half of the text; each outcome is
then used at every batch size, on the other half. So is what an artifact gets that is calibrated for all of them: in
each layer the lowest floor and the largest budget. Floors are used with the caps that were found with them, and
without any, since a small batch's caps hold a large one.

    python benchmarks/calibration_batches.py --journal out/batches
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from calibration_common import PROMPT, brief, measured, parts, record, shipped

from lynx_trt.budgets import Restriction
from lynx_trt.calibration.dials import Dial, budget_dial, floor_dial
from lynx_trt.calibration.journal import Journal, Measured
from lynx_trt.calibration.model import Setting
from lynx_trt.calibration.search import Goal, Search, curves, measure_sensitivity
from lynx_trt.calibration.study import with_caps
from lynx_trt.selection import PRESETS

LYNX = PRESETS["lynx"]
COUNT, LENGTH, MAX_KL = 128, 256, 0.01
BATCHES = (4, 16, 64)
ALL = "all"


def find(choose: Measured, dial: Dial) -> Restriction:
    """The fewest bytes of experts with a KL of at most `MAX_KL` on the text to choose on, no room left for chance."""
    natural = choose.meter.natural(choose.batch)
    sensitivity = measure_sensitivity(choose, dial, natural.mean((1, 2)))
    most = [int(value) for value in natural.max((1, 2))]
    model = curves(sensitivity, dial, most, choose.meter.cost.expert_bytes)
    goal = Goal(lambda item: item.kl.mean / MAX_KL, lambda item: item.expert_bytes_a_token.mean, saving=True)
    best = Search(choose, dial, model, goal).run().best
    assert best is not None
    return (with_caps(best) if dial.name == "floors" else best.setting).restriction


def main(
    journal: Annotated[Path | None, typer.Option(help="Folder to go on in after an interruption.")] = None,
) -> None:
    """Search at every batch size, and use at every other."""
    probed = shipped()
    experts, width = probed.experts, probed.layers[0].experts_per_token
    meters = parts(probed, COUNT, 0, LENGTH)
    identity = {"count": COUNT, "length": LENGTH, "prompt": PROMPT}
    log = Journal(journal, identity, resume=True) if journal else None
    found: dict[str, dict[int | str, Restriction]] = {"floors": {}, "floors without caps": {}, "budgets": {}}
    for batch in BATCHES:
        choose = measured(meters, batch, log).choose
        means = choose.meter.natural(batch).mean((1, 2))
        found["floors"][batch] = find(choose, floor_dial(choose, LYNX, experts, means))
        found["budgets"][batch] = find(choose, budget_dial(LYNX, experts, means, width))
        found["floors without caps"][batch] = replace(found["floors"][batch], budgets=experts)
    rows: list[dict[str, Any]] = []
    for name, by_batch in found.items():
        by_batch[ALL] = Restriction.mildest(list(by_batch.values()))
        for at in BATCHES:
            check = measured(meters, at, log).check
            natural = float(check.meter.natural(at).mean())
            for source, chosen in by_batch.items():
                (item,) = check.measure([Setting(LYNX, chosen)])
                rows.append({"dial": name, "found_at": source, "used_at": at, "natural": natural, **brief(item)})
                typer.echo(
                    f"{name} of {source} at {at}: {item.active.mean:.2f} of {natural:.2f}, KL {item.kl.mean:.4f}"
                )
    typer.echo(record("calibration_batches", rows))


if __name__ == "__main__":
    typer.run(main)
