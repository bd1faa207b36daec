"""The emulated GPU: what its instructions do, and which mistakes it knows, on a few lines of PTX each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from emulator import FaultError, UnsupportedError
from emulator.machine import Kernel, Running
from emulator.memory import GlobalMemory
from emulator.program import parse
from numpy.typing import NDArray

Array = NDArray[Any]

# A program of the tests: %r0 is the thread, %rd0 where its 8 bytes of input are and %rd1 of output.
PROGRAM = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry test(
    .param .u64 .ptr .global .align 1 test_param_0,
    .param .u64 .ptr .global .align 1 test_param_1
)
.reqntid THREADS
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<20>;
    .reg .b64 %rd<20>;
    mov.u32 %r0, %tid.x;
    ld.param.b64 %rd10, [test_param_0];
    ld.param.b64 %rd11, [test_param_1];
    mad.wide.u32 %rd0, %r0, 8, %rd10;
    mad.wide.u32 %rd1, %r0, 8, %rd11;
    mov.b32 %r10, global_smem;
    shl.b32 %r11, %r0, 2;
    add.s32 %r12, %r10, %r11;
BODY
    ret;
}
"""


def run(body: str, inputs: Array | None = None, *, threads: int = 32, grid: int = 1, shared: int = 4096) -> Array:
    """What each thread of the first program wrote to [%rd1], as uint64."""
    memory = GlobalMemory(1 << 16)
    values = np.zeros(threads, np.uint64) if inputs is None else inputs
    addresses = [memory.allocate(8 * threads) for _ in range(2)]
    memory.view(addresses[0], 8 * threads)[:] = np.ascontiguousarray(values).view(np.uint8)
    memory.view(addresses[1], 8 * threads)[:] = 0
    text = PROGRAM.replace("BODY", body).replace("THREADS", str(threads))
    Kernel(parse(text)).run(memory, addresses, grid, threads, shared)
    return memory.view(addresses[1], 8 * threads).copy().view(np.uint64)


def pairs(*values: Sequence[Any]) -> Array:
    """Two numbers of 32 bits for each thread, floats by their bits; the last for all that are left."""
    table = [values[min(lane, len(values) - 1)] for lane in range(32)]
    bits = [[np.float32(x).view(np.uint32) if isinstance(x, float) else x & 0xFFFFFFFF for x in row] for row in table]
    return np.array(bits, np.uint32).view(np.uint64)[:, 0]


NAN = float("nan")


