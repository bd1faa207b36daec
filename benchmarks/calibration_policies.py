"""Which policy costs the least quality at equal active experts, on the shipped model?

Every preset with uniform budgets, variants of the default, budgets by layer, and floors (a policy that artifacts don't
have: an expert is kept if it has enough votes, however many others have too). Budgets and floors by layer are searched
for on one half of the text; every number is from the other half.

    python benchmarks/calibration_policies.py --batch 16 --journal out/policies
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from calibration_common import LENGTH, PROMPT, RESULTS, brief, parts, record, shipped

from lynx_trt.calibration.journal import Journal, Measured
from lynx_trt.calibration.model import Setting
from lynx_trt.calibration.search import Search, Sensitivity, curves, ladder, measure_sensitivity
from lynx_trt.calibration.study import bytes_goal, comparison, kl_at, uniform_settings
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
# Level n of the floors' dial is TOP * RATIO ** n votes a voting token; level E is no floor.
TOP, RATIO = 0.0375, 0.82
UNIFORM_LEVELS = (6, 8, 10, 12, 14, 17, 20)
FLOOR_RUNGS = [0, 3, 6, 9, 12, 15, 18, 21, 25]

Make = Callable[[tuple[int, ...]], Setting]


def floors(experts: tuple[int, ...]) -> Make:
    """The dial of floors: a level for each layer."""

    def make(levels: tuple[int, ...]) -> Setting:
        values = (0.0 if n >= count else TOP * RATIO**n for n, count in zip(levels, experts, strict=True))
        return Setting(LYNX, experts, tuple(values))

    return make


def budgets(_: tuple[int, ...]) -> Make:
    """The dial that artifacts have."""
    return lambda chosen: Setting(LYNX, chosen)


def search(
    choose: Measured, dial: str, natural: Any, shares: Sequence[float]
) -> tuple[Sensitivity, dict[str, list[Setting]]]:
    """Sensitivity, and the best settings by layer at `shares` of the natural bytes, measured alone and together."""
    meter, experts = choose.meter, choose.meter.probed.experts
    means, most = natural.mean((1, 2)), natural.max((1, 2))
    make = (budgets if dial == "budgets" else floors)(experts)
    rungs = ladder([float(v) for v in means], experts, 0) if dial == "budgets" else FLOOR_RUNGS
    top = [int(value) for value in most] if dial == "budgets" else list(experts)
    sensitivity = measure_sensitivity(choose, make, experts, rungs, means)
    found: dict[str, list[Setting]] = {f"{dial} by layer, measured alone": [], f"{dial} by layer": []}
    for share, (name, rounds) in itertools.product(shares, zip(found, (0, 2), strict=True)):
        limit = share * meter.cost.bytes_of_experts([float(v) for v in means]) / choose.batch
        model = curves(sensitivity, experts, top, meter.cost.expert_bytes)
        outcome = Search(choose, make, model, bytes_goal(limit), experts).run(rounds, polish=rounds > 0)
        found[name] += [outcome.best.setting] if outcome.best else []
    return sensitivity, found


def one_batch(choose: Measured, check: Measured, shares: Sequence[float], *, variants: bool) -> dict[str, Any]:
    """Everything for one batch size."""
    meter = check.meter
    natural = check.meter.natural(check.batch)
    mean = float(natural.mean())
    experts, width = meter.probed.experts, meter.probed.layers[0].experts_per_token
    uniform = {name: check.measure(uniform_settings(name, experts, width, mean)) for name in PRESETS if name != "off"}
    # Down to what is guaranteed alone, so that there is a number for every point that another policy reaches.
    uniform["lynx"] += check.measure([Setting(LYNX, (0,) * len(experts))])
    own = choose.meter.natural(choose.batch)
    alone, by_layer = search(choose, "budgets", own, shares)
    if variants:
        plain = uniform_settings("lynx", experts, width, mean)
        for name, selection in VARIANTS.items():
            uniform[name] = check.measure([replace(setting, selection=selection) for setting in plain])
        level = floors(experts)
        uniform["floor"] = check.measure([level((n,) * len(experts)) for n in UNIFORM_LEVELS])
        by_layer |= search(choose, "floors", own, shares)[1]
    points = {name: check.measure(settings) for name, settings in by_layer.items()}
    uses = {"unrestricted": meter.uses(check.batch, None)}
    if points["budgets by layer"]:  # none where more experts are guaranteed than the share leaves
        uses["chosen"] = meter.uses(check.batch, points["budgets by layer"][0].setting)
    return {
        "batch": check.batch,
        "sequences": meter.sequences,
        "steps": meter.steps,
        "natural_active": [float(value) for value in natural.mean((1, 2))],
        "natural_p99": float(np.percentile(natural, 99)),
        "unrestricted": brief(check.measure([meter.unrestricted()])[0]),
        "sensitivity": asdict(alone),
        "uniform": {name: [brief(item) for item in items] for name, items in uniform.items()},
        "by_layer": {name: [brief(item) for item in items] for name, items in points.items()},
        "ratios": {name: comparison(items, uniform) for name, items in points.items()},
        "at_half": {name: kl_at(items, mean / 2) for name, items in uniform.items()},
        "at_their_points": {
            name: comparison(uniform[name], {"lynx": uniform["lynx"]})
            for name in PRESETS
            if name not in ("off", "lynx")
        },
        "uses": uses,
        "transfer": transfer(check),
    }


def transfer(check: Measured) -> dict[str, list[dict[str, Any]]]:
    """What was found by layer for batches of 16, at this batch size."""
    path = RESULTS / "calibration_policies_16.json"
    if check.batch == 16 or not path.is_file():
        return {}
    found = json.loads(path.read_text())["results"]["by_layer"]
    kinds = {name: items for name, items in found.items() if "alone" not in name}
    settings = {
        name: [Setting(LYNX, tuple(i["budgets"]), tuple(i["floors"]) if i["floors"] else None) for i in items]
        for name, items in kinds.items()
    }
    return {name: [brief(item) for item in check.measure(tried)] for name, tried in settings.items()}


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
        meters = parts(probed, count, seed, length)[:2]
        identity = {"batch": size, "count": count, "seed": seed, "length": length, "prompt": PROMPT}
        log = Journal(journal / str(size), identity, resume=True) if journal else None
        choose, check = (
            Measured(part, size, name, log) for part, name in zip(meters, ("choose", "check"), strict=True)
        )
        with Progress() as progress:
            update = progress.phase(f"Batch {size}")
            outcome = one_batch(choose, check, [float(part) for part in shares.split(",")], variants=size == 16)
            update(1.0)
        typer.echo(f"{record(f'calibration_policies_{size}', outcome)}")


if __name__ == "__main__":
    typer.run(main)
