"""What a person reads: the tables on the terminal, and one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lynx_trt.console import size

if TYPE_CHECKING:
    from rich.table import Table

Rows = list[tuple[str, ...]]
# The share of a layer's own active experts at which layers are compared.
ALONE_AT = 0.7
# Two forwards of other shapes differ by this much in float32, also where nothing is restricted; it shows as 0.
ROUNDING = 1e-6


def _number(value: float) -> str:
    if abs(value) < ROUNDING:
        return "0"
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def _with_interval(interval: Sequence[float], form: str = "") -> str:
    def show(value: float) -> str:
        if form:
            return format(0.0 if abs(value) < ROUNDING else value, form)
        return _number(value)

    return f"{show(interval[0])} [{show(interval[1])}, {show(interval[2])}]"


def measured_on(result: dict[str, Any]) -> str:
    """In few words, the text that the numbers of a calibration are from."""
    if "dial" not in result:  # nothing was chosen, so there is nothing to hold out
        return "all of the text"
    return "validation text" if result["text"]["validation"] else "held-out text"


def about_text(result: dict[str, Any]) -> str:
    """One sentence: what that text is, and what it can't show; empty where nothing was chosen."""
    if "dial" not in result:
        return ""
    if result["text"]["validation"]:
        return f"Validation text is {result['text']['validation']['name']}; nothing was chosen on it."
    return (
        f"Held-out text is other parts of the same text ({result['text']['name']}); text of another kind may cost "
        "more: check the promise on yours with --validation-text."
    )


def promise_rows(study: dict[str, Any]) -> Rows:
    """Each part of the promise: what was promised, what the text shows, whether it is kept."""
    return [
        (
            check["name"],
            _number(check["limit"]),
            _number(check["value"]),
            "yes" if check["value"] <= check["limit"] else "NO",
        )
        for check in study["checks"]
    ]


