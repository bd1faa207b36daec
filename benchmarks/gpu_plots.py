"""Plots of a recorded run, from its results.json alone.

    python benchmarks/gpu_plots.py FOLDER [-o FOLDER]

decode.png: a layer's time by batch, beside the floor. active.png: time by active experts at one batch. prefill.png: the
share of the matmul rate by tokens. select.png: the selection's time by tokens. model.png: tokens a second of a whole
model by batch. What was not recorded has no plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from gpu_targets import of, rows_of

mpl.use("Agg")

import matplotlib.pyplot as plt

NAMES = {
    "lynx": "LynxExperts",
    "lynx_layer": "LynxSelect + LynxExperts",
    "lynx_metadata": "LynxSelect with metadata",
    "grouped_mm": "transformers, grouped_mm",
    "dense": "all experts",
    "vllm": "vLLM's kernel",
    "sort": "sort and count (PyTorch)",
    "nothing": "without experts",
}
COLOURS = {
    **{"lynx": "#1b6ca8", "lynx_layer": "#7fb3d5", "lynx_metadata": "#1b6ca8"},
    **{"grouped_mm": "#c0392b", "dense": "#7f8c8d", "vllm": "#d68910", "sort": "#7f8c8d", "nothing": "#bdc3c7"},
}
Rows = Sequence[dict[str, Any]]


def panels(rows: Rows, draw: Callable[[Any, Rows, str], None], title: str, path: Path) -> Path | None:
    """A panel a model; None if there is nothing to draw."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    if not models:
        return None
    width = max(4.2 * len(models), 7.0)
    figure, axes = plt.subplots(1, len(models), figsize=(width, 3.8), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        draw(axis, [row for row in rows if row["model"] == model], model)
        axis.set_title(model)
        axis.grid(alpha=0.3)
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4 if len(models) > 1 else 2, fontsize=8
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def lines(axis: Any, rows: Rows, x: str, y: str, names: Sequence[str]) -> None:
    """A line a contender, with the percentiles where y is a time."""
    for name in names:
        points = sorted(of(rows, name), key=lambda row: row[x])
        if not points:
            continue
        at = [row[x] for row in points]
        axis.plot(at, [row[y] for row in points], marker="o", ms=3, label=NAMES[name], color=COLOURS[name])
        if y == "us":
            low, high = [row["p10"] for row in points], [row["p90"] for row in points]
            axis.fill_between(at, low, high, color=COLOURS[name], alpha=0.15, lw=0)


def doubling(axis: Any, values: Sequence[int]) -> None:
    """An x axis of powers of two, with the numbers themselves at it."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(values)), [str(value) for value in sorted(set(values))])
    axis.tick_params(axis="x", labelsize=8)


def decode(axis: Any, rows: Rows, _: str) -> None:
    """Time by batch at the natural number of experts."""
    natural = [row for row in rows if row["fraction"] == 1.0]
    lines(axis, natural, "tokens", "us", ("lynx", "lynx_layer", "grouped_mm", "vllm", "dense"))
    floor = sorted(of(natural, "lynx"), key=lambda row: row["tokens"])
    axis.plot(
        [r["tokens"] for r in floor], [r["floor_us"] for r in floor], "k--", lw=1, label="floor, by the copy bandwidth"
    )
    axis.set(yscale="log", xlabel="batch, tokens", ylabel="us a layer")
    doubling(axis, [row["tokens"] for row in natural])


def active(axis: Any, rows: Rows, _: str) -> None:
    """Time by active experts at batch 16."""
    some = [row for row in rows if row["tokens"] == 16]
    lines(axis, some, "active", "us", ("lynx", "lynx_layer", "grouped_mm", "vllm"))
    floor = sorted(of(some, "lynx"), key=lambda row: row["active"])
    axis.plot(
        [r["active"] for r in floor], [r["floor_us"] for r in floor], "k--", lw=1, label="floor, by the copy bandwidth"
    )
    axis.set(xlabel="active experts", ylabel="us a layer", xlim=(0, None), ylim=(0, None))


def prefill(axis: Any, rows: Rows, _: str) -> None:
    """The share of the measured matmul rate."""
    lines(axis, rows, "tokens", "matmul_share", ("lynx", "grouped_mm", "vllm", "dense"))
    axis.axhline(0.7, color="k", ls=":", lw=1)
    doubling(axis, [row["tokens"] for row in rows])
    axis.set(xlabel="tokens", ylabel="share of the measured matmul rate", ylim=(0, 1))


def select(axis: Any, rows: Rows, _: str) -> None:
    """The selection at half of the natural experts, by a budget."""
    half = [row for row in rows if row["fraction"] == 0.5 and row.get("by") != "floor"]
    lines(axis, half, "tokens", "us", ("lynx_metadata", "sort"))
    axis.axhline(12, color="k", ls=":", lw=1)
    doubling(axis, [row["tokens"] for row in half])
    axis.set(xlabel="tokens", ylabel="us", ylim=(0, None))


def model(axis: Any, rows: Rows, _: str) -> None:
    """Tokens a second by batch; ours by share of the active experts."""
    styles = {1.0: "-", 0.75: "--", 0.5: "-.", 0.25: ":"}
    for name in ("lynx", "vllm", "grouped_mm", "nothing"):
        for fraction, style in styles.items():
            found = sorted((row for row in of(rows, name) if row["fraction"] == fraction), key=lambda row: row["batch"])
            if not found:
                continue
            label = NAMES["lynx_layer"] + f", {fraction:.0%} of the experts" if name == "lynx" else NAMES[name]
            at = [row["batch"] for row in found], [row["tokens_per_second"] for row in found]
            axis.plot(*at, style, marker="o", ms=3, label=label, color=COLOURS[name])
    axis.set(yscale="log", xlabel="batch, sequences", ylabel="tokens a second")
    doubling(axis, [row["batch"] for row in rows])


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """All plots that there are rows for."""
    folder.mkdir(parents=True, exist_ok=True)
    about = results.get("environment") or {}
    gpu = about.get("gpu")
    where = gpu.get("name") if isinstance(gpu, dict) else gpu
    ending = f"{where}, commit {about.get('commit')}, {str(about.get('date'))[:10]}"
    drawn = [
        panels(rows_of(results["parts"], benchmark), draw, f"{title}; {ending}", folder / f"{name}.png")
        for name, benchmark, draw, title in (
            ("decode", "decode", decode, "an MoE layer in decode"),
            ("active", "decode", active, "batch 16 by active experts"),
            ("prefill", "prefill", prefill, "an MoE layer in prefill"),
            ("select", "select", select, "the selection alone"),
            ("model", "model", model, "decoding a whole model, PyTorch around the experts"),
        )
    ]
    return [path for path in drawn if path is not None]


def main() -> None:
    """Read, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where results.json is")
    parser.add_argument("-o", "--output", type=Path, help="where plots go (the same folder)")
    options = parser.parse_args()
    try:
        results = json.loads((options.folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {options.folder / 'results.json'} can't be read: {error}")
    for path in plot(results, options.output or options.folder):
        print(path)


if __name__ == "__main__":
    main()
