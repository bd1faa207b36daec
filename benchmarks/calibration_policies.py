"""Which policy costs the least quality at equal active experts, on the shipped model?

Every preset with uniform budgets, the default with one vote floor for all layers, variants of it, and both dials by
layer. Those are searched for on one half of the text; every number is from the other half.

    python benchmarks/calibration_policies.py --batch 16 --journal out/policies
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from calibration_common import LENGTH, PROMPT, brief, measured, parts, record, shipped

from lynx_trt.budgets import Restriction, default_restriction
from lynx_trt.calibration.dials import Dial, Floors, budget_dial, floor_dial
from lynx_trt.calibration.journal import Journal, Measured
from lynx_trt.calibration.model import Setting
from lynx_trt.calibration.plots import ONE_FLOOR
from lynx_trt.calibration.search import Search, Sensitivity, curves, measure_sensitivity
from lynx_trt.calibration.study import bytes_goal, comparison, kl_at, uniform_settings, with_caps
from lynx_trt.console import Progress
from lynx_trt.selection import PRESETS

LYNX = PRESETS["lynx"]
VARIANTS = {
    "lynx, power 1": replace(LYNX, power=1.0),
    "lynx, power 3": replace(LYNX, power=3.0),
    "lynx, k0 = 0": replace(LYNX, guarantee=0.0),
    "lynx, k0 = 2": replace(LYNX, guarantee=2.0),
    "lynx, tau = 0.1": replace(LYNX, sensitivity=0.1),
    "lynx, drop": replace(LYNX, remap=False),
}
# One floor for all layers, at every second level of the dial, over so many levels.
ONE_FLOOR_LEVELS = 33
# Floors without a calibration: shares of 1 / (K E), the votes of an expert where all are used alike (power 2).
DEFAULT_SHARES = (0.125, 0.25, 0.5, 1.0)


def search(
    choose: Measured, dial: Dial, natural: Any, shares: Sequence[float], *, alone: bool
) -> tuple[Sensitivity, dict[str, list[Setting]]]:
    """Sensitivity, and the best settings by layer at `shares` of the natural bytes; with `alone` also without rounds.

    "Without rounds" is what measuring each layer alone says; otherwise layers are measured together as well.
    """
    meter = choose.meter
    means, most = natural.mean((1, 2)), natural.max((1, 2))
    sensitivity = measure_sensitivity(choose, dial, means)
    kinds = {f"{dial.name} by layer": 2} | ({f"{dial.name} by layer, measured alone": 0} if alone else {})
    found: dict[str, list[Setting]] = {name: [] for name in kinds}
    for share, (name, rounds) in itertools.product(shares, kinds.items()):
        limit = share * meter.cost.bytes_of_experts([float(v) for v in means]) / choose.batch
        model = curves(sensitivity, dial, [int(value) for value in most], meter.cost.expert_bytes)
        best = Search(choose, dial, model, bytes_goal(limit)).run(rounds, polish=rounds > 0).best
        if best:
            found[name].append(with_caps(best) if dial.name == "floors" else best.setting)
    return sensitivity, found


def uniform_policies(check: Measured, floors: Floors, mean: float, *, variants: bool) -> dict[str, list[Any]]:
    """Every policy that is the same in all layers, from many experts to few."""
    experts, width = floors.experts, check.meter.probed.layers[0].experts_per_token
    tried = {name: uniform_settings(name, experts, width, mean) for name in PRESETS if name != "off"}
    levels = range(0, min(len(floors.values), ONE_FLOOR_LEVELS), 2)
    tried[ONE_FLOOR] = [floors.setting((level,) * len(experts)) for level in levels][::-1]
    if variants:
        for name, selection in VARIANTS.items():
            tried[name] = [replace(setting, selection=selection) for setting in tried["lynx"]]
    # Down to what is guaranteed alone, so that there is a number for every point that another policy reaches.
    tried["lynx"] = [*tried["lynx"], Setting(LYNX, Restriction((0,) * len(experts)))]
    return {name: check.measure(settings) for name, settings in tried.items()}


def defaults(experts: Sequence[int], width: int) -> dict[str, Setting]:
    """What an artifact could begin with, without a calibration."""
    whole = tuple(experts)
    floors = {
        f"floor {share:g} / (K E)": Setting(
            LYNX, Restriction(whole, tuple(share / (width * count) for count in experts))
        )
        for share in DEFAULT_SHARES
    }
    return {"default budgets": Setting(LYNX, default_restriction(PRESETS["xshare"], experts, width)), **floors}


def one_batch(choose: Measured, check: Measured, shares: Sequence[float], *, variants: bool) -> dict[str, Any]:
    """Everything for one batch size."""
    meter = check.meter
    natural, own = meter.natural(check.batch), choose.meter.natural(choose.batch)
    mean, means = float(natural.mean()), own.mean((1, 2))
    experts, width = meter.probed.experts, meter.probed.layers[0].experts_per_token
    floors = floor_dial(choose, LYNX, experts, means)
    uniform = uniform_policies(check, floors, mean, variants=variants)
    alone: dict[str, Any] = {}
    by_layer: dict[str, list[Setting]] = {}
    for dial in (floors, budget_dial(LYNX, experts, means, width)):
        sensitivity, found = search(choose, dial, own, shares, alone=variants)
        alone[dial.name] = asdict(sensitivity)
        by_layer |= found
    points = {name: check.measure(settings) for name, settings in by_layer.items()}
    uses = {"unrestricted": meter.uses(check.batch, None)}
    if points["floors by layer"]:  # none where more experts are guaranteed than the share leaves
        uses["chosen"] = meter.uses(check.batch, points["floors by layer"][0].setting)
    plain = {name: uniform[name] for name in ("lynx", ONE_FLOOR)}
    return {
        "batch": check.batch,
        "sequences": meter.sequences,
        "steps": meter.steps,
        "natural_active": [float(value) for value in natural.mean((1, 2))],
        "natural_p99": float(np.percentile(natural, 99)),
        "unrestricted": brief(check.measure([meter.unrestricted()])[0]),
        "floors": {"highest": floors.values[0], "lowest": floors.values[-1], "levels": len(floors.values)},
        "sensitivity": alone,
        "uniform": {name: [brief(item) for item in items] for name, items in uniform.items()},
        "by_layer": {name: [brief(item) for item in items] for name, items in points.items()},
        "ratios": {name: comparison(items, uniform) for name, items in points.items()},
        "at_half": {name: kl_at(items, mean / 2) for name, items in uniform.items()},
        "at_their_points": {name: comparison(uniform[name], plain) for name in PRESETS if name not in ("off", "lynx")},
        "one_floor": comparison(uniform[ONE_FLOOR], {"lynx": uniform["lynx"]}),
        "defaults": {name: brief(check.measure([tried])[0]) for name, tried in defaults(experts, width).items()},
        "uses": uses,
    }


def main(
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between them.")] = "4,16,64",
    shares: Annotated[str, typer.Option(help="Shares of the natural bytes at which to search by layer.")] = "0.5,0.7",
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = LENGTH,
    journal: Annotated[Path | None, typer.Option(help="Folder to go on in after an interruption.")] = None,
    seed: Annotated[int, typer.Option(help="Decides which text is drawn.")] = 0,
) -> None:
    """Measure every policy; one JSON file for each batch size."""
    probed = shipped()
    for size in (int(part) for part in batch.split(",")):
        count = max(64, 2 * size)
        meters = parts(probed, count, seed, length)
        identity = {"batch": size, "count": count, "seed": seed, "length": length, "prompt": PROMPT}
        log = Journal(journal / str(size), identity, resume=True) if journal else None
        halves = measured(meters, size, log)
        with Progress() as progress:
            update = progress.phase(f"Batch {size}")
            outcome = one_batch(
                halves.choose, halves.check, [float(part) for part in shares.split(",")], variants=size == 16
            )
            update(1.0)
        typer.echo(f"{record(f'calibration_policies_{size}', outcome)}")


if __name__ == "__main__":
    typer.run(main)
