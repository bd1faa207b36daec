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

from lynx_trt.calibration import plots

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PUBLISHED = ("lynx-latency", "lynx-accuracy", "lynx-affinity", "oea", "xshare")


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
    for name, items in study["by_layer"].items():
        rows += [(name, f"{item['active'][0]:.2f}", interval(item["kl"])) for item in items[:1]]
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
        for row in sorted(found, key=lambda row: float(row["active"])):
            rows.append((f"`{name}`", f"{row['active']:.2f}", number(row["by_layer_kl"][0]), number(row["kl"][0])))
            rows[-1] += (interval(row["ratio"]),)
    yield from table(("policy", "active", "its KL", "KL of `lynx` there", "its KL / `lynx`'s"), rows)


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
                    str(item["budgets"]) if "budgets" in name else "",
                )
            )
    columns = ("", "active", "p99", "KL", "KL p99", "same token", "bits a byte", "perplexity", "budgets")
    yield from table(columns, rows)


def sensitivity(study: dict[str, Any]) -> Iterator[str]:
    """Each layer alone."""
    found = study["sensitivity"]
    rows = [
        (str(layer), f"{natural:.1f}", *(number(value) for value in row))
        for layer, (row, natural) in enumerate(zip(found["kl"], found["natural"], strict=True))
    ]
    yield from table(("layer", "active by itself", *(str(b) for b in found["budgets"])), rows)


def draw(study: dict[str, Any]) -> None:
    """The pictures of one batch size."""
    batch, by_layer = study["batch"], study["by_layer"]
    shown = {
        **study,
        "uniform": {n: v for n, v in study["uniform"].items() if n in PUBLISHED or n == "lynx"},
        "frontier": by_layer["budgets by layer"],
        "others": {name: by_layer[name] for name in ("floors by layer",) if name in by_layer},
        "held_out": None,
    }
    IMAGES.mkdir(parents=True, exist_ok=True)
    (IMAGES / f"calibration-quality-{batch}.png").write_bytes(plots.png(plots.quality(shown)))
    if batch == 16:
        (IMAGES / f"calibration-sensitivity-{batch}.png").write_bytes(plots.png(plots.sensitivity(study)))
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
            str(row["budgets"]),
        )
        for row in rows
    ]
    yield from table(("promise", "seed", "active", "limit", "held-out text", "kept", "budgets"), cells)


def main() -> None:
    """Print every table that there are results for."""
    for batch in (4, 16, 64):
        study = read(f"calibration_policies_{batch}")
        if not study:
            continue
        draw(study)
        for part in (at_half, their_points, ratios, details, sensitivity):
            for line in part(study):
                typer.echo(line)
    found = read("calibration_promises")
    for line in promises(found) if found else ():
        typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
