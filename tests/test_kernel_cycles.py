"""The model of a kernel's time by its machine code: made-up listings whose cycles are known, and a real kernel."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from benchmark_path import BENCHMARKS

pytest.importorskip("triton")
# isort: split
import kernel_cycles
from kernel_cycles import BARRIER, LATENCY, parse, walk

from lynx_trt.plugins.plans import select_plan
from lynx_trt.plugins.specs import SelectSpec

# No scoreboard is set (7), none has been read (7).
NONE = 7


def line(address: int, text: str, stall: int = 1, sets: int = NONE, reads: int = NONE, waits: int = 0) -> str:
    """An instruction as the disassembler prints it, with its timing in the upper half of its second word."""
    control = (stall | sets << 5 | reads << 8 | waits << 11) << 41
    return f"        /*{address:04x}*/    {text} ;    /* 0x0000000000000000 */\n    /* 0x{control:016x} */"


def cycles(*lines: str, reductions: int = 0) -> int:
    return walk(*parse("\n".join(lines)), reductions=reductions).cycles


def test_stalls_add_up() -> None:
    done = walk(*parse("\n".join([line(0, "IMAD R1, R2, R3, R4", 4), line(16, "@!P0 IADD3 R1, R1, R2", 2)])))
    assert done.cycles == 6
    assert done.executed == {"IMAD": 1, "IADD3": 1}
    assert done.at == {0: 4, 16: 2}


def test_a_load_is_waited_for_by_those_who_need_it() -> None:
    load = line(0, "LDG.E R1, desc[UR4][R2.64]", 2, sets=3)
    assert cycles(load, line(16, "IADD3 R5, R6, R7", 5)) == 2 + 5
    assert cycles(load, line(16, "IADD3 R5, R1, R7", 5, waits=1 << 3)) == LATENCY["LDG"] + 5
    # Two on their way at a time take no longer than one.
    other = line(16, "LDG.E R3, desc[UR4][R2.64+4]", 2, sets=2)
    assert cycles(load, other, line(32, "IADD3 R5, R1, R3", 5, waits=1 << 3 | 1 << 2)) == LATENCY["LDG"] + 2 + 5


def test_exchanges_and_ends() -> None:
    assert cycles(line(0, "BAR.SYNC.DEFER_BLOCKING 0x0", 6), line(16, "EXIT", 5), line(32, "NOP", 9)) == BARRIER + 6 + 5


def test_branches() -> None:
    """Loops once, or as their reductions say; the longer of two ways; not through the slow path of a division."""
    loop = (".L_x_0:", line(0, "REDUX.MAX.S32 UR4, R1", 2), line(16, "@P0 BRA `(.L_x_0)", 5))
    assert cycles(*loop, line(32, "EXIT")) == 7 + 1
    assert cycles(*loop, line(32, "EXIT"), reductions=8) == 8 * 7 + 1
    slow = (line(0, "@P0 BRA `(.L_x_1)", 5), line(16, "CALL.REL.NOINC `(division)", 15), ".L_x_1:", line(32, "EXIT"))
    assert cycles(*slow) == 5 + 1
    both = (
        *(line(0, "@P0 BRA `(.L_x_2)", 5), line(16, "MOV R1, R2", 10), line(32, "BRA `(.L_x_3)", 5), ".L_x_2:"),
        *(line(48 + 16 * n, "MOV R1, R2", 12) for n in range(4)),
        *(".L_x_3:", line(128, "EXIT")),
    )
    assert cycles(*both) == 5 + 4 * 12 + 1


def test_a_real_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYNX_TRT_CACHE", str(tmp_path))
    spec = SelectSpec(8, 2, "weight", 1, 0.0, True, power=2.0, dispatch_taken=True)
    plan = select_plan(spec, 90, 4)
    (row,) = kernel_cycles.measured(plan, 90)
    assert row["kernel"] == "select_kernel"
    assert row["spills"] == 0
    assert row["instructions"] < row["cycles"] < 50 * row["instructions"]
    lines = kernel_cycles.longest_lines(plan.steps[0].kernel, 90, 5)
    assert all(place.startswith("plugins/") or "triton" in place or "language" in place for place, _ in lines), lines
    assert sum(number for _, number in lines) <= row["cycles"]


def test_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cycles, "measured", lambda plan, sm: [{"kernel": "one", "cycles": sm}] * len(plan.steps))
    monkeypatch.setattr(sys, "argv", ["kernel_cycles.py", "--record", str(tmp_path / "cycles.json")])
    kernel_cycles.main()
    found = json.loads((tmp_path / "cycles.json").read_text())
    assert found["sm"] == 90
    assert str(BENCHMARKS) not in json.dumps(found)
    assert all(row["cycles"] == 90 * len(row["launches"]) for row in found["rows"])
    assert {row["tokens"] for row in found["rows"]} == set(kernel_cycles.RECORDED)


def test_a_batch_of_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kernel_cycles.py", "--tokens", "0"])
    with pytest.raises(SystemExit, match="2"):
        kernel_cycles.main()
    assert "--tokens is 0: a batch has at least one" in capsys.readouterr().err
