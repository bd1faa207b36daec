"""What a person reads: the tables on the terminal, and one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lynx_trt.console import size

if TYPE_CHECKING:
    from rich.table import Table

Rows = list[tuple[str, ...]]


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def _with_interval(interval: Sequence[float], form: str = "") -> str:
    def show(value: float) -> str:
        return format(value, form) if form else _number(value)

    return f"{show(interval[0])} [{show(interval[1])}, {show(interval[2])}]"


def promise_rows(study: dict[str, Any]) -> Rows:
    """Each part of the promise: what was promised, what held-out text shows, whether it is kept."""
    return [
        (
            check["name"],
            _number(check["limit"]),
            _number(check["value"]),
            "yes" if check["value"] <= check["limit"] else "NO",
        )
        for check in study["checks"]
    ]


def metric_rows(study: dict[str, Any]) -> Rows:
    """Metrics on held-out text: all experts, and the chosen budgets."""
    free, chosen = study["unrestricted"], study["held_out"]
    shown = [free, chosen] if chosen else [free]

    def row(label: str, name: str, form: str = "", factor: float = 1.0) -> tuple[str, ...]:
        return (label, *(_with_interval([value * factor for value in item[name]], form) for item in shown))

    return [
        row("experts active in a layer", "active", ".2f"),
        ("  99th percentile", *(f"{item['active_p99']:.0f}" for item in shown)),
        ("expert bytes a token", *(size(item["expert_bytes_a_token"][0]) for item in shown)),
        row("predicted step, ms", "step_seconds", ".4f", 1e3),
        row("bits a byte", "bits_a_byte", ".4f"),
        row("perplexity", "perplexity", ".3f"),
        row("perplexity increase, %", "perplexity_increase", ".2f", 100),
        row("KL to all experts", "kl"),
        row("  99th percentile", "kl_p99"),
        row("same likeliest token, %", "agreement", ".2f", 100),
    ]


def comparison_rows(study: dict[str, Any]) -> Rows:
    """Presets with uniform budgets at the chosen number of active experts."""
    chosen = study["held_out"]
    if not chosen or "comparison" not in study:
        return []
    at = [
        row
        for row in study["comparison"]
        if row["active"] == chosen["active"][0] and row["budgets"] == chosen["budgets"]
    ]
    rows: Rows = [("budgets by layer", _with_interval(chosen["kl"]), "1")]
    rows += [
        (f"{row['preset']}, uniform", _with_interval(row["kl"]), _with_interval(row["ratio"], ".2f")) for row in at
    ]
    return rows


def sensitivity_rows(study: dict[str, Any]) -> Rows:
    """KL of each layer restricted alone."""
    found = study["sensitivity"]
    return [
        (str(layer), f"{natural:.1f}", *(f"{value:.2g}" for value in row))
        for layer, (row, natural) in enumerate(zip(found["kl"], found["natural"], strict=True))
    ]


def most_sensitive(study: dict[str, Any]) -> str:
    """One sentence: which layers are the most and the least sensitive, at the budget nearest to half."""
    found = study["sensitivity"]
    half = sum(found["natural"]) / len(found["natural"]) / 2
    rung = min(range(len(found["budgets"])), key=lambda number: abs(found["budgets"][number] - half))
    order = sorted(range(len(found["kl"])), key=lambda layer: -found["kl"][layer][rung])
    third = max(1, len(order) // 3)
    middle = range(third, len(order) - third)
    top = order[0]
    where = "a middle layer" if top in middle else "an early layer" if top < third else "a late layer"
    return (
        f"At a budget of {found['budgets'][rung]} for one layer alone, layer {top} is the most sensitive ({where}, KL "
        f"{found['kl'][top][rung]:.2g}) and layer {order[-1]} the least ({found['kl'][order[-1]][rung]:.2g})."
    )


def between_batches(study: dict[str, Any]) -> str:
    """One sentence: what the intervals leave out. Empty where nobody has looked, or there is nothing to say."""
    factor = study["company"]["kl"][0] if "company" in study else 1.0
    if factor <= 1:
        return ""
    return (
        f"Sequences that decode together share their experts, so that a whole batch does well or badly: KL varies from "
        f"batch to batch {factor:.1f} times as much as the spread of sequences has it. The budgets leave room for "
        "that; the intervals don't show it."
    )


def terminal_tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of every batch size."""
    for study in result["batches"]:
        batch = study["batch"]
        columns = ["", "all experts", *(["chosen budgets"] if study["held_out"] else [])]
        yield _terminal_table(f"Batch of {batch}, held-out text", columns, metric_rows(study))
        if study["checks"]:
            title = f"Batch of {batch}, the promise"
            yield _terminal_table(title, ["", "limit", "held-out text", "kept"], promise_rows(study))
        if comparison_rows(study):
            title = f"Batch of {batch}, at equal active experts"
            yield _terminal_table(title, ["", "KL", "budgets by layer / this"], comparison_rows(study))


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
        f"{text['sequences']} sequences of {text['length']} tokens, {text['prompt']} of them prefill with all experts; "
        f"half to choose on, half held out. Times are predictions for {escape(result['cost_model']['name'])}.</p>",
        _verdict(result),
    ]
    for study in result["batches"]:
        parts += _batch(study, plots)
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
    if result["promise"] is None:
        return f"<p>Nothing was promised. Budgets: <code>{escape(str(result['budgets']))}</code>.</p>"
    kept = result["kept"]
    budgets = f" Budgets: <code>{escape(str(result['budgets']))}</code>." if result["budgets"] else ""
    words = "is kept on held-out text" if kept else "is NOT kept"
    return (
        f'<p class="{"kept" if kept else "broken"}"><b>{escape(result["promise"]["text"])}: {words}.</b>{budgets}</p>'
    )


def _batch(study: dict[str, Any], plots: dict[str, bytes]) -> list[str]:
    batch = study["batch"]
    columns = ["", "all experts", *(["chosen budgets"] if study["held_out"] else [])]
    parts = [f"<h2>Batch of {batch}</h2>"]
    if study["held_out"]:
        parts.append(f"<p>Chosen budgets, layer by layer: <code>{escape(str(study['held_out']['budgets']))}</code></p>")
        parts.append(_table(["promise", "limit", "held-out text", "kept"], promise_rows(study)))
    parts.append(_table(columns, metric_rows(study)))
    if between_batches(study):
        parts.append(f"<p>{escape(between_batches(study))}</p>")
    captions = {
        f"quality-{batch}": "KL against active experts, for every preset with uniform budgets and for budgets by layer",
        f"sensitivity-{batch}": "KL of each layer restricted alone, by budget",
        f"uses-{batch}": "Tokens at each expert within a batch, the busiest expert first",
    }
    for name, caption in captions.items():
        if name not in plots:
            continue
        if name.startswith("sensitivity"):
            parts.append(f"<p>{escape(most_sensitive(study))}</p>")
        data = base64.b64encode(plots[name]).decode()
        parts.append(f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>')
    if comparison_rows(study):
        parts.append(_table(["at equal active experts", "KL", "budgets by layer / this"], comparison_rows(study)))
    if "sensitivity" not in study:
        return parts
    budgets = [str(budget) for budget in study["sensitivity"]["budgets"]]
    parts.append(_table(["layer", "active by itself", *budgets], sensitivity_rows(study)))
    return parts


def _table(columns: list[str], rows: Rows) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
