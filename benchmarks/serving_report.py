"""Markdown tables and a plot of what benchmarks/serving_load.py and serving_steps.py have recorded, and their place in
docs/serving.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

Record = dict[str, Any]
END = "<!-- end -->"


def insert(text: str, page: Path, script: str) -> None:
    """Put a script's tables between its two marks of a page, in the place of what is there."""
    begin = f"<!-- begin: benchmarks/{script}.py -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(END, 1)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def tables(record: Record) -> str:
    """The section "Measured" of docs/serving.md."""
    return "\n\n".join([_place(record), _judged(record), _load(record)])


def quality_table(record: Record) -> str:
    """What serving_quality.py has recorded."""
    head = ("quality", "--max-kl", "KL, nats a token", "same likeliest token", "active experts", "tokens looked at")
    rows = [
        (
            row["quality"],
            f"{row['max_kl']:g}" if row["max_kl"] else "-",
            f"{row['kl']:.4f}",
            f"{100 * row['agreement']:.1f} %",
            f"{row['active_experts']:.1f}",
            str(row["tokens"]),
        )
        for row in record["rows"]
    ]
    return "\n\n".join([_place(record), _markdown([head, *rows])])


def pace_tables(record: Record) -> str:
    """What serving_pace.py has recorded."""
    head = ("clients", "quality", "tokens/s", "TPOT p50 / p90 ms", "answers within the target", "active experts")
    rows = [
        (
            str(row["clients"]),
            row["way"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['tpot_ms']['p50']:.1f} / {row['tpot_ms']['p90']:.1f}",
            f"{100 * row['kept']:.0f} %",
            f"{row['active_experts']:.1f}",
        )
        for row in record["phases"]
    ]
    target = f"The target is {record['tpot_ms']:.1f} ms, {record['share']} of what `max` takes with the most clients."
    return "\n\n".join([_place(record), target, _markdown([head, *rows])])


