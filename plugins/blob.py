"""The kernels that an engine carries: cubins and how to launch them, and the bytes in which they are stored.

The blob is the line `lynx-kernels 4 BYTES`, BYTES of text, then the cubins one after another. The text is lines of
words separated by single spaces, so that a launcher in any language reads it with no parser to speak of:

    versions LYNX_TRT COMPILER
    cubin SM FUNCTION ENTRY THREADS SHARED SCRATCH REGISTERS SPILLS OFFSET SIZE SHA256
    op KEY
    plan SM MAX_TOKENS
    region NAME FIXED PER TOKENS
    step CUBIN FIXED PER CAP SLOTS TIMES OVER PER_MULTIPROCESSOR SEQUENCES HOW ARGUMENT...

Cubins are numbered from 0 as they come; OFFSET is from the first cubin's first byte. A plan belongs to the op above
it, a region and a step to the plan above. SHARED is the dynamic shared memory, and SCRATCH the global scratch memory
of a program, both in bytes; HOW is 1 for a step that may start before the launch before it has ended, plus 2 for one
whose programs are a cluster. A KEY is made by `specs.py`. Formats 2 and 3 are the same without SEQUENCES.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

from lynx_trt import __version__
from lynx_trt.errors import ArtifactError
from lynx_trt.plugins.launch import SHARED_MEMORY, SMS
from lynx_trt.plugins.plan import Grid, Plan, Region, Step

FORMAT, BEFORE = "lynx-kernels 4", ("lynx-kernels 2", "lynx-kernels 3")
# Numbers of a grid.
GRID = len(fields(Grid))
# Bits of HOW.
PROGRAMMATIC, CLUSTER = 1, 2


@dataclass(frozen=True)
class Cubin:
    """A kernel compiled for an SM, and how to launch it; sizes in bytes, scratch for each program."""

    sm: int
    function: str
    entry: str
    threads: int
    shared: int
    scratch: int
    registers: int
    spills: int
    image: bytes


@dataclass(frozen=True)
class Kernels:
    """All cubins of an engine, and each op's plans by its key and SM."""

    cubins: tuple[Cubin, ...]
    ops: dict[str, dict[int, tuple[Plan[Cubin], ...]]]
    versions: tuple[str, str]

    @property
    def sms(self) -> tuple[int, ...]:
        """The SMs that there are kernels for."""
        return tuple(sorted({cubin.sm for cubin in self.cubins}))

    def to_bytes(self) -> bytes:
        """The blob; the same kernels give the same bytes."""
        lines = [f"versions {' '.join(self.versions)}"]
        offset = 0
        for cubin in self.cubins:
            digest = hashlib.sha256(cubin.image).hexdigest()
            lines.append(_words("cubin", *astuple(replace(cubin, image=b""))[:-1], offset, len(cubin.image), digest))
            offset += len(cubin.image)
        numbers = {id(cubin): number for number, cubin in enumerate(self.cubins)}
        for key, by_sm in self.ops.items():
            lines.append(_words("op", key))
            for sm, options in by_sm.items():
                for plan in options:
                    lines.append(_words("plan", sm, plan.max_tokens))
                    lines += [_words("region", *astuple(region)) for region in plan.regions]
                    lines += [
                        _words(
                            "step",
                            numbers[id(step.kernel)],
                            *astuple(step.grid),
                            PROGRAMMATIC * step.programmatic + CLUSTER * step.cluster,
                            *step.arguments,
                        )
                        for step in plan.steps
                    ]
        text = ("\n".join(lines) + "\n").encode()
        return f"{FORMAT} {len(text)}\n".encode() + text + b"".join(cubin.image for cubin in self.cubins)

    @classmethod
    def from_bytes(cls, data: bytes) -> Kernels:
        """Read a blob. Raises ArtifactError: it is damaged, or of another version of lynx-trt."""
        try:
            return _read(data)
        except (ValueError, IndexError, KeyError) as error:
            raise ArtifactError(
                f"this engine's GPU kernels can't be read ({error}): build it again with this version of lynx-trt, "
                f"{__version__}"
            ) from error


