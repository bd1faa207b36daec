"""How many cycles a program of a kernel takes, by its machine code alone: without a GPU, to compare forms of a kernel.

NVIDIA's assembler writes into each instruction how many cycles go by before the next one may start, and which of six
scoreboards it sets or waits for. One warp's walk through the code with these numbers is its time, but for what a
scoreboard stands for, which is guessed (LATENCY): loads that find their data in L2, one warp a scheduler, no contention.
A loop is walked once, except that one with warp-wide reductions is taken for the choice of K experts a token; of two
branches the longer one is walked. Warps that share a scheduler and launches are not in it.

On an H200 the selections measured on 2026-11-26 took what this says for their launches together and about a
microsecond more for each launch. So it orders variants of a kernel, and is no figure to quote.

    python benchmarks/kernel_cycles.py --model qwen3-30b-a3b --tokens 16 [--op select] [--sm 90] [--lines 12]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpu_common import ROOT

sys.path.insert(0, str(ROOT / "build" / "gpu"))  # where the package is not installed

from lynx_trt.plugins.aot_worker import compile_kernel
from lynx_trt.plugins.launch import SMS, power_of_two
from lynx_trt.plugins.plan import Kernel, Plan
from lynx_trt.plugins.plans import experts_plan, select_plan
from lynx_trt.plugins.shapes import SHAPES, experts_spec, select_spec

# Cycles until a scoreboard is clear, by the first word of the instruction that sets it; OTHER for those not here.
LATENCY = {"LDG": 290, "LD": 290, "ATOMG": 700, "LDS": 30, "LDSM": 33, "LDC": 40, "LDL": 30, "ATOMS": 60}
LATENCY |= {"SHFL": 25, "REDUX": 26, "S2R": 30, "S2UR": 30, "R2UR": 12, "VOTE": 12, "POPC": 18, "FLO": 18}
LATENCY |= {"DADD": 16, "DMUL": 16, "DFMA": 16, "DSETP": 16}
OTHER = 24
# An exchange of all warps, and when an instruction has read its operands.
BARRIER, READ = 30, 20
# A branch over fewer instructions than this and over a call is one over a slow division, which is not taken.
SLOW_PATH = 40


@dataclass(frozen=True)
class Instruction:
    """Its address, its text, and what the assembler says of its timing: cycles, scoreboards set (7: none), waited for."""

    address: int
    text: str
    stall: int
    sets: int
    reads: int
    waits: int

    @property
    def name(self) -> str:
        """The operation without its predicate and its modifiers."""
        return re.sub(r"^@!?U?P[T0-9]+ ", "", self.text).split()[0].split(".")[0]


@dataclass
class Walk:
    """Cycles, what was executed, and the cycles at each address."""

    cycles: int = 0
    executed: Counter[str] = field(default_factory=Counter)
    at: Counter[int] = field(default_factory=Counter)


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a kernel as `nvdisasm -hex -c` prints them, and the number of the one at each label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = iter(listing.splitlines())
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        code = re.match(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/", line)
        if code:
            second = re.search(r"/\* 0x([0-9a-f]{16}) \*/", next(lines))
            assert second is not None
            control = int(second[1], 16) >> 41
            fields = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
            instructions.append(Instruction(int(code[1], 16), code[2].rstrip(" ;"), *fields))
    return instructions, labels


def walk(instructions: Sequence[Instruction], labels: Mapping[str, int], *, reductions: int = 0) -> Walk:
    """One warp's way from the first instruction to its exit; `reductions`: how many REDUX its loops make in all."""
    done = Walk()
    clear = [0] * 6
    visits: Counter[int] = Counter()
    number = 0
    while number < len(instructions):
        each = instructions[number]
        before = done.cycles
        done.cycles = max([done.cycles, *(clear[n] for n in range(6) if each.waits >> n & 1)])
        if each.name == "BAR":
            done.cycles += BARRIER
        if each.sets < 6:
            clear[each.sets] = max(clear[each.sets], done.cycles + LATENCY.get(each.name, OTHER))
        if each.reads < 6:
            clear[each.reads] = max(clear[each.reads], done.cycles + READ)
        done.cycles += max(each.stall, 1)
        done.executed[each.name] += 1
        done.at[each.address] += done.cycles - before
        visits[number] += 1
        if each.text.startswith("EXIT") or (each.name == "EXIT" and visits[number] > 1):
            break
        number = _next(instructions, labels, number, visits[number], reductions)
    return done


