"""One self-contained page: tables and plots of a report, drawn from the report's content and nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lynx_trt.comparison.runners import baseline_of
from lynx_trt.console import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's colours, which colour-blind readers can tell apart; markers differ as well, for print.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2")
MARKERS = "os^vDPX"

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #d5dae0; text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; } .words td:nth-child(2) { text-align: left; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
.baseline { color: #57606a; } .better { color: #0a6b33; font-weight: 600; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; max-width: 44rem; }
figcaption, .small { color: #57606a; font-size: .9rem; }
ul.problems { background: #fff8e6; padding: .7rem 1.8rem; border-left: 4px solid #E69F00; }
@media print { body { max-width: none; } table { font-size: .75rem; }
  h2, figure { break-inside: avoid; } .scroll { overflow: visible; } }
"""


def page(report: Mapping[str, Any]) -> str:
    """The page's HTML."""
    title = f"{report['artifact']['name']}: lynx-trt side by side"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _headline(report),
        _problems(report),
        "<h2>Speed</h2>",
        _speed_table(report),
        _plot(_speed_plot, report, "Decode speed by batch: higher is faster."),
        "<h2>Quality</h2>",
        _quality_table(report),
        _plot(_quality_plot, report, "Quality against speed at the largest batch: the lower right is best."),
        "<h2>Where the time goes</h2>",
        _plot(_layers_plot, report, f"One decode step at batch {report['layers']['batch']}, with profiling on."),
        "<h2>Size and loading</h2>",
        _size_table(report),
        "<h2>How it was measured</h2>",
        _method(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _headline(report: Mapping[str, Any]) -> str:
    """The answer in a sentence or two."""
    what = {item["name"]: item["what"] for item in report["runners"]}
    candidates = {item["name"] for item in report["runners"] if not item["baseline"]}
    rows = [row for row in report["summary"] if row["runner"] in candidates and row["decode_ratio"]]
    if not rows:
        return "<p>No candidate could be compared with a baseline.</p>"
    best = max(rows, key=lambda row: row["decode_ratio"])
    quality = report["right"][best["runner"]]
    baseline = baseline_of(best["runner"], report["baseline"], report["samples"]["decode"])
    assert baseline is not None  # the ratio is to it
    return (
        f"<p><strong>{escape(what[best['runner']])}</strong> decodes at best "
        f"<strong>{best['decode_ratio']:.2f} times</strong> as fast as {escape(what[baseline])}: at batch "
        f"{best['batch']}, with perplexity {quality['perplexity']:.3f} against "
        f"{report['right'][report['reference']]['perplexity']:.3f} of {escape(report['reference'])}.</p>"
    )


def _problems(report: Mapping[str, Any]) -> str:
    if not report["problems"]:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in report["problems"])
    return f'<p>Not in this comparison:</p><ul class="problems">{items}</ul>'


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """Rows are (class, cells); a table of the class `words` has words in its second column."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f'<tr class="{row}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for row, cells in rows
    )
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _speed_table(report: Mapping[str, Any]) -> str:
    baselines = {item["name"] for item in report["runners"] if item["baseline"]}
    rows = []
    for row in sorted(report["summary"], key=lambda row: row["batch"]):
        decode, first = row["decode_seconds"], row["first_token_seconds"]
        cells = [
            row["runner"],
            str(row["batch"]),
            f"{row['decode_tokens_per_second']:.1f}",
            number(row["decode_ratio"], ".2f"),
            f"{1e3 * decode['median']:.2f}",
            f"{1e3 * decode['p90']:.2f}",
            f"{1e3 * first['median']:.1f}",
            number(row["active_experts"], ".1f"),
            size(row["expert_bytes_a_token"]) if row["expert_bytes_a_token"] else "-",
        ]
        better = (row["decode_ratio"] or 0) > 1.02
        rows.append(("baseline" if row["runner"] in baselines else "better" if better else "", cells))
    head = ["", "batch", "tokens/s", f"x {report['baseline']}", "step ms", "p90 ms", "first token ms", "active experts"]
    return _table([*head, "expert bytes a token"], rows)


def _quality_table(report: Mapping[str, Any]) -> str:
    rows = []
    for name, item in report["right"].items():
        where = item["where"]
        at = f"step {where['step']}, row {where['row']}, token {where['token']}" if item["max"] else "-"
        cells = [name, f"{item['perplexity']:.4f}", f"{100 * item['top1']:.1f}%", f"{100 * item['greedy']:.1f}%"]
        rows.append(("", [*cells, f"{item['rms']:.2e}", f"{item['max']:.2e}", at]))
    head = ["", "perplexity", "same top token", "same greedy text", "logits RMS", "logits max", "largest at"]
    return _table(head, rows) + (
        f'<p class="small">At batch {report["judged_batch"]}. Differences are to {escape(report["reference"])}, '
        "whose logits reach "
        f"{report['right'][report['reference']]['scale']:.1f}.</p>"
    )


def _size_table(report: Mapping[str, Any]) -> str:
    rows = []
    for item in report["runners"]:
        memory = item["memory"]
        rows.append(
            (
                "",
                [
                    item["name"],
                    "; ".join([item["what"], *item["notes"]]),
                    number(item["load_seconds"], ".2f"),
                    size(memory["peak"] - memory["before"]) if memory else "-",
                    size(memory["after"] - memory["before"]) if memory else "-",
                ],
            )
        )
    files = ", ".join(f"{escape(name)} {size(count)}" for name, count in report["artifact"]["files"].items())
    table = _table(["", "", "load s", "memory at its peak", "memory after a step"], rows, "words")
    return f'{table}<p class="small">Files of the artifact: {files}.</p>'


def _method(report: Mapping[str, Any]) -> str:
    options, machine = report["options"], report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    # A report of before there were floors has none.
    floors = report["artifact"].get("floors", [])
    floors = f", floors {floors}" if any(floors) else ""
    return (
        f'<p class="small">{escape(machine["cpu"])}, {machine["cores"]} cores; {escape(versions)}; '
        f"{escape(report['created'])}. Prompts of {options['prompt']} tokens of {escape(str(report['text']['name']))}, "
        f"{options['steps']} decode steps, {options['rounds']} rounds, runners in turn within each round; medians; a "
        f"ratio is the median over pairs of the same round and step of one run. Artifact: preset "
        f"{escape(report['artifact']['preset'])}, budgets {report['artifact']['budgets']}{floors}, "
        f"{escape(report['artifact']['precision'])}. The lowered graphs and the com.microsoft.MoE baseline compute in "
        "float32.</p>"
    )


def number(value: float | None, form: str) -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)


# --- Plots.


def _plot(draw: Callable[[Axes, Mapping[str, Any]], None], report: Mapping[str, Any], caption: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    draw(figure.add_subplot(), report)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "lynx", "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return f"<figure>{text[text.index('<svg') :]}<figcaption>{escape(caption)}</figcaption></figure>"


def _names(report: Mapping[str, Any]) -> list[str]:
    return list(report["samples"]["decode"])


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _speed_plot(axes: Axes, report: Mapping[str, Any]) -> None:
    for place, name in enumerate(_names(report)):
        rows = sorted((row for row in report["summary"] if row["runner"] == name), key=lambda row: row["batch"])
        axes.plot(
            [row["batch"] for row in rows],
            [row["decode_tokens_per_second"] for row in rows],
            label=name,
            **_style(place),
        )
    batches = sorted({row["batch"] for row in report["summary"]})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("batch (sequences)")
    axes.set_ylabel("tokens a second")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _quality_plot(axes: Axes, report: Mapping[str, Any]) -> None:
    batch = max(row["batch"] for row in report["summary"])
    for place, name in enumerate(_names(report)):
        row = next(row for row in report["summary"] if row["runner"] == name and row["batch"] == batch)
        x, y = row["decode_tokens_per_second"], report["right"][name]["perplexity"]
        axes.plot([x], [y], linestyle="none", markersize=9, label=name, **_style(place))
    axes.set_xlabel(f"tokens a second at batch {batch}")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _layers_plot(axes: Axes, report: Mapping[str, Any]) -> None:
    seconds, kinds = report["layers"]["seconds"], report["layers"]["kinds"]
    names = list(seconds)
    left = [0.0] * len(names)
    for place, kind in enumerate(kinds):
        widths = [1e3 * seconds[name][kind] for name in names]
        axes.barh(names, widths, left=left, label=kind, color=COLOURS[1 + place])
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    axes.legend(frameon=False)
