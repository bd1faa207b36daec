"""How many cycles a program of a kernel takes, by its machine code alone: without a GPU, to compare forms of a kernel.

NVIDIA's assembler writes into each instruction how many cycles go by before the next one may start, and which of six
scoreboards it sets or waits for. One warp's walk through the code with these numbers is its time, but for what a
scoreboard stands for, which is guessed (LATENCY): loads that find their data in L2, one warp a scheduler, and nobody in
the way. With more warps the cycles in which a scheduler issues (`issue`) may be more than those. A loop is walked once,
except that one with warp-wide reductions is taken for the choice of K experts a token; of two branches the longer one
is walked. Copies to shared memory, matrix units and launches are not in it.

Of the selections measured on an H200 on 2026-11-26 it says, at 1.85 GHz, 0 to 23 % less than measured where one launch
of four warps does it all; beyond, one to two microseconds a launch are missing. So it orders variants of a kernel, and
is no figure to quote.

    python benchmarks/kernel_cycles.py --model qwen3-30b-a3b --tokens 16 [--op select] [--sm 90] [--lines 12]
        [--cluster 8 16]
    python benchmarks/kernel_cycles.py --record FILE.json        # the selections of all models
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_common import ROOT, command_words, commit, write_json

sys.path.insert(0, str(ROOT / "build" / "gpu"))  # where the package is not installed

from lynx_trt.plugins.aot import compile_each
from lynx_trt.plugins.aot_worker import compile_kernel
from lynx_trt.plugins.launch import CLUSTER_SM, SMS, SelectLaunch, power_of_two
from lynx_trt.plugins.plan import Kernel, Plan
from lynx_trt.plugins.plans import experts_plan, select_plan
from lynx_trt.plugins.shapes import SHAPES, experts_spec, routers, select_spec

# Of a multiprocessor, each of which issues an instruction a cycle.
SCHEDULERS = 4
# Batches of a record.
RECORDED = (1, 8, 16, 64, 128, 512)
# Cycles until a scoreboard is clear, by the first word of the instruction that sets it; OTHER for those not here.
LATENCY = {"LDG": 290, "LD": 290, "ATOMG": 700, "LDS": 30, "LDSM": 33, "LDC": 40, "LDL": 30, "ATOMS": 60}
LATENCY |= {"SHFL": 25, "REDUX": 26, "S2R": 30, "S2UR": 30, "R2UR": 12, "VOTE": 12, "POPC": 18, "FLO": 18}
LATENCY |= {"DADD": 16, "DMUL": 16, "DFMA": 16, "DSETP": 16}
OTHER = 24
# An exchange of all warps, a meeting of a cluster's programs, and when an instruction has read its operands.
BARRIER, MEET, READ = 30, 200, 20
# Until what was written can be seen by other multiprocessors.
FENCE = 600
WAITS = {"BAR": BARRIER, "UCGABAR_WAIT": MEET, "MEMBAR": FENCE}
# A branch over fewer instructions than this and over a call is one over a slow division, which is not taken.
SLOW_PATH = 40


@dataclass(frozen=True)
class Instruction:
    """Its address, its text, and its timing: cycles, scoreboards set (7: none) and waited for (a bit each)."""

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
    """The instructions of a kernel as `nvdisasm -hex` prints them, and the number of the one at each label."""
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
        done.cycles += WAITS.get(each.name, 0)
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
        return to if to > number else len(instructions)  # the loop's exit is in it, and what follows it is an end
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


def disassemble(image: Path) -> str:
    """What the disassembler of the Triton language's package prints, lines of source included. Exits: there is none."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.exists():
        sys.exit(f"error: triton {triton.__version__} has no disassembler at {tool}: versions 3.6 to 3.9 do")
    done = subprocess.run([tool, "-hex", "-c", "-gi", image], capture_output=True, text=True, check=True)  # noqa: S603
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
    if "REMAP" not in constants:
        return 0
    return 2 * int(constants["K"]) * max(1, int(constants["BLOCK_T"]) // kernel.warps)


def walked(kernel: Kernel, image: bytes) -> tuple[Walk, dict[int, str]]:
    """One warp's way through a compiled kernel, and the line of source of each address where the image has them."""
    with tempfile.TemporaryDirectory(prefix="lynx-cycles-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(image)
        listing = disassemble(path)
    return walk(*parse(listing), reductions=reductions_of(kernel)), source_lines(listing)


def measured(plan: Plan[Kernel], sm: int) -> list[dict[str, Any]]:
    """A row for each launch of a plan."""
    found = compile_each([step.kernel for step in plan.steps], sm)
    rows = []
    for step in plan.steps:
        kernel, cubin = step.kernel, found[step.kernel]
        done, _ = walked(kernel, cubin.image)
        row = {"kernel": kernel.function, "warps": kernel.warps, "registers": cubin.registers, "spills": cubin.spills}
        issued = done.executed.total()
        row |= {"instructions": issued, "exchanges": done.executed["BAR"]}
        row |= {"issue": issued * kernel.warps // SCHEDULERS, "cycles": done.cycles}
        rows.append(row)
    return rows


def longest_lines(kernel: Kernel, sm: int, number: int) -> list[tuple[str, int]]:
    """The lines of source that take most cycles of a kernel, which is compiled again with their numbers in it."""
    from triton import knobs

    with tempfile.TemporaryDirectory(prefix="lynx-cycles-") as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        image = Path(folder) / "kernel.cubin"
        compile_kernel(kernel, sm, image)
        done, where = walked(kernel, image.read_bytes())
    by_line: Counter[str] = Counter()
    for address, cycles in done.at.items():
        by_line[where.get(address, "")] += cycles
    return by_line.most_common(number)


def plan_of(op: str, model: str, tokens: int, sm: int) -> Plan[Kernel]:
    """As in an engine: the one hands its metadata to the other."""
    if op == "select":
        return select_plan(select_spec(model), sm, tokens)
    return experts_plan(experts_spec(model, "bfloat16"), sm, tokens)


def record(path: Path, sm: int) -> None:
    """The selections of all models for some batches, as JSON; of the experts the matrix units would be missing."""
    rows = []
    for model, tokens in itertools.product(routers(tuple(SHAPES)), RECORDED):
        launches = measured(plan_of("select", model, tokens, sm), sm)
        cycles = sum(each["cycles"] for each in launches)
        rows.append({"model": model, "tokens": tokens, "cycles": cycles, "launches": launches})
        print(f"{model}, {tokens} tokens: {cycles} cycles in {len(launches)} launches", flush=True)
    command = command_words(["python", "benchmarks/kernel_cycles.py", "--record", path.name])
    about = {"commit": commit(), "triton": importlib.metadata.version("triton"), "sm": sm, "command": command}
    write_json(path, {**about, "rows": rows})


def main() -> None:
    """One plan of one model, or all of them into a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=16, help="a batch (16)")
    parser.add_argument("--op", choices=("select", "experts"), default="select")
    parser.add_argument("--sm", type=int, choices=SMS, default=90)
    parser.add_argument("--cluster", type=int, nargs=2, metavar=("PROGRAMS", "WARPS"), help="a selection so")
    parser.add_argument("--lines", type=int, default=0, help="so many lines of source of each kernel")
    parser.add_argument("--record", type=Path, help="the selections of all models, into this file")
    chosen = parser.parse_args()
    if chosen.tokens < 1:
        parser.error(f"--tokens is {chosen.tokens}: a batch has at least one")
    if chosen.record:
        return record(chosen.record, chosen.sm)
    tokens = power_of_two(chosen.tokens)
    if chosen.cluster:
        programs, warps = chosen.cluster
        if chosen.op != "select" or tokens % programs or chosen.sm < CLUSTER_SM:
            parser.error(f"--cluster {programs} {warps}: a selection of {tokens} tokens, from SM {CLUSTER_SM} on")
        launch = SelectLaunch(programs, tokens // programs, warps, tokens // programs, "")
        plan = select_plan(select_spec(chosen.model), chosen.sm, tokens, launch)
    else:
        plan = plan_of(chosen.op, chosen.model, tokens, chosen.sm)
    columns = ("warps", "registers", "spills", "instructions", "exchanges", "issue", "cycles")
    print(f"{'kernel':26}" + "".join(f"{column:>14}" for column in columns))
    for row, step in zip(measured(plan, chosen.sm), plan.steps, strict=True):
        print(f"{row['kernel']:26}" + "".join(f"{row[column]:>14}" for column in columns))
        for line, cycles in longest_lines(step.kernel, chosen.sm, chosen.lines) if chosen.lines else ():
            print(f"    {line:92}{cycles:>14}")
    return None


if __name__ == "__main__":
    main()
