"""What is asked of the GPU's part of lynx-trt, beside what was measured: plain functions of a run's recorded results.

A target is met, missed or not measured; nothing that was not measured counts as met.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
PEERS = ("grouped_mm", "dense", "vllm")
# What the name of a quantized model ends in, behind that of the same one in full.
QUANTIZED = ("-mxfp4", "-fp8", "-int4")


@dataclass(frozen=True)
class Verdict:
    """One target: what is wanted and what was measured, in words; `passed` None: not measured."""

    target: str
    wanted: str
    measured: str
    passed: bool | None

    @property
    def word(self) -> str:
        """Pass, FAIL or a dash."""
        return "-" if self.passed is None else "pass" if self.passed else "FAIL"


def verdicts(parts: Mapping[str, Any]) -> list[Verdict]:
    """All targets; `parts` are the recorded results by part, those of one benchmark's models together."""
    every_decode, every_prefill, select = (rows_of(parts, name) for name in ("decode", "prefill", "select"))
    states = rows_of(parts, "states")
    # Peers have none of these weights: beating them with a quarter of the bytes is no target.
    decode, prefill = ([row for row in rows if in_full(row)] for rows in (every_decode, every_prefill))
    mixtral, qwen = shares(decode, "mixtral-8x7b", (1, 32)), shares(decode, "qwen3-30b-a3b", (16, 16))
    return [
        *engine(parts.get("engine", {})),
        spills(parts.get("compile", {})),
        tests(parts),
        least("decode, Mixtral-8x7B, batch 1 to 32: share of the copy bandwidth", 0.85, mixtral),
        least("decode, Qwen3-30B-A3B, batch 16: share of the copy bandwidth", 0.78, qwen),
        most("selection with its metadata, T up to 512", 12.0, metadata_times(select, 512)),
        most("selection with its metadata, T up to 128", 12.0, metadata_times(select, 128)),
        most("fixed cost of a layer at batch 16", 20.0, fixed_costs(decode, 16)),
        least("prefill, T from 4096: share of the matmul rate", 0.70, prefill_shares(prefill)),
        slower("decode: never slower than the best peer", decode),
        slower("prefill: never slower than the best peer", prefill),
        least("layer at 50% of the active experts against the fastest unrestricted one", 1.6, gains(decode), "x"),
        right(
            "error against float64 at most twice that of same-dtype PyTorch", [*every_decode, *every_prefill, *states]
        ),
        state_shares(states),
        right("the selection's choice is its twin's", select),
        quantized("decode: LynxExperts with quantized weights against itself with all of them", every_decode),
        quantized("prefill: the same", every_prefill),
        whole_model(rows_of(parts, "model")),
        *end_to_end(parts.get("end_to_end", {})),
    ]


def rows_of(parts: Mapping[str, Any], benchmark: str) -> list[Row]:
    """The rows of a benchmark, of whichever parts (one a model) recorded them."""
    names = [name for name in parts if name == benchmark or name.startswith(f"{benchmark}-")]
    return [row for name in names for row in parts[name].get("result", {}).get("rows", [])]


def engine(part: Row) -> list[Verdict]:
    """What the engine's part answered."""
    result = part.get("result", {})
    answer = result.get("answer") or part.get("summary") or "not measured"
    verdicts = [Verdict("does TensorRT run on this SM?", "an answer", str(answer), None)]
    if result.get("rows"):
        passed = [bool(row.get("passed")) for row in result["rows"]]
        failed = ", ".join(row["name"] for row in result["rows"] if not row.get("passed"))
        words = f"{sum(passed)} of {len(passed)}" + (f"; not {failed}" if failed else "")
        return [*verdicts, Verdict("engines: right, and text equal to ONNX Runtime's", "all", words, all(passed))]
    return [*verdicts, Verdict("engines: right, and text equal to ONNX Runtime's", "all", "not measured", None)]


def tests(parts: Mapping[str, Any]) -> Verdict:
    """The kernels' tests, as pytest's last lines have them; a run that was cut off is no pass."""
    found = [
        part for name, part in parts.items() if name.split("-")[0] == "kernels" and part.get("status") != "missing"
    ]
    words = "; ".join(f"{part.get('status')}: {part.get('summary', '')}" for part in found)
    passed = all(part.get("status") == "ok" for part in found) if found else None
    return Verdict("kernels against their twins", "all pass", words or "not measured", passed)


def spills(part: Row) -> Verdict:
    """No kernel of the named models spills on this SM."""
    rows = part.get("result", {}).get("rows", [])
    bad = [f"{row['function']} ({row['spills']} bytes)" for row in rows if row["spills"]]
    words = f"{len(rows)} kernels" + (f", not {', '.join(bad)}" if bad else "")
    return Verdict("no kernel spills", "none", words if rows else "not measured", not bad if rows else None)