def plot_pace(record: Record, path: Path) -> None:
    """Time per token of each answer, and the experts that it had, over the run."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(11, 6.5), sharex=True)
    for number, way in enumerate(record["ways"]):
        answers = [one for one in record["answers"] if one["way"] == way]
        ended = [one["ended"] for one in answers]
        for axis, key in zip(axes, ("tpot_ms", "active"), strict=True):
            axis.plot(ended, [one[key] for one in answers], ".", ms=4, alpha=0.5, color=f"C{number}", label=way)
    axes[0].axhline(record["tpot_ms"], color="black", lw=1, ls="--", label="the target")
    axes[0].set(ylabel="time per token of an answer, ms", ylim=(0, None))
    axes[1].set(ylabel="active experts a layer, mean of an answer", xlabel="seconds; clients above", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
        for phase, clients in enumerate(record["clients"]):
            axis.axvline(phase * record["seconds"], color="grey", lw=0.6)
            at = (phase + 0.5) * record["seconds"]
            axis.text(at, 0.97, f"{clients}", ha="center", va="top", transform=axis.get_xaxis_transform())
    axes[0].legend(loc="lower right")
    place = f"{record['model']}, {record['cores']} cores of {record['cpu']}"
    figure.suptitle(f"{place}; commit {record['commit']}, {record['time'][:10]}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def steps_tables(record: Record) -> str:
    """What serving_steps.py has recorded."""
    place = _busy(record) + (
        f"{record['model']}, computed in float32, on {record['cores']} cores of {record['cpu']}; ONNX Runtime "
        f"{record['onnxruntime']}, load average {record['load_before']} before, commit {record['commit']}, "
        f"{record['time'][:10]}; `{record['command']}`."
    )
    head = ("a decode step, ms", "batch 1", "batch 16", "tokens/s of 16 over 1")
    ways = [
        (row["way"], f"{row['one_ms']:.2f}", f"{row['many_ms']:.2f}", f"{row['ratio']:.2f}") for row in record["steps"]
    ]
    turned = [
        (
            "one core" if row["threads"] == 1 else f"{row['threads']} cores",
            str(row["batch"]),
            f"{row['ms']['max']:.2f} ({row['active']['max']:.1f})",
            *(
                f"{row['ms'][quality]:.2f} ({row['active'][quality]:.1f}), {row['ratio'][quality]:.2f}"
                for quality in ("balanced", "fast")
            ),
        )
        for row in record["dial"]
    ]
    dial = ("a decode step, ms (active experts)", "batch", "max", "balanced, tokens/s over max", "fast, the same")
    columns = record["nodes"]
    names = [f"batch {one['batch']}{'' if one['quality'] == 'max' else ', ' + one['quality']}" for one in columns]
    kinds = sorted(columns[-1]["us"], key=lambda kind: (kind == "others", -columns[-2]["us"][kind]))
    rows = [
        (kind, *(f"{one['us'].get(kind, 0):.0f} ({one['nodes'].get(kind, 0)})" for one in columns)) for kind in kinds
    ]
    step = ("the step without the profiler", *(f"{one['step_us']:.0f}" for one in columns))
    active = ("active experts a layer", *(f"{one['active_experts']:.1f}" for one in columns))
    return "\n\n".join(
        [
            place,
            _markdown([head, *ways]),
            _markdown([dial, *turned]),
            _markdown([("one core, us (nodes)", *names), *rows, step, active]),
        ]
    )


def _busy(record: Record) -> str:
    busy = record["load_before"] > 0.75 * record["cores"]
    return "**The machine was busy with other work meanwhile, so these figures say little.** " if busy else ""


def _place(record: Record) -> str:
    return _busy(record) + (
        f"{record['model']} ({record['precision']}, computed in float32) on {record['cores']} cores of "
        f"{record['cpu']}, the clients on the same machine; ONNX Runtime {record['onnxruntime']}, "
        f"{record['threads'] or 'default'} threads, load average {record['load_before']} before, "
        f"Python {record['python']}, {record['server']}, commit {record['commit']}, {record['time'][:10]}; "
        f"`{record['command']}`."
    )


def _judged(record: Record) -> str:
    rows = [
        ("", "one", "many", "ratio (median of rounds; each)"),
        *(
            (
                f"{entry['concurrency']} clients over 1, {entry['quality']}: {what}",
                f"{entry[key]['1']:.0f}",
                f"{entry[key][str(entry['concurrency'])]:.0f}",
                f"{entry[f'{key}_ratio']:.2f} ({_each(entry[f'{key}_ratios'])})",
            )
            for entry in record["batching"]
            for key, what in (
                ("tokens_per_second", "tokens/s, as clients see them"),
                ("decode_tokens_per_second", "tokens/s of the decode steps alone"),
            )
        ),
        _alone(record["overhead"]),
        *(
            (
                f"server over `generate`, batch {entry['batch']}: ms a token",
                f"{entry['generate_ms']:.2f}",
                f"{entry['served_ms']:.2f}",
                f"{entry['ratio']:.2f} ({_each(entry['ratios'])})",
            )
            for entry in record["overhead"]
        ),
    ]
    return _markdown(rows)


def _alone(overhead: list[Record]) -> tuple[str, ...]:
    """Of `generate` without a server: the largest batch over one, in tokens a second."""
    one, most = overhead[0], max(overhead, key=lambda entry: int(entry["batch"]))
    rates = [entry["batch"] / entry["generate_ms"] * 1e3 for entry in (one, most)]
    name = f"`generate` alone, {most['batch']} sequences over {one['batch']}, max: tokens/s"
    return (name, f"{rates[0]:.0f}", f"{rates[1]:.0f}", f"{rates[1] / rates[0]:.2f}")


def _load(record: Record) -> str:
    head = ("clients", "quality", "tokens/s", "TTFT p50 / p90 / p99 ms", "TPOT p50 / p90 / p99 ms", "active", "batch")
    rows = [
        (
            str(row["concurrency"]),
            row["quality"],
            f"{row['tokens_per_second']:.0f}",
            " / ".join(f"{row['ttft_ms'][p]:.1f}" for p in ("p50", "p90", "p99")),
            " / ".join(f"{row['tpot_ms'][p]:.2f}" for p in ("p50", "p90", "p99")),
            f"{row['active_experts']:.1f}",
            f"{row['mean_batch']:.1f}",
        )
        for row in record["load"]
    ]
    return _markdown([head, *rows])


def _each(ratios: list[float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def plot(record: Record, path: Path) -> None:
    """Throughput, TTFT and TPOT against concurrency, a line a quality."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    concurrency = sorted({row["concurrency"] for row in record["load"]})
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    titles = ("tokens a second", "time to first token, ms (p50, p99 dashed)", "time per token, ms (p50, p99 dashed)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="concurrent requests", xscale="log")
        axis.set_xticks(concurrency, [str(number) for number in concurrency])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for number, quality in enumerate(dict.fromkeys(row["quality"] for row in record["load"])):
        rows = [row for row in record["load"] if row["quality"] == quality]
        x, color = [row["concurrency"] for row in rows], f"C{number}"
        axes[0].plot(x, [row["tokens_per_second"] for row in rows], "o-", color=color, label=quality)
        for axis, key in ((axes[1], "ttft_ms"), (axes[2], "tpot_ms")):
            axis.plot(x, [row[key]["p50"] for row in rows], "o-", color=color)
            axis.plot(x, [row[key]["p99"] for row in rows], "--", color=color, alpha=0.6)
    axes[0].legend()
    place = f"{record['model']}, {record['precision']}, {record['cores']} cores of {record['cpu']}"
    figure.suptitle(f"{place}; commit {record['commit']}, {record['time'][:10]}", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
