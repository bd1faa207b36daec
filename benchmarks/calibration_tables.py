"""The tables and pictures of docs/calibration.md, from the recorded results and nothing else.

python benchmarks/calibration_tables.py > tables.md     # and the pictures into docs/images/
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from calibration_common import RESULTS

from lynx_trt.calibration import plots, report
from lynx_trt.calibration.plots import ONE_FLOOR

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PUBLISHED = ("lynx-latency", "lynx-accuracy", "lynx-affinity", "oea", "xshare")
OURS = ("lynx", ONE_FLOOR)


def read(name: str) -> Any:
    """Results of one benchmark, or None if it has not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.is_file() else None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.3g}" if value < 1 else f"{value:.2f}"


def interval(values: Sequence[float]) -> str:
    """A number with its interval."""
    return f"{number(values[0])} ({number(values[1])} to {number(values[2])})"


def at_half(study: dict[str, Any]) -> Iterator[str]:
    """Uniform policies at half of the natural active experts, and what is searched for by layer."""
    natural = sum(study["natural_active"]) / len(study["natural_active"])
    rows = [
        (f"`{name}`" if name in PUBLISHED or name == "lynx" else name, f"{natural / 2:.2f}", interval(value))
        for name, value in study["at_half"].items()
        if value
    ]
    missing = [name for name, value in study["at_half"].items() if not value]
    yield f"Batch of {study['batch']}; {natural:.2f} of 32 experts active by themselves.\n"
    yield from table(("policy", "active", "KL, nats a token"), rows)
    if missing:
        yield f"Not reached by: {', '.join(missing)}.\n"


def ratios(study: dict[str, Any]) -> Iterator[str]:
    """KL by layer over each uniform policy's, at equal active experts."""
    names = [name for name in study["by_layer"] if "alone" not in name]
    for name in names:
        rows = study["ratios"][name]
        points = sorted({row["active"] for row in rows})
        policies = [p for p in study["uniform"] if any(row["preset"] == p for row in rows)]
        cells = [
            (
                policy,
                *(
                    next((interval(r["ratio"]) for r in rows if r["active"] == at and r["preset"] == policy), "-")
                    for at in points
                ),
            )
            for policy in policies
        ]
        yield from table((f"{name} / this", *(f"at {at:.2f}" for at in points)), cells)


def their_points(study: dict[str, Any]) -> Iterator[str]:
    """Each published policy where it is by itself, with uniform budgets, against the default preset there."""
    rows = []
    for name, found in study["at_their_points"].items():
        for active in sorted({row["active"] for row in found}):
            at = {row["preset"]: row for row in found if row["active"] == active}
            own = next(iter(at.values()))["by_layer_kl"][0]
            ratios = [interval(at[ours]["ratio"]) if ours in at else "-" for ours in OURS]
            rows.append((f"`{name}`", f"{active:.2f}", number(own), *ratios))
    yield from table(("policy", "active", "its KL", "/ `lynx`, uniform budget", f"/ `{ONE_FLOOR}`"), rows)


def one_floor(study: dict[str, Any]) -> Iterator[str]:
    """One floor for all layers against one budget for all layers."""
    points = {item["active"][0]: item for item in study["uniform"][ONE_FLOOR]}
    rows = []
    for row in sorted(study["one_floor"], key=lambda row: float(row["active"])):
        item = min(points.items(), key=lambda pair: abs(pair[0] - row["active"]))[1]
        cells = (f"{row['active']:.2f}", f"{item['floors'][0]:.3g}", number(item["kl"][0]), interval(row["ratio"]))
        rows.append((*cells, f"{item['active_p99']:.0f} / {row['active_p99']:.0f}"))
    yield from table(("active", "floor", "KL", "/ `lynx`, uniform budget", "p99 of active, floor / budget"), rows)


def defaults(study: dict[str, Any]) -> Iterator[str]:
    """What an artifact could begin with."""
    rows = [
        (
            name,
            f"{max(item['floors']):.3g}" if max(item["floors"]) else str(item["budgets"][0]),
            f"{item['active'][0]:.2f}",
            f"{item['active_p99']:.0f}",
            interval(item["kl"]),
            f"{100 * item['agreement'][0]:.1f}%",
        )
        for name, item in study["defaults"].items()
    ]
    yield from table(("default", "value", "active", "p99", "KL", "same token"), rows)


def details(study: dict[str, Any]) -> Iterator[str]:
    """Every metric of what was found by layer."""
    rows = []
    for name, items in {"all experts": [study["unrestricted"]], **study["by_layer"]}.items():
        for item in items:
            rows.append(
                (
                    name,
                    f"{item['active'][0]:.2f}",
                    f"{item['active_p99']:.0f}",
                    number(item["kl"][0]),
                    number(item["kl_p99"][0]),
                    f"{100 * item['agreement'][0]:.1f}%",
                    f"{item['bits_a_byte'][0]:.4f}",
                    f"{100 * item['perplexity_increase'][0]:.2f}%",
                    str(item["budgets"]) if "by layer" in name else "",
                    ", ".join(f"{value:.2g}" for value in item["floors"]) if "floors" in name else "",
                )
            )
    columns = ("", "active", "p99", "KL", "KL p99", "same token", "bits a byte", "perplexity", "budgets", "floors")
    yield from table(columns, rows)


