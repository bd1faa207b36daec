"""Kernels ahead of time: really compiled, for every SM, on a machine without a GPU; and the blob that carries them."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lynx_trt.errors import ArtifactError, TensorRTError, UsageError
from lynx_trt.experts import ExpertsForm
from lynx_trt.plugins import aot
from lynx_trt.plugins.aot import Kernels, compile_each, compile_for, lookup
from lynx_trt.plugins.launch import SMS
from lynx_trt.plugins.plan import find_plan
from lynx_trt.plugins.plans import experts_plan, plans
from lynx_trt.plugins.shapes import SHAPES, Shape, experts_spec, ops_of
from lynx_trt.plugins.specs import ExpertsSpec, Op, SelectSpec
from lynx_trt.tensorrt import loader

pytest.importorskip("triton")

SELECT = SelectSpec(8, 2, "weight", 1, 0.0, True, power=2.0, dispatch_taken=True)
EXPERTS = ExpertsSpec(8, 2, 128, 64, "bfloat16", ExpertsForm(), dispatch_given=True)
# A decode profile of up to 4 tokens: one plan and four kernels.
OPS = [Op(SELECT, ((1, 4),)), Op(EXPERTS, ((1, 4),))]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(loader.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def kernels(_cache: None) -> Kernels:
    """The two ops for all SMs."""
    return compile_for(OPS, SMS, jobs=2)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("something is being compiled")

    monkeypatch.setattr(aot, "_compile", refuse)


def _machine(image: bytes) -> int:
    """The SM that a cubin's ELF header names."""
    (flags,) = struct.unpack_from("<I", image, 48)
    return int(flags >> 8 & 0xFF) if image[8] >= 8 else int(flags & 0xFF)  # CUDA 13 moved it up by a byte


@pytest.mark.parametrize("sm", SMS)
def test_cubins_of_every_sm(kernels: Kernels, sm: int) -> None:
    cubins = [cubin for cubin in kernels.cubins if cubin.sm == sm]
    assert len(cubins) == 4
    for cubin in cubins:
        assert cubin.image[:4] == b"\x7fELF"
        assert _machine(cubin.image) == sm
        assert cubin.entry.encode() in cubin.image
        assert cubin.spills == 0
        assert 0 < cubin.registers <= 255
        assert cubin.threads in (32, 128, 256, 512)


def test_a_choice_that_spilled() -> None:
    """gpt-oss in prefill on SM 100, whose gate and up lie in turns: `aot --report` looks at all, for some minutes."""
    step = experts_plan(experts_spec("gpt-oss-120b", "bfloat16"), 100, 4096).steps[-3]
    assert step.kernel.function == "gate_up_prefill_kernel"
    assert compile_each([step.kernel], 100, jobs=1)[step.kernel].spills == 0


def test_launch_data(kernels: Kernels) -> None:
    (plan,) = lookup(kernels, 90, EXPERTS.key)
    assert [step.kernel.function for step in plan.steps] == [
        "gate_up_decode_kernel",
        "down_decode_kernel",
        "combine_kernel",
    ]
    assert plan.steps[0].arguments == ("hidden", "gate_up", "null", "null", "dispatch", "inner", "where")
    assert plan.steps[0].kernel.shared > 0
    (same,) = [plan for plan in plans(EXPERTS, 90, 8) if plan.max_tokens == 8]
    assert [step.grid for step in plan.steps] == [step.grid for step in same.steps]
    assert plan.workspace_bytes(8) == same.workspace_bytes(8)


def test_the_blob_holds_everything(kernels: Kernels) -> None:
    blob = kernels.to_bytes()
    assert Kernels.from_bytes(blob) == kernels
    assert Kernels.from_bytes(blob).to_bytes() == blob
    # Any language reads it: a line, text of as many bytes as it says, images.
    head, _, rest = blob.partition(b"\n")
    name, version, size = head.decode().split(" ")
    assert (name, version) == ("lynx-kernels", "4")
    assert len(rest) == int(size) + sum(len(cubin.image) for cubin in kernels.cubins)