def lookup(kernels: Kernels, sm: int, key: str) -> tuple[Plan[Cubin], ...]:
    """An op's plans on a GPU, by rising `max_tokens` (see `plan.find_plan`).

    Raises ArtifactError: there are no kernels for that SM or that op; the message names both sides.
    """
    usable = [built for built in kernels.sms if _runs_on(kernels, built, sm)]
    if not usable:
        built = ", ".join(map(str, kernels.sms)) or "no GPU at all"
        remedy = f"build it again with --sm {sm}" if sm in SMS else f"kernels can be built for SM {_list(SMS)}"
        raise ArtifactError(f"this engine's kernels are for SM {built}, and this GPU is SM {sm}: {remedy}")
    if key not in kernels.ops:
        raise ArtifactError(f"this engine has no kernels for {key}; it has them for {'; '.join(kernels.ops) or 'none'}")
    return kernels.ops[key][max(usable)]


def _runs_on(kernels: Kernels, built: int, sm: int) -> bool:
    """Also whether they find as much shared memory as they want."""
    largest = max((cubin.shared for cubin in kernels.cubins if cubin.sm == built), default=0)
    return built == sm or (runs_on(built, sm) and largest <= SHARED_MEMORY.get(sm, SHARED_MEMORY[86]))


def runs_on(built: int, sm: int) -> bool:
    """Whether kernels for one SM run on another: the same, or within SM 8 a lower one (from 9 on they are for one)."""
    return built == sm or (built // 10 == sm // 10 == 8 and built < sm)


def _words(*words: object) -> str:
    return " ".join(map(str, words))


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _read(data: bytes) -> Kernels:
    head, _, rest = data.partition(b"\n")
    name, _, size = head.decode().rpartition(" ")
    if name not in (FORMAT, *BEFORE):
        raise ValueError(f"it begins with {head[:40]!r}, not with {FORMAT!r}")
    numbers = GRID if name == FORMAT else GRID - 1
    text, images = rest[: int(size)].decode(), rest[int(size) :]
    cubins: list[Cubin] = []
    ops: dict[str, dict[int, list[tuple[int, list[Any], list[Any]]]]] = {}
    versions: tuple[str, ...] = ()
    for line in text.splitlines():
        kind, *words = line.split(" ")
        if kind == "versions":
            versions = tuple(words)
        elif kind == "cubin":
            cubins.append(_read_cubin(words, images))
        elif kind == "op":
            by_sm = ops.setdefault(words[0], {})
        elif kind == "plan":
            steps: list[Step[Cubin]] = []
            regions: list[Region] = []
            by_sm.setdefault(int(words[0]), []).append((int(words[1]), steps, regions))
        elif kind == "region":
            regions.append(Region(words[0], *map(int, words[1:4])))
        elif kind == "step":
            grid, how = Grid(*map(int, words[1 : 1 + numbers])), int(words[1 + numbers])
            flags = bool(how & PROGRAMMATIC), bool(how & CLUSTER)
            steps.append(Step(cubins[int(words[0])], grid, tuple(words[2 + numbers :]), *flags))
        else:
            raise ValueError(f"it has a line {kind!r}")
    plans_of = {
        key: {sm: tuple(Plan(t, tuple(s), tuple(r)) for t, s, r in options) for sm, options in by_sm.items()}
        for key, by_sm in ops.items()
    }
    return Kernels(tuple(cubins), plans_of, (versions[0], versions[1]))


def _read_cubin(words: Sequence[str], images: bytes) -> Cubin:
    sm, function, entry, *numbers = words[:8]
    offset, size, digest = int(words[8]), int(words[9]), words[10]
    image = images[offset : offset + size]
    if hashlib.sha256(image).hexdigest() != digest:
        raise ValueError(f"the cubin of {function} for SM {sm} is damaged")
    threads, shared, scratch, registers, spills = map(int, numbers)
    return Cubin(int(sm), function, entry, threads, shared, scratch, registers, spills, image)