def _shown(study: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    shown = [("all experts", study["unrestricted"])]
    chosen, shared = study["held_out"], study.get("shared")
    if chosen:
        shown.append((f"{'chosen' if 'search' in study else 'given'} {dial_of(chosen)}", chosen))
    if shared and any(shared[name] != chosen[name] for name in ("budgets", "floors")):
        shown.append(("shared by all batch sizes", shared))
    return shown


def dial_of(item: dict[str, Any]) -> str:
    """`floors` or `budgets`: what decides in a measurement."""
    return "floors" if any(item["floors"]) else "budgets"


def metric_columns(study: dict[str, Any]) -> list[str]:
    """What was measured, for the heads of `metric_rows`."""
    return ["", *(name for name, _ in _shown(study))]


def metric_rows(study: dict[str, Any], hardware: str) -> Rows:
    """Metrics in the columns of `metric_columns`; times are predicted for `hardware`."""
    shown = [item for _, item in _shown(study)]

    def row(label: str, name: str, form: str = "", factor: float = 1.0) -> tuple[str, ...]:
        return (label, *(_with_interval([value * factor for value in item[name]], form) for item in shown))

    return [
        row("experts active in a layer", "active", ".2f"),
        ("  their 99th percentile", *(f"{item['active_p99']:.0f}" for item in shown)),
        ("expert bytes a token", *(size(item["expert_bytes_a_token"][0]) for item in shown)),
        row(f"predicted step, {hardware}, ms", "step_seconds", ".4f", 1e3),
        row("bits a byte", "bits_a_byte", ".4f"),
        row("perplexity", "perplexity", ".3f"),
        row("perplexity increase, %", "perplexity_increase", ".2f", 100),
        row("KL to all experts", "kl"),
        row("  its 99th percentile", "kl_p99"),
        row("same likeliest token, %", "agreement", ".2f", 100),
    ]


def comparison_columns(study: dict[str, Any]) -> list[str]:
    """Heads of `comparison_rows`."""
    chosen = study["held_out"]
    ours = f"{dial_of(chosen)} by layer" if chosen else ""
    return ["at equal active experts", "KL", f"{ours} / this", "active, p99"]


def comparison_rows(study: dict[str, Any]) -> Rows:
    """Presets, the same in all layers, at the chosen number of active experts."""
    chosen = study["held_out"]
    if not chosen or not study.get("comparison"):
        return []
    names = ("budgets", "floors")
    at = [
        row
        for row in study["comparison"]
        if row["active"] == chosen["active"][0] and all(row[name] == chosen[name] for name in names)
    ]
    rows: Rows = [(f"{dial_of(chosen)} by layer", _with_interval(chosen["kl"]), "1", f"{chosen['active_p99']:.0f}")]
    rows += [
        (
            row["preset"] if "floor" in row["preset"] else f"{row['preset']}, uniform",
            _with_interval(row["kl"]),
            _with_interval(row["ratio"], ".2f"),
            f"{row['active_p99']:.0f}",
        )
        for row in at
    ]
    return rows


def chosen_rows(item: dict[str, Any]) -> Rows:
    """Each layer's floor and budget of a measurement, the experts that it used, on average and at most."""
    columns = zip(item["floors"], item["budgets"], item["active_by_layer"], item["active_max_by_layer"], strict=True)
    return [
        (str(layer), f"{floor:.4g}", str(budget), f"{active:.1f}", str(most))
        for layer, (floor, budget, active, most) in enumerate(columns)
    ]


CHOSEN_COLUMNS = ["layer", "floor", "budget (cap)", "active", "most of any step"]


def sensitivity_rows(study: dict[str, Any]) -> Rows:
    """KL of each layer restricted alone."""
    found = study["sensitivity"]
    return [
        (str(layer), f"{natural:.1f}", *(f"{value:.2g}" for value in row))
        for layer, (row, natural) in enumerate(zip(found["kl"], found["natural"], strict=True))
    ]


def most_sensitive(found: dict[str, Any]) -> str:
    """One sentence: which layers are the most and the least sensitive, where each saves the same share."""
    costs = [alone(found, layer) for layer in range(len(found["kl"]))]
    order = sorted(range(len(costs)), key=lambda layer: -costs[layer])
    third = max(1, len(order) // 3)
    top, least = order[0], order[-1]
    where = "a middle layer" if third <= top < len(order) - third else "an early layer" if top < third else "a late one"
    return (
        f"Restricted alone, to {ALONE_AT:.0%} of the experts that it uses by itself, layer {top} is the most sensitive "
        f"({where}, KL {costs[top]:.2g}) and layer {least} the least ({costs[least]:.2g})."
    )


def alone(found: dict[str, Any], layer: int) -> float:
    """KL of one layer alone at `ALONE_AT` of its natural active experts: log KL interpolated between its levels."""
    points = sorted(zip(found["active"][layer], found["kl"][layer], strict=True))
    wanted = ALONE_AT * found["natural"][layer]
    above = next((n for n, (active, _) in enumerate(points) if active >= wanted), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(above - 1, 0)], points[above]
    share = min(max((wanted - x0) / (x1 - x0), 0.0), 1.0) if x1 > x0 else 1.0
    return math.exp((1 - share) * math.log(max(y0, 1e-9)) + share * math.log(max(y1, 1e-9)))


def between_batches(study: dict[str, Any]) -> str:
    """One sentence: what the intervals leave out. Empty where nobody has looked, or there is nothing to say."""
    factor = study["company"]["kl"][0] if "company" in study else 1.0
    if factor <= 1:
        return ""
    return (
        f"Sequences that decode together share their experts, so that a whole batch does well or badly: KL varies from "
        f"batch to batch {factor:.1f} times as much as the spread of sequences has it. The choice leaves room for "
        "that; the intervals don't show it."
    )


def terminal_tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of every batch size."""
    text, hardware = measured_on(result), result["cost_model"]["name"]
    for study in result["batches"]:
        batch = study["batch"]
        yield _terminal_table(f"Batch of {batch}, {text}", metric_columns(study), metric_rows(study, hardware))
        if study["held_out"]:
            yield _terminal_table(f"Batch of {batch}, by layer", CHOSEN_COLUMNS, chosen_rows(study["held_out"]))
        if study["checks"]:
            title = f"Batch of {batch}, the promise"
            yield _terminal_table(title, ["", "limit", text, "kept"], promise_rows(study))
        if comparison_rows(study):
            yield _terminal_table(f"Batch of {batch}, compared", comparison_columns(study), comparison_rows(study))


def _terminal_table(title: str, columns: list[str], rows: Rows) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.2rem}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
figure{margin:1rem 0}figcaption{color:#555;font-size:.9rem}
td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}
img{max-width:100%;height:auto}.kept{color:#00664a}.broken{color:#b00020}code{background:#f3f3f3;padding:0 .2rem}
"""


def page(result: dict[str, Any], plots: dict[str, bytes]) -> str:
    """The whole report as one HTML page with the plots inside."""
    model, text = result["model"], result["text"]
    parts = [
        f"<h1>Calibration of {escape(model['name'])}</h1>",
        f"<p>{escape(model['architecture'])}: {model['moe_layers']} MoE layers of {model['experts']} experts, "
        f"{model['experts_per_token']} a token. Text: {escape(text['name'])} ({size(text['bytes'])}), "
        f"{text['sequences']} sequences of {text['length']} tokens, {text['prompt']} of them prefill with all experts"
        f"{escape(_use_of_text(result))}. Times are predictions for {escape(result['cost_model']['name'])}.</p>",
        _verdict(result),
    ]
    for study in result["batches"]:
        parts += _batch(result, study, plots)
    parts.append(
        f"<p>Made {escape(result['created'])} with seed {result['seed']}; "
        f"{escape(', '.join(f'{name} {version}' for name, version in result['versions'].items()))}. "
        "Intervals are 95%, by bootstrap over sequences. All numbers are in <code>calibration.json</code>.</p>"
    )
    title = f"Calibration of {escape(model['name'])}"
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _verdict(result: dict[str, Any]) -> str:
    found = ""
    if result["budgets"]:
        floors = f" Floors: <code>{escape(str(result['floors']))}</code>." if any(result["floors"]) else ""
        found = f"{floors} Budgets: <code>{escape(str(result['budgets']))}</code>."
    if result["promise"] is None:
        return f"<p>Nothing was promised.{found}</p>"
    kept = result["kept"]
    words = f"is kept on {measured_on(result)}." if kept else f"is NOT kept: {result['reason']}."
    text = f" {escape(about_text(result))}" if kept else ""
    said = f"<b>{escape(result['promise']['text'])} {escape(words)}</b>{text}{found}"
    return f'<p class="{"kept" if kept else "broken"}">{said}</p>'


def _use_of_text(result: dict[str, Any]) -> str:
    validation = result["text"]["validation"]
    if validation:
        return (
            f"; half to choose on, half to check on, which are of other text: {validation['name']} "
            f"({size(validation['bytes'])})"
        )
    return "; half to choose on, half held out" if "dial" in result else ""


def _batch(result: dict[str, Any], study: dict[str, Any], plots: dict[str, bytes]) -> list[str]:
    batch, text = study["batch"], measured_on(result)
    parts = [f"<h2>Batch of {batch}</h2>"]
    if study["held_out"]:
        parts.append(_table(CHOSEN_COLUMNS, chosen_rows(study["held_out"])))
    if study["checks"]:
        parts.append(_table(["promise", "limit", text, "kept"], promise_rows(study)))
    parts.append(_table(metric_columns(study), metric_rows(study, result["cost_model"]["name"])))
    if between_batches(study):
        parts.append(f"<p>{escape(between_batches(study))}</p>")
    captions = {
        f"quality-{batch}": f"KL against active experts, {text}: presets, the same in all layers, and layer by layer",
        f"sensitivity-{batch}": "KL of each layer restricted alone, on the text to choose on",
        f"uses-{batch}": f"Tokens at each expert within a batch, the busiest expert first, {text}",
    }
    for name, caption in captions.items():
        if name not in plots:
            continue
        if name.startswith("sensitivity"):
            parts.append(f"<p>{escape(most_sensitive(study['sensitivity']))}</p>")
        data = base64.b64encode(plots[name]).decode()
        image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{escape(caption)}.</figcaption></figure>")
    if comparison_rows(study):
        parts.append(_table(comparison_columns(study), comparison_rows(study)))
    if "sensitivity" not in study:
        return parts
    values = [f"{value:g}" for value in study["sensitivity"]["values"]]
    parts.append(_table(["layer", "active by itself", *values], sensitivity_rows(study)))
    return parts


def _table(columns: list[str], rows: Rows) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