@pytest.mark.parametrize("before", [2, 3])
def test_a_blob_of_before_states_is_read(kernels: Kernels, before: int) -> None:
    """Its grids have a number less, which is 0 here."""
    head, _, rest = kernels.to_bytes().partition(b"\n")
    size = int(head.split()[-1])
    text = re.sub(rb"(?m)^(step(?: \d+){8}) 0 ", rb"\1 ", rest[:size])
    assert len(text) == size - 2 * sum(len(p.steps) for op in kernels.ops.values() for o in op.values() for p in o)
    assert Kernels.from_bytes(b"lynx-kernels %d %d\n" % (before, len(text)) + text + rest[size:]) == kernels


def test_nothing_of_this_machine_is_in_it(kernels: Kernels) -> None:
    assert str(Path(aot.__file__).parent).encode() not in kernels.to_bytes()


@pytest.mark.usefixtures("no_compiler")
def test_layers_share_kernels_and_the_cache_holds_them(kernels: Kernels) -> None:
    layers = compile_for(OPS * 48, SMS)
    assert layers == kernels
    assert layers.to_bytes() == kernels.to_bytes()
    assert compile_for(OPS, [90]).cubins == tuple(cubin for cubin in kernels.cubins if cubin.sm == 90)


def test_a_damaged_cache_is_made_again(kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    combine = next(cubin for cubin in kernels.cubins if cubin.function == "combine_kernel")
    path = tmp_path / "kernel"
    aot._write_cached(path, combine)
    assert aot._read_cached(path) == combine
    path.write_bytes(path.read_bytes()[:-1])
    assert aot._read_cached(path) is None
    path.write_bytes(b"null\n")
    assert aot._read_cached(path) is None
    # A kernel that has changed is another one.
    (plan,) = plans(EXPERTS, 90, 8)[:1]
    name = aot._cache_name(plan.steps[2].kernel, 90)
    assert aot._cache_name(plan.steps[2].kernel, 80) != name
    monkeypatch.setattr(aot, "_sources_hash", lambda module: "edited")
    assert aot._cache_name(plan.steps[2].kernel, 90) != name


def test_another_gpu_is_told_which(kernels: Kernels) -> None:
    hopper = replace(
        kernels,
        cubins=tuple(cubin for cubin in kernels.cubins if cubin.sm in (80, 90)),
        ops={key: {sm: by_sm[sm] for sm in (80, 90)} for key, by_sm in kernels.ops.items()},
    )
    with pytest.raises(ArtifactError, match=r"for SM 80, 90, and this GPU is SM 120: build it again with --sm 120"):
        lookup(hopper, 120, EXPERTS.key)
    with pytest.raises(
        ArtifactError, match=r"for SM 80, 90, and this GPU is SM 75: kernels can be built for SM 80, 86"
    ):
        lookup(hopper, 75, EXPERTS.key)
    with pytest.raises(ArtifactError, match="no kernels for select;experts=9"):
        lookup(hopper, 90, replace(SELECT, experts=9).key)
    # SM 8.x runs what was built for a lower one, 9 and up only their own.
    assert lookup(hopper, 86, EXPERTS.key) is hopper.ops[EXPERTS.key][80]
    assert lookup(kernels, 87, EXPERTS.key) is kernels.ops[EXPERTS.key][86]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda blob: b"", "it begins with b''"),
        (lambda blob: blob.replace(b"lynx-kernels 4", b"lynx-kernels 9", 1), "lynx-kernels 9"),
        (lambda blob: blob[:-1], "is damaged"),
        (lambda blob: blob[:-1] + b"?", "is damaged"),
        (lambda blob: blob.replace(b"region", b"legion"), "a line 'legion'"),
    ],
)
def test_a_damaged_blob(kernels: Kernels, damage: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Kernels.from_bytes(damage(kernels.to_bytes()))


def test_profiles_decide_what_is_compiled() -> None:
    """No kernels for numbers of tokens that lie between the profiles."""
    spec = replace(EXPERTS, experts=128, experts_per_token=8)
    chosen = aot._plans([Op(spec, ((1, 4),)), Op(spec, ((2048, 4096),))], [90])[spec.key][90]
    every = plans(spec, 90, 4096)
    assert chosen[0] == every[0]
    assert chosen[-1] == every[-1]
    assert len(chosen) < len(every)
    assert find_plan(chosen, 3) == find_plan(every, 3)
    assert find_plan(chosen, 3000) == find_plan(every, 3000)


def test_an_sm_that_nothing_is_built_for() -> None:
    with pytest.raises(UsageError, match="SM 75: choose from 80, 86, 89, 90, 100, 120"):
        compile_for(OPS, [75])


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TensorRTError, match=r'not installed: pip install "lynx-trt\[kernels\]"'):
        compile_for([Op(replace(EXPERTS, hidden=32), ((1, 1),))], [90])