@pytest.mark.parametrize(
    ("instruction", "given", "wanted"),
    [
        # Bytes are numbered from the lowest of the first; bit 3 of a selector copies the sign.
        ("prmt.b32 %r3, %r1, %r2, 0x7531;", (0x33221100, 0x77665544), 0x77553311),
        ("prmt.b32 %r3, %r1, %r2, 0x8CB0;", (0x83221180, 0x77665544), 0xFF00FF80),
        ("lop3.b32 %r3, %r1, %r2, 0xF0F0F0F0, 0xEA;", (0x0000FFFF, 0x00FF00FF), 0xF0F0F0FF),
        ("lop3.b32 %r3, %r1, %r2, 0xF0F0F0F0, 0x96;", (0x0000FFFF, 0x00FF00FF), 0xF00F0FF0),
        ("bfe.u32 %r3, %r1, 4, 8;", (0x12345678, 0), 0x67),
        ("bfe.s32 %r3, %r1, 4, 1;", (0x10, 0), -1),
        ("bfe.s32 %r3, %r1, %r2, 8;", (0x00000F80, 4), -8),
        ("shl.b32 %r3, %r1, %r2;", (0xFFFFFFFF, 40), 0),
        ("shr.s32 %r3, %r1, %r2;", (-5, 40), -1),
        ("shr.u32 %r3, %r1, %r2;", (-1, 31), 1),
        ("shf.l.wrap.b32 %r3, %r1, %r2, 8;", (0x12345678, 0x9ABCDEF0), 0xBCDEF012),
        ("div.s32 %r3, %r1, %r2;", (-7, 2), -3),
        ("rem.s32 %r3, %r1, %r2;", (-7, 2), -1),
        ("mul.hi.u32 %r3, %r1, %r2;", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
        ("mul.hi.s32 %r3, %r1, %r2;", (-1, 5), -1),
        ("mul.lo.s32 %r3, %r1, %r2;", (0x10001, 0x10001), 0x20001),
        ("popc.b32 %r3, %r1;", (0xF0F00001, 0), 9),
        ("clz.b32 %r3, %r1;", (0x00010000, 0), 15),
        ("min.s32 %r3, %r1, %r2;", (-3, 2), -3),
        ("min.u32 %r3, %r1, %r2;", (-3, 2), 2),
        ("max.f32 %r3, %r1, %r2;", (NAN, 2.0), 2.0),
        ("max.NaN.f32 %r3, %r1, %r2;", (NAN, 2.0), NAN),
        ("max.f32 %r3, %r1, %r2, 0f40400000;", (NAN, 2.0), 3.0),
        ("add.f32 %r3, %r1, %r2;", (1.0, 2.0**-24), 1.0),  # a tie, to the even one
        ("fma.rn.f32 %r3, %r1, %r1, %r2;", (1 + 2.0**-12, -1.0), 2.0**-11 + 2.0**-24),  # rounded once
        ("mul.ftz.f32 %r3, %r1, %r2;", (2.0**-100, 2.0**-40), 0.0),
        ("mul.f32 %r3, %r1, %r2;", (2.0**-100, 2.0**-40), 2.0**-140),
        ("cvt.rzi.s32.f32 %r3, %r1;", (-2.7, 0), -2),
        ("cvt.rni.s32.f32 %r3, %r1;", (2.5, 0), 2),
        ("cvt.rzi.u32.f32 %r3, %r1;", (-5.0, 0), 0),
        ("cvt.rzi.s32.f32 %r3, %r1;", (NAN, 0), 0),
        ("cvt.rzi.s32.f32 %r3, %r1;", (1e20, 0), 0x7FFFFFFF),
        ("cvt.rn.f32.s32 %r3, %r1;", (16777217, 0), 16777216.0),
        ("cvt.rn.bf16x2.f32 %r3, %r1, %r2;", (1.0, -2.0), 0x3F80C000),  # the first is the upper half
        ("cvt.rna.tf32.f32 %r3, %r1;", (1 + 2.0**-11, 0), 1 + 2.0**-10),  # a tie, away from zero
        ("mul.f16x2 %r3, %r1, %r2;", (0x3C004000, 0x42004400), 0x42004800),
        ("cvt.s32.s8 %r3, %r1;", (0x17F, 0), 127),
        ("cvt.s32.s8 %r3, %r1;", (0x180, 0), -128),
        ("setp.ne.f32 %p1, %r1, %r2; selp.b32 %r3, 1, 2, %p1;", (NAN, 1.0), 2),
        ("setp.neu.f32 %p1, %r1, %r2; selp.b32 %r3, 1, 2, %p1;", (NAN, 1.0), 1),
        ("setp.num.f32 %p1, %r1, %r2; selp.b32 %r3, 1, 2, %p1;", (NAN, 1.0), 2),
        ("setp.lt.u32 %p1|%p2, %r1, %r2; selp.b32 %r3, 1, 2, %p2;", (-1, 1), 1),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r3, {%rs2, %rs1};", (0x11112222, 0), 0x22221111),
        ("{ .reg .b32 %r2; add.s32 %r2, %r1, 1; mov.b32 %r3, %r2; }", (5, 7), 6),  # a name of its own
        ("fma.rn.bf16x2 %r3, %r1, %r1, %r2;", (0x40004000, 0x3F803F80), 0x40A040A0),
        ("add.s16x2 %r3, %r1, %r2;", (0x0001FFFF, 0x00010001), 0x00020000),
        ("ex2.approx.f32 %r3, %r1;", (-3.0, 0), 0.125),
    ],
)
def test_arithmetic(instruction: str, given: Any, wanted: Any) -> None:
    body = f"ld.global.v2.b32 {{%r1, %r2}}, [%rd0]; {instruction} st.global.b32 [%rd1], %r3;"
    got = run(body, pairs(given)).astype(np.uint32)
    assert len(set(got.tolist())) == 1
    if isinstance(wanted, float):
        np.testing.assert_equal(got.view(np.float32)[0], np.float32(wanted))
    else:
        assert hex(got[0]) == hex(wanted & 0xFFFFFFFF)


def test_lanes_exchange() -> None:
    """Up, down, across, from one, within halves of a warp."""
    lanes = np.arange(32)
    for instruction, wanted in [
        ("shfl.sync.up.b32 %r3, %r0, 3, 0, -1;", np.where(lanes < 3, lanes, lanes - 3)),
        ("shfl.sync.down.b32 %r3, %r0, 3, 31, -1;", np.where(lanes > 28, lanes, lanes + 3)),
        ("shfl.sync.bfly.b32 %r3, %r0, 5, 31, -1;", lanes ^ 5),
        ("shfl.sync.idx.b32 %r3, %r0, 7, 31, -1;", np.full(32, 7)),
        ("shfl.sync.idx.b32 %r3, %r0, 7, 0x101f, -1;", lanes & 16 | 7),
        ("redux.sync.add.s32 %r3, %r0, -1;", np.full(32, 496)),
        ("setp.lt.u32 %p1, %r0, 4; vote.sync.ballot.b32 %r3, %p1, -1;", np.full(32, 15)),
    ]:
        assert run(f"{instruction} st.global.b32 [%rd1], %r3;").tolist() == wanted.tolist(), instruction


def test_lanes_that_branch_apart_meet_again() -> None:
    """A loop of as many rounds as the lane's number, a branch in it, and an exchange after it."""
    body = """
    mov.b32 %r3, 0;
    mov.b32 %r4, 0;
LOOP:
    setp.ge.u32 %p1, %r4, %r0;
    @%p1 bra DONE;
    and.b32 %r5, %r4, 1;
    setp.eq.b32 %p2, %r5, 0;
    @!%p2 bra ODD;
    add.s32 %r3, %r3, 100;
    bra.uni NEXT;
ODD:
    add.s32 %r3, %r3, 1;
NEXT:
    add.s32 %r4, %r4, 1;
    bra LOOP;
DONE:
    shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1;
    st.global.b32 [%rd1], %r3;
    """
    other = np.arange(32) ^ 1
    assert run(body).tolist() == ((other + 1) // 2 * 100 + other // 2).tolist()


def test_lanes_wait_for_their_warp_wherever_a_branch_lies() -> None:
    """The compiler puts a branch behind where lanes meet again: the others wait at the exchange."""
    body = """
    mov.b32 %r3, %r0;
    and.b32 %r4, %r0, 1;
    setp.eq.b32 %p1, %r4, 0;
    bra FIRST;
MEET:
    shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1;
    bra LAST;
FIRST:
    @%p1 bra MEET;
    add.s32 %r3, %r3, 100;
    bra MEET;
LAST:
    st.global.b32 [%rd1], %r3;
    """
    other = np.arange(32) ^ 1
    assert run(body).tolist() == (other + 100 * (other % 2)).tolist()


EXCHANGE = """
    st.shared.b32 [%r12], %r0;
    BARRIER
    xor.b32 %r13, %r12, 128;
    ld.shared.b32 %r3, [%r13];
    st.global.b32 [%rd1], %r3;
"""


def test_shared_memory_between_warps_wants_a_barrier() -> None:
    got = run(EXCHANGE.replace("BARRIER", "bar.sync 0;"), threads=64)
    assert got.tolist() == (np.arange(64) ^ 32).tolist()
    with pytest.raises(FaultError, match=r"ld\.shared\.b32: a load reads what warp 1 wrote, with no barrier between"):
        run(EXCHANGE.replace("BARRIER", ""), threads=64)


def test_what_was_read_is_overwritten_after_a_barrier() -> None:
    again = EXCHANGE.replace("BARRIER", "bar.sync 0;") + "BARRIER st.shared.b32 [%r12], %r10;"
    run(again.replace("BARRIER", "bar.sync 0;"), threads=64)
    with pytest.raises(FaultError, match="a store overwrites what warp 1 read, with no barrier between"):
        run(again.replace("BARRIER", ""), threads=64)


COPY = """
    shl.b32 %r13, %r0, 3;
    add.s32 %r13, %r13, %r10;
    cp.async.ca.shared.global [%r13], [%rd0], 8;
    cp.async.commit_group;
    WAIT
    ld.shared.b64 %rd3, [%r13];
    st.global.b64 [%rd1], %rd3;
"""


def test_a_copy_is_there_when_it_was_waited_for() -> None:
    values = np.arange(32, dtype=np.uint64) * 7
    assert run(COPY.replace("WAIT", "cp.async.wait_group 0;"), values).tolist() == values.tolist()
    for not_enough in ("", "cp.async.wait_group 1;"):
        with pytest.raises(FaultError, match="a copy goes that was not waited for"):
            run(COPY.replace("WAIT", not_enough), values)


def test_programs_run_and_end_on_their_own() -> None:
    """Of 600 programs each adds one; they are more than run at a time."""
    body = """
    mov.u32 %r1, %ctaid.x;
    setp.ge.u32 %p1, %r1, 500;
    @%p1 bra END;
    bar.sync 0;
    atom.global.add.u32 %r3, [%rd1], 1;
END:
    """
    assert run(body, grid=600).tolist() == [500] * 32


def test_what_is_read_before_a_launch_waits_is_what_was_there_before() -> None:
    memory = GlobalMemory(1 << 12)
    data, seen = memory.allocate(256), memory.allocate(256)

    def launch(body: str) -> Running:
        text = PROGRAM.replace("BODY", body).replace("THREADS", "32")
        return Running(Kernel(parse(text)), memory, [data, seen], 1, 32, 0)

    def after(body: str) -> int:
        memory.view(data, 256)[:] = 0
        earlier, later = launch("griddepcontrol.wait; mov.b32 %r3, 7; st.global.b32 [%rd0], %r3;"), launch(body)
        later.begin()
        earlier.finish()
        later.finish()
        return int(memory.view(seen, 4).view(np.uint32)[0])

    load, wait, store = "ld.global.b32 %r3, [%rd0];", "griddepcontrol.wait;", "st.global.b32 [%rd1], %r3;"
    assert after(wait + load + store) == 7
    assert after(load + wait + store) == 0
    with pytest.raises(FaultError, match="it lets the next launch start before it has waited"):
        launch("griddepcontrol.launch_dependents; griddepcontrol.wait;").finish()


def test_who_asks_a_barrier_in_vain_lets_the_others_go_first() -> None:
    """One warp asks at an address below the other's, which arrives only then; and asks again."""
    body = """
    setp.eq.b32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r10], 1;
    bar.sync 0;
    setp.ge.u32 %p2, %r0, 32;
    mov.b32 %r3, 5;
    @%p2 bra OTHER;
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r10], 0;
    @!%p3 bra WAIT;
    mov.b32 %r3, 7;
    bra END;
OTHER:
    setp.eq.b32 %p4, %r0, 32;
    @%p4 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 0;
END:
    st.global.b32 [%rd1], %r3;
    """
    assert run(body, threads=64).tolist() == [7] * 32 + [5] * 32


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r3, [%rd0+256];", "a load of 4 bytes at 0x[0-9a-f]+, which are in no allocation"),
        ("st.global.b64 [%rd1+8], %rd0;", r"a store of 8 bytes at 0x[0-9a-f]+, which are in no allocation \(lane 31\)"),
        ("ld.global.b32 %r3, [%rd0+2];", "a load of 4 bytes at an address that is not a multiple of 4"),
        (
            "ld.shared.b32 %r3, [%r12+4096];",
            "a load of 4 bytes at 4096 in shared memory, of which the launch asked for 4096",
        ),
        ("ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r12];", "a load of 16 bytes at 4, not a multiple, in shared memory"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bra X; shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1; X:", "some never come"),
        (
            "setp.lt.u32 %p1, %r0, 7; @%p1 redux.sync.add.s32 %r3, %r0, -1;",
            "wants all lanes of a warp, and some are elsewhere",
        ),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bra X; bar.sync 0; bra Y; X: bar.sync 0; Y:", "wait at different barriers"),
        ("barrier.cluster.wait.aligned;", "a barrier of a cluster in a launch that is none"),
        ("mbarrier.inval.shared::cta.b64 [%r10];", "there is no barrier at 0 in shared memory"),
        (
            """setp.eq.b32 %p1, %r0, 0;
            @%p1 mbarrier.init.shared::cta.b64 [%r10], 1;
            bar.sync 0;
            @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 16;
            W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 0;
            @!%p2 bra W;""",
            "a wait for a phase that nothing will end",
        ),
    ],
)
def test_what_a_gpu_leaves_undefined_is_an_error(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        run(body)


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(UnsupportedError, match=r"add\.rz\.f32"):
        run("add.rz.f32 %r3, %r0, %r0;")
    with pytest.raises(UnsupportedError, match=r"sad\.u32"):
        run("sad.u32 %r3, %r0, %r0, %r0;")


def test_a_launch_has_the_threads_that_the_kernel_was_compiled_for() -> None:
    text = PROGRAM.replace("BODY", "").replace("THREADS", "64")
    with pytest.raises(FaultError, match="test is for 64 threads and launched with 32"):
        Kernel(parse(text)).run(GlobalMemory(4096), [0, 0], 1, 32, 0)


def test_memory_ends() -> None:
    with pytest.raises(MemoryError, match="the emulated GPU has 4096 bytes: 8192 more don't fit"):
        GlobalMemory(4096).allocate(8192)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_matrices(kind: str) -> None:
    """A product of [16,16] and [16,8] whose elements lie in registers as the instruction set's tables have them."""
    generator = torch.Generator().manual_seed(0)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    a, b = (torch.randint(-9, 9, shape, generator=generator).to(dtype) for shape in ((16, 16), (16, 8)))
    lane = torch.arange(32)
    row, pair = lane // 4, 2 * (lane % 4)
    halves = [a[row, pair], a[row, pair + 1], a[row + 8, pair], a[row + 8, pair + 1]]
    halves += [a[row, pair + 8], a[row, pair + 9], a[row + 8, pair + 8], a[row + 8, pair + 9]]
    halves += [b[pair, row], b[pair + 1, row], b[pair + 8, row], b[pair + 9, row]]
    registers = torch.stack(halves, dim=1).contiguous().view(torch.int32).numpy().view(np.uint32)
    memory = GlobalMemory(1 << 14)
    given, taken = memory.allocate(32 * 24), memory.allocate(32 * 16)
    memory.view(given, 32 * 24)[:] = registers.reshape(-1).view(np.uint8)
    body = f"""
    mad.wide.u32 %rd0, %r0, 24, %rd10;
    mad.wide.u32 %rd1, %r0, 16, %rd11;
    ld.global.v2.b32 {{%r1, %r2}}, [%rd0];
    ld.global.v2.b32 {{%r3, %r4}}, [%rd0+8];
    ld.global.v2.b32 {{%r5, %r6}}, [%rd0+16];
    mov.b32 %r7, 0f3F800000;
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
        {{%r13, %r14, %r15, %r16}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r7, %r7, %r7, %r7}};
    st.global.v4.b32 [%rd1], {{%r13, %r14, %r15, %r16}};
    """
    text = PROGRAM.replace("BODY", body).replace("THREADS", "32")
    Kernel(parse(text)).run(memory, [given, taken], 1, 32, 0)
    got = torch.from_numpy(memory.view(taken, 32 * 16).copy().view(np.float32)).reshape(32, 4)
    want = a.float() @ b.float() + 1
    for number, where in enumerate([(row, pair), (row, pair + 1), (row + 8, pair), (row + 8, pair + 1)]):
        assert torch.equal(got[:, number], want[where])
