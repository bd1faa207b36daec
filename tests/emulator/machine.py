"""Running a kernel: programs in lockstep, lanes that branch apart and meet again, barriers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from emulator import access, arithmetic, blackwell, hopper, warps
from emulator.counters import Counters
from emulator.faults import FaultError, UnsupportedError
from emulator.memory import GlobalMemory, Mask
from emulator.program import Instruction, Program, Symbol
from emulator.state import WARP, Execute, State, reader

# Lanes at a time: enough that NumPy has something to do.
MOST_LANES = 16384
_NOTHING = {"griddepcontrol", "fence", "membar", "nanosleep", "prefetch", "discard", "applypriority", "createpolicy"}
_BARRIERS = {"bar", "barrier"}


class Kernel:
    """A program whose instructions are ready to be executed."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._steps = [_step(each) for each in program.instructions]
        self._end = len(self._steps)
        self._whole = [_wants_a_warp(each) for each in program.instructions]

    def run(
        self,
        memory: GlobalMemory,
        words: Sequence[int],
        grid: int,
        threads: int,
        shared: int,
        *,
        cluster: bool = False,
        counters: Counters | None = None,
    ) -> None:
        """Run `grid` programs with these words as parameters. Raises FaultError, UnsupportedError."""
        if self.program.threads and self.program.threads != threads:
            raise FaultError(f"{self.program.name} is for {self.program.threads} threads and launched with {threads}")
        most = grid if cluster else max(1, MOST_LANES // threads)
        with np.errstate(all="ignore"):
            for first in range(0, grid, most):
                programs = min(most, grid - first)
                state = State(self.program, memory, words, first, programs, grid, threads, shared, counters)
                self._run(state, cluster=cluster)

    def _run(self, state: State, *, cluster: bool) -> None:
        at = np.zeros(state.lanes, np.int64)
        waiting = np.zeros(state.lanes, np.bool_)  # at a barrier
        parked = np.zeros(state.lanes, np.bool_)  # before an instruction of a whole warp, for the warp's other lanes
        while True:
            if parked.any():
                places = at.reshape(-1, WARP)
                parked &= np.repeat((places != places[:, :1]).any(axis=1), WARP)
            ready = ~waiting & ~parked & (at < self._end)
            if not ready.any():
                if parked.any():
                    instruction = self.program.instructions[int(at[parked].min())]
                    raise FaultError(f"{self._says(instruction)} wants all lanes of a warp, and some never come")
                if waiting.any():
                    raise FaultError(f"{self.program.name}: lanes wait at a barrier for others that have ended")
                return
            place = int(at[ready].min())
            here = ready & (at == place)
            mask = None if here.all() else here
            others = at[ready & ~here]
            place, last = self._straight(state, place, mask, int(others.min()) if len(others) else self._end)
            if last is None:
                at[here] = place
                if place == self._end:
                    at, waiting, parked = self._shrink(state, at, waiting, parked)
                elif self._whole[place]:
                    parked |= here & ~_full(here)
            elif last.parts[0] in _BARRIERS:
                at[here] = place + 1
                waiting[here] = True
                self._release(state, waiting, at, last, cluster=cluster)
            else:
                self._branch(state, at, here, place, last)

    def _straight(self, state: State, place: int, mask: Mask | None, meet: int) -> tuple[int, Instruction | None]:
        """Execute from a place on up to where others are (`meet`), the end, or an instruction that parts lanes.

        Returns that place, and that instruction.
        """
        while place < self._end:
            instruction = self.program.instructions[place]
            kind = instruction.parts[0]
            if kind in ("ret", "exit"):
                if instruction.guard is not None:
                    raise UnsupportedError("a return of some lanes")
                return self._end, None
            if kind == "bra" or (kind in _BARRIERS and not {"warp", "arrive"} & set(instruction.parts)):
                return place, instruction
            if mask is not None and self._whole[place] and (mask & ~_full(mask)).any():
                return place, None
            step = self._steps[place]
            if step is not None:
                if state.counters is not None:
                    lanes = state.lanes if mask is None else int(mask.sum())
                    state.counters.instructions[kind] += lanes // WARP
                try:
                    step(state, mask)
                except FaultError as fault:
                    raise FaultError(f"{self._says(instruction)}: {fault}") from None
            place += 1
            if place == meet:
                return place, None
        return place, None

    def _says(self, instruction: Instruction) -> str:
        return f"{self.program.name}, {instruction.where}, {instruction.opcode}"

    def _branch(self, state: State, at: Any, here: Mask, place: int, instruction: Instruction) -> None:
        target = instruction.operands[0]
        assert isinstance(target, Symbol)
        to = self.program.labels[target.name]
        if instruction.guard is None:
            at[here] = to
            return
        taken = reader(instruction.guard, "pred")(state)
        taken = here & (~taken if instruction.negated else taken)
        at[here] = place + 1
        at[taken] = to

    def _release(self, state: State, waiting: Mask, at: Any, instruction: Instruction, *, cluster: bool) -> None:
        """Let those go on of whose program (cluster: of all programs) all lanes wait."""
        whole = instruction.parts[:2] == ("barrier", "cluster")
        if whole:
            if not cluster:
                raise FaultError("a barrier of a cluster in a launch that is none")
            free = np.full(len(waiting), waiting.all())
        else:
            some = np.zeros(len(state.epoch), np.bool_)
            some[state.local[~waiting & (at < self._end)]] = True
            free = ~some[state.local]
        if free.any():
            if len(np.unique(at[free & waiting])) > 1 and not whole:
                for program in np.unique(state.local[free]):
                    if len(np.unique(at[state.local == program])) > 1:
                        raise FaultError("lanes of a program wait at different barriers")
            waiting[free] = False
            state.epoch[np.unique(state.local[free])] += 1

    def _shrink(self, state: State, *lanes: Any) -> Any:
        """Leave out programs that have ended, when they are many; `lanes`: where each is, and what else there is."""
        alive = np.zeros(len(state.epoch), np.bool_)
        alive[state.local[lanes[0] < self._end]] = True
        kept = alive[state.local]
        if 0 < kept.sum() <= state.lanes // 2:
            state.keep(kept)
            return tuple(each[kept] for each in lanes)
        return lanes


def _wants_a_warp(instruction: Instruction) -> bool:
    """Whether lanes wait there for all others of their warp."""
    return "sync" in instruction.parts and (instruction.parts[0] != "bar" or "warp" in instruction.parts)


def _full(lanes: Mask) -> Mask:
    """Those lanes whose whole warps are among them."""
    full: Mask = np.repeat(lanes.reshape(-1, WARP).all(axis=1), WARP)
    return full


def _step(instruction: Instruction) -> Execute | None:
    """How to execute an instruction, guard and all; None: there is nothing to do."""
    name = instruction.parts[0]
    if name in ("bra", "ret", "exit", *_BARRIERS) or name in _NOTHING:
        return None
    for module in (arithmetic, access, warps, hopper, blackwell):
        if (execute := module.build(instruction)) is not None:
            return execute if instruction.guard is None else _guarded(instruction, execute)
    raise UnsupportedError(f"{instruction.opcode} ({instruction.where})")


def _guarded(instruction: Instruction, execute: Execute) -> Execute:
    read, negated = reader(instruction.guard, "pred"), instruction.negated

    def guarded(state: State, mask: Mask | None) -> None:
        chosen = np.broadcast_to(read(state), (state.lanes,))
        chosen = ~chosen if negated else chosen
        if mask is not None:
            chosen = chosen & mask
        if chosen.any():
            execute(state, None if chosen.all() else chosen)

    return guarded