def sensitivity(study: dict[str, Any]) -> Iterator[str]:
    """Each layer alone, for both dials; then at the same share of its own experts."""
    for name, found in study["sensitivity"].items():
        rows = [
            (str(layer), f"{natural:.1f}", *(number(value) for value in row))
            for layer, (row, natural) in enumerate(zip(found["kl"], found["natural"], strict=True))
        ]
        values = (f"{value:.3g}" for value in found["values"])
        yield from table((f"layer alone, {name}", "active by itself", *values), rows)
        costs = [f"{layer}: {number(report.alone(found, layer))}" for layer in range(len(rows))]
        yield f"At {report.ALONE_AT:.0%} of its own experts: {', '.join(costs)}. {report.most_sensitive(found)}\n"


def draw(study: dict[str, Any]) -> None:
    """The pictures of one batch size."""
    batch, by_layer = study["batch"], study["by_layer"]
    shown = {
        **study,
        "uniform": {n: v for n, v in study["uniform"].items() if n in (*PUBLISHED, *OURS)},
        "sensitivity": study["sensitivity"]["floors"],
        "frontier": by_layer["floors by layer"],
        "others": {"budgets by layer": by_layer["budgets by layer"]},
        "held_out": None,
    }
    IMAGES.mkdir(parents=True, exist_ok=True)
    (IMAGES / f"calibration-quality-{batch}.png").write_bytes(plots.png(plots.quality(shown)))
    if batch == 16:
        (IMAGES / f"calibration-sensitivity-{batch}.png").write_bytes(plots.png(plots.sensitivity(shown)))
        (IMAGES / f"calibration-uses-{batch}.png").write_bytes(plots.png(plots.uses(study)))


def promises(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Targets and seeds."""
    cells = [
        (
            row["target"],
            str(row["seed"]),
            f"{row['active']:.2f} of {row['natural']:.2f}",
            number(row["limit"]),
            number(row["held_out"]),
            "yes" if row["kept"] else "NO",
            ", ".join(f"{1e3 * value:.3g}" for value in row["floors"]),
            str(row["budgets"]),
        )
        for row in rows
        if "held_out" in row
    ]
    yield from table(("promise", "seed", "active", "limit", "held-out text", "kept", "1000 x floors", "caps"), cells)
    yield from (f"Nothing found: {row}" for row in rows if "held_out" not in row)


def other_text(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What was chosen on one kind of text, on every kind: the promised number, or NO before one that is too high."""
    kinds = list(dict.fromkeys(row["chosen_on"] for row in rows))
    cells = []
    pairs = dict.fromkeys((row["target"], row["chosen_on"]) for row in rows)
    targets = list(dict.fromkeys(target for target, _ in pairs))
    for target, source in sorted(pairs, key=lambda pair: targets.index(pair[0])):
        at = {row["checked_on"]: row for row in rows if (row["target"], row["chosen_on"]) == (target, source)}
        active = f"{at[source]['active']:.2f} of {at[source]['natural']:.2f}"
        found = [("" if at[kind]["kept"] else "NO, ") + f"{at[kind]['value']:.3g}" for kind in kinds]
        cells.append((target, source, active, *found))
    yield from table(("promise", "chosen on", "active there", *(f"on {kind}" for kind in kinds)), cells)


def batches(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What was found at one batch size, used at the others."""
    sizes = list(dict.fromkeys(row["used_at"] for row in rows))
    for dial in dict.fromkeys(row["dial"] for row in rows):
        own = [row for row in rows if row["dial"] == dial]
        cells = []
        for source in dict.fromkeys(row["found_at"] for row in own):
            at = {row["used_at"]: row for row in own if row["found_at"] == source}
            found = [f"{at[size]['active'][0]:.2f}, {number(at[size]['kl'][0])}" for size in sizes]
            cells.append((str(source), *found))
        heads = (f"at {size}: active, KL" for size in sizes)
        yield from table((f"{dial} found at", *heads), cells)


def costs(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What calibrating takes."""
    cells = [
        (
            " ".join(row["options"]),
            str(row["settings"]),
            f"{row['seconds']:.0f}",
            f"{row['milliseconds_a_setting_and_sequence']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
        )
        for row in rows
    ]
    yield from table(("options", "settings", "seconds", "ms a setting and sequence", "peak memory"), cells)


def main() -> None:
    """Print every table that there are results for."""
    for batch in (4, 16, 64):
        study = read(f"calibration_policies_{batch}")
        if not study:
            continue
        draw(study)
        for part in (at_half, one_floor, their_points, ratios, details, defaults, sensitivity):
            for line in part(study):
                typer.echo(line)
    for name, tabulate in (
        ("calibration_promises", promises),
        ("calibration_promises_witness", promises),
        ("calibration_promises_budgets", promises),
        ("calibration_other_text", other_text),
        ("calibration_batches", batches),
        ("calibration_cost", costs),
    ):
        found = read(name)
        for line in tabulate(found) if found else ():
            typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
