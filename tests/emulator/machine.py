"""Running a kernel: programs in lockstep, lanes that branch apart and meet again, barriers."""

from __future__ import annotations

from collections.abc import Sequence

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
        self.steps = [_step(each) for each in program.instructions]
        self.whole = [_wants_a_warp(each) for each in program.instructions]

    def run(self, memory: GlobalMemory, words: Sequence[int], grid: int, threads: int, shared: int) -> None:
        """Run `grid` programs with these words as parameters. Raises FaultError, UnsupportedError."""
        Running(self, memory, words, grid, threads, shared).finish()


class Running:
    """A launch on its way: `begin` goes as far as a program may go while the launch before it still runs."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        words: Sequence[int],
        grid: int,
        threads: int,
        shared: int,
        *,
        cluster: bool = False,
        counters: Counters | None = None,
    ) -> None:
        program = kernel.program
        if program.threads and program.threads != threads:
            raise FaultError(f"{program.name} is for {program.threads} threads and launched with {threads}")
        most = grid if cluster else max(1, MOST_LANES // threads)
        self._parts = [
            _Lockstep(
                kernel,
                State(program, memory, words, first, min(most, grid - first), grid, threads, shared, counters),
                cluster=cluster,
            )
            for first in range(0, grid, most)
        ]

    def begin(self) -> None:
        """Up to where each program waits for earlier launches (griddepcontrol.wait), or its end."""
        with np.errstate(all="ignore"):
            for part in self._parts:
                part.run(stop=True)

    def finish(self) -> None:
        """Whatever is left. Raises FaultError."""
        with np.errstate(all="ignore"):
            while self._parts:
                self._parts.pop(0).run(stop=False)


class _Lockstep:
    """Some programs of a launch, of which the lanes that are furthest behind go first."""

    def __init__(self, kernel: Kernel, state: State, *, cluster: bool) -> None:
        self.program, self._steps, self._whole = kernel.program, kernel.steps, kernel.whole
        self._end = len(self._steps)
        self._state, self._cluster = state, cluster
        self._at = np.zeros(state.lanes, np.int64)
        self._waiting = np.zeros(state.lanes, np.bool_)  # at a barrier
        # Before an instruction of a whole warp, for the warp's other lanes.
        self._parked = np.zeros(state.lanes, np.bool_)
        # For launches before this one; once for all.
        self._stopped = np.zeros(state.lanes, np.bool_)
        # At a barrier in memory, which they ask again and again: after the others.
        self._spinning = np.zeros(state.lanes, np.bool_)

    def run(self, *, stop: bool) -> None:
        """To the end, or (stop) no further than where it waits for earlier launches."""
        state = self._state
        self._stopped[:] = False
        asked_again = False
        while True:
            if self._parked.any():
                places = self._at.reshape(-1, WARP)
                self._parked &= np.repeat((places != places[:, :1]).any(axis=1), WARP)
            ready = ~self._waiting & ~self._parked & ~self._stopped & (self._at < self._end)
            if not ready.any():
                if not self._stopped.any():
                    self._check_ended()
                return
            if not (ready & ~self._spinning).any():
                if asked_again:
                    instruction = self.program.instructions[int(self._at[ready].min())]
                    raise FaultError(f"{self._says(instruction)}: a wait for a phase that nothing will end")
                asked_again = True
                self._spinning[:] = False
            ready &= ~self._spinning
            place = int(self._at[ready].min())
            here = ready & (self._at == place)
            others = self._at[ready & ~here]
            meet = int(others.min()) if len(others) else self._end
            place, last = self._straight(state, place, None if here.all() else here, meet, stop=stop)
            if state.spinning is not None:
                self._spinning, state.spinning = self._spinning | state.spinning, None
            if (here & ~self._spinning).any():
                asked_again = False
                self._spinning &= here
            if last is None:
                self._at[here] = place
                if place == self._end:
                    self._shrink(state)
                elif self._whole[place]:
                    self._parked |= here & ~_full(here)
            elif last.parts[:2] == ("griddepcontrol", "wait"):
                self._at[here] = place + 1
                self._stopped |= here
            elif last.parts[0] in _BARRIERS:
                self._at[here] = place + 1
                self._waiting[here] = True
                self._release(state, last)
            else:
                self._branch(state, here, place, last)

    def _check_ended(self) -> None:
        if self._parked.any():
            instruction = self.program.instructions[int(self._at[self._parked].min())]
            raise FaultError(f"{self._says(instruction)} wants all lanes of a warp, and some never come")
        if self._waiting.any():
            raise FaultError(f"{self.program.name}: lanes wait at a barrier for others that have ended")

    def _straight(
        self, state: State, place: int, mask: Mask | None, meet: int, *, stop: bool
    ) -> tuple[int, Instruction | None]:
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
            if kind == "griddepcontrol":
                if instruction.parts[1] == "wait":
                    state.waited = True
                    if stop:
                        return place, instruction
                elif not state.waited:
                    raise FaultError(f"{self._says(instruction)}: it lets the next launch start before it has waited")
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

    def _branch(self, state: State, here: Mask, place: int, instruction: Instruction) -> None:
        target = instruction.operands[0]
        assert isinstance(target, Symbol)
        to = self.program.labels[target.name]
        if instruction.guard is None:
            self._at[here] = to
            return
        taken = reader(instruction.guard, "pred")(state)
        taken = here & (~taken if instruction.negated else taken)
        self._at[here] = place + 1
        self._at[taken] = to

    def _release(self, state: State, instruction: Instruction) -> None:
        """Let those go on of whose program (at a cluster's barrier, of all programs) all lanes wait."""
        at, waiting = self._at, self._waiting
        if instruction.parts[:2] == ("barrier", "cluster"):
            if not self._cluster:
                raise FaultError("a barrier of a cluster in a launch that is none")
            free = np.full(len(waiting), waiting.all())
        else:
            some = np.zeros(len(state.epoch), np.bool_)
            some[state.local[~waiting & (at < self._end)]] = True
            free = ~some[state.local]
        if free.any():
            for program in np.unique(state.local[free]) if len(np.unique(at[free & waiting])) > 1 else ():
                if len(np.unique(at[(state.local == program) & waiting])) > 1:
                    raise FaultError("lanes of a program wait at different barriers")
            waiting[free] = False
            state.epoch[np.unique(state.local[free])] += 1

    def _shrink(self, state: State) -> None:
        """Leave out programs that have ended, when they are many."""
        alive = np.zeros(len(state.epoch), np.bool_)
        alive[state.local[self._at < self._end]] = True
        kept = alive[state.local]
        if 0 < kept.sum() <= state.lanes // 2:
            state.keep(kept)
            self._at, self._waiting, self._parked, self._stopped, self._spinning = (
                each[kept] for each in (self._at, self._waiting, self._parked, self._stopped, self._spinning)
            )


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
