"""Three pictures of a calibration, drawn from `calibration.json`'s content and nothing else."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lynx_trt.selection import DEFAULT_PRESET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
# Okabe & Ito's colours, which colour-blind readers can tell apart; markers differ as well, for print.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2")
MARKERS = ("s", "^", "v", "D", "P", "X")
OURS = "#000000"
ONE_FLOOR = f"{DEFAULT_PRESET}, one floor"  # among the policies compared: the default preset, one floor for all layers
LEAST_KL = 1e-6


def all_plots(study: dict[str, Any]) -> dict[str, bytes]:
    """Every plot of one batch size as PNG, by file name without its end."""
    batch = study["batch"]
    plots = {f"sensitivity-{batch}": png(sensitivity(study)), f"uses-{batch}": png(uses(study))}
    if study["uniform"]:
        plots = {f"quality-{batch}": png(quality(study)), **plots}
    return plots


def png(figure: Figure) -> bytes:
    """A figure as PNG, without the date that would make every run differ."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def quality(study: dict[str, Any]) -> Figure:
    """KL against active experts: presets, the same in all layers, and what layers differ in (`others`: more of it)."""
    figure, axes = _figure(7.2, 4.6)
    others = [name for name in study["uniform"] if not name.startswith(DEFAULT_PRESET + ",") and name != DEFAULT_PRESET]
    for number, name in enumerate(others):
        style = {"color": COLOURS[number % 6], "marker": MARKERS[number % 6], "alpha": 0.9}
        _line(axes, study["uniform"][name], f"{name}, uniform", style)
    if DEFAULT_PRESET in study["uniform"]:
        style = {"color": OURS, "marker": "o", "linestyle": "--", "markerfacecolor": "white"}
        _line(axes, study["uniform"][DEFAULT_PRESET], f"{DEFAULT_PRESET}, uniform", style)
    if ONE_FLOOR in study["uniform"]:
        style = {"color": OURS, "marker": "*", "linestyle": ":", "markerfacecolor": "white", "markersize": 8}
        _line(axes, study["uniform"][ONE_FLOOR], ONE_FLOOR, style)
    by_layer = {"color": OURS, "marker": "o", "linewidth": 2.2}
    _line(axes, study["frontier"], f"{study['sensitivity']['dial']} by layer", by_layer)
    for number, (name, items) in enumerate(study.get("others", {}).items()):
        style = {"color": COLOURS[-1 - number], "marker": "*", "markersize": 8, "linewidth": 2.2}
        _line(axes, items, name, style)
    if study["held_out"]:
        item = study["held_out"]
        at = (item["active"][0], max(item["kl"][0], 1e-9))
        axes.plot(*at, marker="*", markersize=17, color="#D55E00", zorder=5)
        axes.annotate("chosen", at, textcoords="offset points", xytext=(-10, -8), ha="right", va="top")
    natural = study["unrestricted"]["active"][0]
    axes.axvline(natural, color="grey", linewidth=1, linestyle=":")
    axes.annotate(
        "unrestricted", (natural, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right"
    )
    axes.set_yscale("log")
    axes.set_xlabel(f"experts active in a layer, mean (batch of {study['batch']})")
    axes.set_ylabel("KL to the unrestricted model, nats a token")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(fontsize=8, framealpha=0.9)
    return figure


def _line(axes: Axes, items: Sequence[dict[str, Any]], label: str, style: dict[str, Any]) -> None:
    # What changes nothing has no place on a logarithmic axis.
    ordered = sorted((item for item in items if item["kl"][0] > LEAST_KL), key=lambda item: item["active"][0])
    x = [item["active"][0] for item in ordered]
    y = [max(item["kl"][0], 1e-9) for item in ordered]
    low = [value - max(item["kl"][1], 1e-10) for value, item in zip(y, ordered, strict=True)]
    high = [item["kl"][2] - value for value, item in zip(y, ordered, strict=True)]
    errors = [[max(value, 0.0) for value in side] for side in (low, high)]
    options = {"linewidth": 1.3, "markersize": 5, "capsize": 2, "elinewidth": 0.8, **style}
    axes.errorbar(x, y, yerr=errors, label=label, **options)


def sensitivity(study: dict[str, Any]) -> Figure:
    """Heat map, layer x floor or budget: the KL of each layer restricted alone."""
    import numpy as np
    from matplotlib.colors import LogNorm

    found = study["sensitivity"]
    values = np.array(found["kl"])
    layers, rungs = values.shape
    figure, axes = _figure(max(5.0, 1.6 + 0.75 * rungs), min(12.0, max(2.6, 1.4 + 0.42 * layers)))
    positive = values[values > 1e-9]
    norm = LogNorm(positive.min(), positive.max()) if positive.size and positive.min() < positive.max() else None
    image = axes.imshow(np.maximum(values, 1e-9), aspect="auto", cmap="viridis", norm=norm)
    axes.set_xticks(range(rungs), [f"{value:.3g}" for value in found["values"]])
    step = max(1, layers // 16)
    axes.set_yticks(range(0, layers, step), [str(layer) for layer in range(0, layers, step)])
    axes.set_xlabel(f"{found['dial'][:-1]} of this layer alone (batch of {study['batch']})")
    axes.set_ylabel("MoE layer")
    if values.size <= 120:
        limit = float(np.exp(np.log(np.maximum(values, 1e-9)).mean())) if values.size else 0.0
        for layer in range(layers):
            for rung in range(rungs):
                colour = "white" if values[layer, rung] < limit else "black"
                text = f"{values[layer, rung]:.1g}" if values[layer, rung] > 1e-9 else "0"
                axes.text(rung, layer, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label="KL, nats a token")
    return figure


def uses(study: dict[str, Any]) -> Figure:
    """Experts' use within a batch: tokens at the busiest expert, the second, and so on, mean over steps and layers."""
    import numpy as np

    figure, axes = _figure(7.2, 3.6)
    for label, colour in (("unrestricted", "#56B4E9"), ("chosen", OURS)):
        if label not in study["uses"]:
            continue
        rows = np.array(study["uses"][label])
        ranks = np.arange(1, rows.shape[1] + 1)
        axes.plot(ranks, rows.mean(0), color=colour, marker=".", label=label)
        axes.fill_between(ranks, rows.min(0), rows.max(0), color=colour, alpha=0.2, linewidth=0)
    width = sum(study["uses"]["unrestricted"][0])
    count = len(study["uses"]["unrestricted"][0])
    axes.axhline(width / count, color="grey", linestyle=":", linewidth=1, label="if all were used alike")
    axes.set_xlabel("experts of a layer, the busiest first (band: from layer to layer)")
    axes.set_ylabel(f"tokens of {study['batch']}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(fontsize=8)
    return figure