def _next(
    instructions: Sequence[Instruction], labels: Mapping[str, int], number: int, visits: int, reductions: int
) -> int:
    each = instructions[number]
    target = re.search(r"`\((\.L_x_\d+)\)", each.text)
    if each.name != "BRA" or target is None or target[1] not in labels:
        return number + 1
    to = labels[target[1]]
    if not each.text.startswith("@"):
        return to if visits < 3 else len(instructions)
    if visits > 1 and to > number:
        return to  # out of a loop whose end is at its beginning
    if to <= number:
        here = sum(other.name == "REDUX" for other in instructions[to:number])
        return to if visits < max(1, round(reductions / here) if here else 1) else number + 1
    skipped = instructions[number:to]
    if len(skipped) < SLOW_PATH and any(other.name == "CALL" for other in skipped):
        return to
    # Where the way that falls through leaves or jumps over the other one, the longer of both.
    last = skipped[-1]
    if last.text.startswith("BRA") and (over := re.search(r"`\((\.L_x_\d+)\)", last.text)):
        return to if labels.get(over[1], 0) - to > len(skipped) else number + 1
    leaves = next((n for n in range(number, to) if instructions[n].text.startswith("EXIT")), None)
    if leaves is not None:
        ends = next(n for n in range(to, len(instructions)) if instructions[n].text.startswith(("EXIT", "BRA")))
        return to if ends - to > leaves - number else number + 1
    return number + 1


def disassemble(image: Path, *options: str) -> str:
    """What the disassembler of the Triton language's package prints. Exits: there is none."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.exists():
        sys.exit(f"error: triton {triton.__version__} has no disassembler at {tool}: version 3.6 or 3.9 does")
    done = subprocess.run([tool, "-hex", "-c", *options, image], capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout


def source_lines(listing: str) -> dict[int, str]:
    """The innermost line of our source for each address, from `nvdisasm -gi`."""
    found: dict[int, str] = {}
    line, before = "", False
    for text in listing.splitlines():
        place = re.search(r'//## File "([^"]+)", line (\d+)', text)
        if place and not (before and "plugins" in line):
            line = f"{Path(place[1]).parent.name}/{Path(place[1]).name}:{place[2]}"
        before = place is not None
        if code := re.match(r"\s+/\*([0-9a-f]{4,6})\*/", text):
            found[int(code[1], 16)] = line
    return found


def reductions_of(kernel: Kernel) -> int:
    """How many REDUX a warp makes for the choice of its tokens' experts: two for each of K."""
    constants = dict(kernel.constants)
    if "select" not in kernel.function or "REMAP" not in constants:
        return 0
    return 2 * int(constants["K"]) * max(1, int(constants["BLOCK_T"]) // kernel.warps)


def report(plan: Plan[Kernel], sm: int, lines: int) -> None:
    """A line for each launch of a plan, and below it the lines of source that take longest."""
    print(f"{'kernel':24}{'warps':>7}{'registers':>11}{'spills':>8}{'instructions':>14}{'exchanges':>11}{'cycles':>9}")
    for step in plan.steps:
        with tempfile.TemporaryDirectory(prefix="lynx-cycles-") as folder:
            os.environ["TRITON_CACHE_DIR"] = folder
            image = Path(folder) / "kernel.cubin"
            made = compile_kernel(step.kernel, sm, image)
            done = walk(*parse(disassemble(image)), reductions=reductions_of(step.kernel))
            where = source_lines(disassemble(image, "-gi")) if lines else {}
        print(
            f"{step.kernel.function:24}{step.kernel.warps:>7}{made['registers']:>11}{made['spills']:>8}"
            f"{done.executed.total():>14}{done.executed['BAR']:>11}{done.cycles:>9}"
        )
        by_line: Counter[str] = Counter()
        for address, cycles in done.at.items():
            by_line[where.get(address, "")] += cycles
        for line, cycles in by_line.most_common(lines):
            print(f"    {line:60}{cycles:>32}")


def main() -> None:
    """One plan of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=16, help="a batch (16)")
    parser.add_argument("--op", choices=("select", "experts"), default="select")
    parser.add_argument("--sm", type=int, choices=SMS, default=90)
    parser.add_argument("--lines", type=int, default=0, help="so many lines of source of each kernel")
    chosen = parser.parse_args()
    if chosen.tokens < 1:
        parser.error(f"--tokens is {chosen.tokens}: a batch has at least one")
    tokens = power_of_two(chosen.tokens)
    if chosen.op == "select":
        report(select_plan(select_spec(chosen.model), chosen.sm, tokens), chosen.sm, chosen.lines)
    else:
        report(experts_plan(experts_spec(chosen.model, "bfloat16"), chosen.sm, tokens), chosen.sm, chosen.lines)


if __name__ == "__main__":
    main()
