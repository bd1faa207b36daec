"""What a launcher does for one op: kernels in order, their arguments and grids, and the workspace. Plain data.

A plan holds for up to `max_tokens` tokens; an op has a few of them, for ranges of T. All launchers read the same plans:
the TensorRT plugins (from the engine, where `aot.py` puts them) and `execute.py` on PyTorch tensors. Making one is
pure: nothing here needs a GPU or the compiler.

To run a plan for T tokens: give each region of the workspace its bytes, one after another, each from a multiple of
ALIGNMENT; then launch the steps in order on one stream, each with `grid.programs(T, multiprocessors, B)` programs (0:
leave it out) of 32 x warps threads; a programmatic step with CUDA's attribute of that name, which lets it start while
the one before it still runs, and the programs of a step that is a cluster as one thread block cluster. A step's
arguments are, in order, pointers by name (an input, an output or a region; "null" is a null pointer), "T" and "B", the
numbers of tokens and of sequences as int32; every pointer is a multiple of 16, but for those of SINGLE_VALUES, of 4.
After them each kernel has two more pointers: global scratch memory (the region "scratch" if the kernel wants any, else
null), and one that is always null.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lynx_trt.plugins.launch import MOST_PROGRAMS
from lynx_trt.plugins.specs import Value

ALIGNMENT = 256

# Arguments of one value. TensorRT may let an op write its own into a place of a larger tensor.
SINGLE_VALUES = ("budget", "floor", "active")

# Bytes of global scratch memory a program may want: two tensor descriptors, of 128 each.
SCRATCH_BYTES = 256

# The module of each kernel, within lynx_trt.plugins.
MODULES = {
    "select_kernel": "select_kernel",
    "select_cluster_kernel": "select_cluster_kernel",
    "select_voting_kernel": "select_blocks_kernel",
    "select_votes_kernel": "select_blocks_kernel",
    "select_keep_kernel": "select_blocks_kernel",
    "select_choice_kernel": "select_blocks_kernel",
    "select_place_kernel": "select_blocks_kernel",
    "dispatch_kernel": "dispatch_kernel",
    "dispatch_count_kernel": "dispatch_kernel",
    "dispatch_scan_kernel": "dispatch_kernel",
    "dispatch_place_kernel": "dispatch_kernel",
    "gate_up_decode_kernel": "experts_decode_kernel",
    "down_decode_kernel": "experts_decode_kernel",
    "gate_up_prefill_kernel": "experts_prefill_kernel",
    "down_prefill_kernel": "experts_prefill_kernel",
    "combine_kernel": "combine_kernel",
    "draw_blocks_kernel": "draw_kernel",
    "draw_kernel": "draw_kernel",
    "causal_conv_kernel": "causal_conv_kernel",
    "linear_attention_kernel": "linear_attention_kernel",
    "linear_attention_chunks_kernel": "linear_attention_prefill_kernel",
    "linear_attention_key_chunks_kernel": "linear_attention_prefill_kernel",
    "linear_attention_prefill_kernel": "linear_attention_prefill_kernel",
}


@dataclass(frozen=True)
class Kernel:
    """What is compiled: a function, its run-time parameters (name, type), its constants, warps and stages."""

    function: str
    parameters: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Value], ...]
    warps: int
    stages: int = 3

    @property
    def fuses(self) -> bool:
        """Whether a * b + c may be rounded once. Not in the selection, which is to round as its reference does."""
        return not self._selects

    @property
    def all_registers(self) -> int:
        """As many as a thread can have when one program has a multiprocessor to itself."""
        return min(65536 // (32 * self.warps), 255)

    @property
    def most_registers(self) -> int | None:
        """Of a thread; None: as many as the assembler likes, which thinks of room for other programs.

        The selection has few programs and no use for the room.
        """
        return self.all_registers if self._selects else None

    @property
    def _selects(self) -> bool:
        return MODULES[self.function].startswith("select")

    @property
    def waits(self) -> bool:
        """Whether it waits itself for the launch before it (dependent_launch.py), and so may start while that runs."""
        return bool(dict(self.constants).get("PROGRAMMATIC"))


# What a step launches: a Kernel, or where it has been compiled, that (`aot.Cubin`).
Launchable = TypeVar("Launchable")
Other = TypeVar("Other")


@dataclass(frozen=True)
class Grid:
    """A number of programs: per * (fixed + min(cap, T * slots) + ceil(T * times / over) + B * sequences).

    With per_multiprocessor it is at most that many a multiprocessor, and at most MOST_PROGRAMS.
    """

    fixed: int = 0
    per: int = 1
    cap: int = 0
    slots: int = 0
    times: int = 0
    over: int = 1
    per_multiprocessor: int = 0
    sequences: int = 0

    def programs(self, tokens: int, multiprocessors: int, sequences: int = 0) -> int:
        """The number of programs for T tokens of B sequences on a GPU; B of an op that has no states is 0."""
        items = self.fixed + min(self.cap, tokens * self.slots) + -(-tokens * self.times // self.over)
        items += sequences * self.sequences
        if not self.per_multiprocessor:
            return self.per * items
        return min(self.per * items, self.per_multiprocessor * multiprocessors, MOST_PROGRAMS)


@dataclass(frozen=True)
class Region:
    """A part of the workspace: fixed + per * ceil(T / tokens) bytes."""

    name: str
    fixed: int = 0
    per: int = 0
    tokens: int = 1

    def size(self, tokens: int) -> int:
        """Its bytes for T tokens."""
        return self.fixed + self.per * -(-tokens // self.tokens)


@dataclass(frozen=True)
class Step(Generic[Launchable]):
    """One launch: the arguments are names of inputs, outputs or regions, "null", "T" or "B", as the kernel takes them.

    programmatic: it may start while the launch before it still runs; its kernel waits itself. cluster: its programs
    run at the same time and wait for each other (cluster.py).
    """

    kernel: Launchable
    grid: Grid
    arguments: tuple[str, ...]
    programmatic: bool = False
    cluster: bool = False


@dataclass(frozen=True)
class Plan(Generic[Launchable]):
    """The launches for up to `max_tokens` tokens; of an op whose sequences have states, tokens of a sequence."""

    max_tokens: int
    steps: tuple[Step[Launchable], ...]
    regions: tuple[Region, ...]

    def offsets(self, tokens: int) -> dict[str, int]:
        """Where each region begins in the workspace."""
        places: dict[str, int] = {}
        end = 0
        for region in self.regions:
            places[region.name] = end
            end += -(-region.size(tokens) // ALIGNMENT) * ALIGNMENT
        return places

    def with_kernels(self, of: Callable[[Launchable], Other]) -> Plan[Other]:
        """The same with another of each kernel: with what it was compiled to, say."""
        steps = (
            Step(of(each.kernel), each.grid, each.arguments, each.programmatic, each.cluster) for each in self.steps
        )
        return Plan(self.max_tokens, tuple(steps), self.regions)

    def workspace_bytes(self, tokens: int) -> int:
        """The workspace for T tokens."""
        return sum(-(-region.size(tokens) // ALIGNMENT) * ALIGNMENT for region in self.regions)

    def most_workspace(self, tokens: int) -> int:
        """The workspace for as many tokens as it is for, of up to T in a step."""
        of_sequences = any(step.grid.sequences for step in self.steps)
        return self.workspace_bytes(tokens if of_sequences else min(self.max_tokens, tokens))


def find_plan(options: Sequence[Plan[Launchable]], tokens: int, sequences: int = 0) -> Plan[Launchable]:
    """The plan for T tokens, of B sequences where they have states. Raises ValueError: more than any is made for."""
    longest, what = (tokens // sequences, "sequence") if sequences else (tokens, "batch")
    for plan in options:
        if longest <= plan.max_tokens:
            return plan
    raise ValueError(f"a {what} of {longest} tokens: the kernels are made for up to {options[-1].max_tokens}")