def test_a_kernel_that_does_not_compile_is_named() -> None:
    plan = plans(EXPERTS, 90, 8)[0]
    kernel = replace(plan.steps[2].kernel, constants=(("E", 8), ("H", 128), ("K", 2)))
    with pytest.raises(RuntimeError, match=r"combine_kernel does not compile for SM 90: .*BLOCK_H"):
        list(aot._compile([(kernel, 90)], 1))


def test_a_compiler_that_is_killed(tmp_path: Path) -> None:
    worker = aot._Worker(tmp_path / "worker")
    worker._process.kill()
    with pytest.raises(RuntimeError, match=r"combine_kernel does not compile for SM 90: .* \(signal 9; memory may"):
        worker.compile(plans(EXPERTS, 90, 8)[0].steps[2].kernel, 90)
    worker.stop()


def test_report() -> None:
    """The command, on the cache's kernels; `aot` alone says what it can do."""
    environment = {**os.environ, "COLUMNS": "120"}
    command = [sys.executable, "-m", "lynx_trt.plugins.aot"]
    done = subprocess.run([*command], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "--report" in done.stderr
    done = subprocess.run([*command, "--report", "--shape", "gpt-5"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "choose from mixtral-8x7b" in done.stderr


def test_report_table(kernels: Kernels) -> None:
    lines = aot.report_table(kernels).splitlines()
    assert lines[0].split() == ["kernel", "SM", "variants", "registers", "shared", "memory", "spills", "cubin", "kB"]
    assert len(lines) == 1 + 4 * len(SMS)
    assert lines[1].split()[:3] == ["combine_kernel", "80", "1"]
    json.dumps([line.split() for line in lines])


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-120b", "deepseek-v2-lite"])
def test_no_spills_in_what_ships(shape: str) -> None:
    """Every kernel of the models that we name, for every SM: some 10 minutes on two cores."""
    kernels = compile_for(ops_of(shape, "bfloat16"), SMS)
    assert not [(cubin.function, cubin.sm, cubin.spills) for cubin in kernels.cubins if cubin.spills]


# Sizes that none of those has: experts that fill no power of two, as many as there are, and few of odd widths.
OTHER_SHAPES = {
    "kimi-k2": Shape(384, 8, 7168, 2048),
    "qwen3-next": Shape(512, 10, 2048, 512),
    "gemma4-26b-a4b": Shape(128, 8, 2816, 704, ExpertsForm(activation="gelu_tanh")),
    "qwen1.5-moe-a2.7b": Shape(60, 4, 2048, 1408),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_no_spills_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, name, OTHER_SHAPES[name])
    kernels = compile_for(ops_of(name, "bfloat16"), SMS)
    assert not [(cubin.function, cubin.sm, cubin.spills) for cubin in kernels.cubins if cubin.spills]