def least(target: str, wanted: float, values: Mapping[str, float], unit: str = "%") -> Verdict:
    """Every value is at least `wanted`."""
    return _bound(target, f"at least {_show(wanted, unit)}", values, unit, min, lambda value: value >= wanted)


def most(target: str, wanted: float, values: Mapping[str, float], unit: str = "us") -> Verdict:
    """Every value is below `wanted`."""
    return _bound(target, f"under {_show(wanted, unit)}", values, unit, max, lambda value: value < wanted)


def _bound(
    target: str,
    wanted: str,
    values: Mapping[str, float],
    unit: str,
    worst: Callable[..., str],
    met: Callable[[float], bool],
) -> Verdict:
    if not values:
        return Verdict(target, wanted, "not measured", None)
    place = worst(values, key=lambda name: values[name])
    count = sum(map(met, values.values()))
    middle = statistics.median(values.values())
    words = f"worst {_show(values[place], unit)} ({place}), median {_show(middle, unit)}; {count} of {len(values)}"
    return Verdict(target, wanted, words, count == len(values))


def _show(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "%" else f"{value:.2f}{unit}" if unit == "x" else f"{value:.1f} {unit}"


def of(rows: Iterable[Row], contender: str) -> list[Row]:
    """A contender's timed rows."""
    return [row for row in rows if row["contender"] == contender and "us" in row]


def place(row: Row) -> str:
    """A row's point in words."""
    fraction = f", {row['fraction']:.0%}" if row.get("fraction", 1.0) != 1.0 else ""
    by = " by floor" if row.get("by") == "floor" else ""
    return f"{row['model']}, T={row['tokens']}{fraction}{by}"


def shares(rows: Sequence[Row], model: str, tokens: tuple[int, int]) -> dict[str, float]:
    """The share of the copy bandwidth that LynxExperts reads active experts with, at their natural number."""
    return {
        place(row): row["bandwidth_share"]
        for row in of(rows, "lynx")
        if row["model"] == model and tokens[0] <= row["tokens"] <= tokens[1] and row["fraction"] == 1.0
    }


def metadata_times(rows: Sequence[Row], tokens: int) -> dict[str, float]:
    """Microseconds of the selection with the complete metadata."""
    return {place(row): row["us"] for row in of(rows, "lynx_metadata") if row["tokens"] <= tokens}


def prefill_shares(rows: Sequence[Row]) -> dict[str, float]:
    """The share of the matmul rate from 4096 tokens."""
    return {place(row): row["matmul_share"] for row in of(rows, "lynx") if row["tokens"] >= 4096}


def fixed_costs(rows: Sequence[Row], tokens: int) -> dict[str, float]:
    """Where a line through time by active experts begins, selection included: microseconds, by model."""
    costs = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        points = [
            (r["active"], r["us"]) for r in of(rows, "lynx_layer") if (r["model"], r["tokens"]) == (model, tokens)
        ]
        if len({active for active, _ in points}) >= 3:
            slope, start = statistics.linear_regression(*zip(*points, strict=True))
            costs[f"{model}, {slope:.2f} us an expert"] = start
    return costs


def points(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Timed rows by point, then by contender."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if "us" in row:
            found.setdefault((row["model"], row["tokens"], row.get("fraction", 1.0)), {})[row["contender"]] = row
    return found


def slower(target: str, rows: Sequence[Row]) -> Verdict:
    """The best peer's time over that of LynxExperts on the same inputs, at least 1 everywhere.

    Only peers that are right count: a wrong result is no time to beat.
    """
    ratios = {}
    for by_name in points(rows).values():
        peers = [by_name[name] for name in PEERS if name in by_name and by_name[name].get("right", True)]
        if peers and "lynx" in by_name:
            best = min(peers, key=lambda row: row["us"])
            ratios[f"{place(best)}, {best['contender']}"] = best["us"] / by_name["lynx"]["us"]
    return least(target, 1.0, ratios, "x")


def gains(rows: Sequence[Row]) -> dict[str, float]:
    """The fastest layer of anyone at the natural number of experts over ours, selection included, at half of it.

    Where half was to be had: a token's own K experts can't be halved by a budget in a batch of one.
    """
    found = points(rows)
    ratios = {}
    for (model, tokens, fraction), by_name in found.items():
        whole = found.get((model, tokens, 1.0))
        if fraction != 0.5 or tokens == 1 or whole is None or "lynx_layer" not in by_name:
            continue
        times = [row["us"] for name, row in whole.items() if name in (*PEERS, "lynx")]
        ratios[place(by_name["lynx_layer"])] = min(times, default=math.nan) / by_name["lynx_layer"]["us"]
    return ratios


def right(target: str, rows: Iterable[Row]) -> Verdict:
    """Every result of ours that was checked is right; one that failed to run is not."""
    found = [row for row in rows if row["contender"].startswith("lynx") and ("right" in row or "failed" in row)]
    if not found:
        return Verdict(target, "everywhere", "not measured", None)
    wrong = [row for row in found if row.get("right") is not True]
    words = f"{len(found) - len(wrong)} of {len(found)}"
    if wrong:
        words += (
            f"; not {place(wrong[0])} ({wrong[0]['contender']}: {wrong[0].get('failed', wrong[0].get('error', ''))})"
        )
    return Verdict(target, "everywhere", words, not wrong)


def in_full(row: Row) -> bool:
    """Whether a row's layer has weights that are no quantized ones."""
    return not str(row.get("model", "")).endswith(QUANTIZED)


def quantized(target: str, rows: Sequence[Row]) -> Verdict:
    """No target: the time with weights in full over that with quantized ones, at the same point of the same model."""
    found = points(rows)
    ratios: dict[str, list[float]] = {}
    for (model, tokens, fraction), by_name in found.items():
        ending = next((each for each in QUANTIZED if model.endswith(each)), "")
        whole = found.get((model.removesuffix(ending), tokens, fraction), {}) if ending else {}
        if "lynx" in by_name and "lynx" in whole:
            ratios.setdefault(model, []).append(whole["lynx"]["us"] / by_name["lynx"]["us"])
    words = [
        f"{model}: median {statistics.median(each):.2f}x, {min(each):.2f}x to {max(each):.2f}x of {len(each)} points"
        for model, each in ratios.items()
    ]
    return Verdict(target, "recorded", "; ".join(words) or "not measured", None)


def state_shares(rows: Sequence[Row]) -> Verdict:
    """No target: with what share of the copy bandwidth a decode step of linear attention reads and writes states."""
    words = [
        f"{row['model']}, batch {row['batch']}: {row['bandwidth_share']:.0%}, {row['us']:.1f} us"
        for row in of(rows, "lynx")
        if row["length"] == 1 and row["batch"] in (1, 16, 64)
    ]
    return Verdict(
        "linear attention, decode: share of the copy bandwidth", "recorded", "; ".join(words) or "not measured", None
    )


def whole_model(rows: Sequence[Row]) -> Verdict:
    """Decoding a whole model in PyTorch, no target. By batch: tokens/s, what half of the experts gain, the best peer.

    Of peers the time over ours with all experts: over 1 where we are faster.
    """
    words = []
    for batch in sorted({row["batch"] for row in rows}):
        here = [row for row in rows if row["batch"] == batch]
        ours = {row["fraction"]: row for row in of(here, "lynx")}
        if 1.0 not in ours:
            failed = next((row["failed"] for row in here if row["contender"] == "lynx" and "failed" in row), "no time")
            words.append(f"batch {batch}: {failed}")
            continue
        said = f"batch {batch}: {ours[1.0]['tokens_per_second']:.0f} tokens/s"
        if 0.5 in ours:
            said += f", {ours[1.0]['us'] / ours[0.5]['us']:.2f}x at half"
        peers = [row for name in PEERS for row in of(here, name)]
        if peers:
            best = min(peers, key=lambda row: row["us"])
            said += f", {best['us'] / ours[1.0]['us']:.2f}x the best peer ({best['contender']})"
        words.append(said)
    checked = [row for row in of(rows, "lynx") if "error" in row]
    if checked:
        worst = max(checked, key=lambda row: row["error"])
        words.append(f"logits off by at most {worst['error']:.2%}, PyTorch's two ways by {worst['noise']:.2%}")
    target = "decoding a whole model (PyTorch around the kernels)"
    return Verdict(target, "recorded", "; ".join(words) or "not measured", None)


def end_to_end(part: Row) -> list[Verdict]:
    """Decoding a whole model: no target, but the reader's question."""
    rows = part.get("result", {}).get("rows", [])
    by_batch: dict[int, dict[float, Row]] = {}
    for row in rows:
        by_batch.setdefault(row["batch"], {})[row["share"]] = row
    words = [
        f"batch {batch}: {each[1.0]['tokens_per_second']:.0f} tokens/s, "
        f"{each[1.0]['median_seconds'] / each[0.5]['median_seconds']:.2f}x at half"
        for batch, each in by_batch.items()
        if {1.0, 0.5} <= set(each)
    ]
    return [Verdict("end to end decode", "recorded", "; ".join(words) or "not measured", None)]


def table(found: Sequence[Verdict]) -> str:
    """Markdown."""
    lines = ["| target | wanted | measured | |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {v.target} | {v.wanted} | {v.measured} | {v.word} |" for v in found)])
