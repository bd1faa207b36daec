"""The launcher without a GPU: what it launches is what the plans say, whoever brings the kernels and whenever."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from fake_kernels import FakeDriver, clustered_kernels, fake_kernels

from lynx_trt.errors import ArtifactError, TensorRTError
from lynx_trt.experts import ExpertsForm
from lynx_trt.export.ops import experts_attributes, select_attributes
from lynx_trt.plugins import launcher
from lynx_trt.plugins.blob import Kernels, lookup
from lynx_trt.plugins.contract import CONTRACTS, EXPERTS_CONTRACT, SELECT_CONTRACT, Contract
from lynx_trt.plugins.launch import SMS
from lynx_trt.plugins.launcher import Launcher, publish, published, spec_of, workspace_bytes
from lynx_trt.plugins.plan import SINGLE_VALUES, find_plan
from lynx_trt.plugins.plans import plans
from lynx_trt.plugins.plans import workspace_bytes as planned_workspace
from lynx_trt.plugins.specs import ExpertsSpec, SelectSpec
from lynx_trt.selection import PRESETS
from lynx_trt.tensorrt.kernels import ops_of
from lynx_trt.tensorrt.profiles import Profile

SELECT = SelectSpec(8, 2, "affinity", 1, 0.5, True, power=2.0)
EXPERTS = ExpertsSpec(8, 2, 128, 64, "float16", ExpertsForm("gelu", transposed=True))
BIASED = ExpertsSpec(8, 2, 128, 64, "bfloat16", ExpertsForm(), bias=True)
HANDING = replace(SELECT, dispatch_taken=True)
HANDED = replace(EXPERTS, dispatch_given=True)
HANDED_BIASED = replace(BIASED, dispatch_given=True)
SPECS = (SELECT, EXPERTS, BIASED, HANDING, HANDED, HANDED_BIASED)
NAMES = ["select", "experts", "biased", "select-handing", "experts-handed", "biased-handed"]
MOST = 4096
INPUTS, OUTPUTS = [0x1000 * n for n in range(1, 9)], [0x100000 * n for n in range(1, 5)]
WORKSPACE, STREAM = 0x7000000, 77


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return fake_kernels(SPECS, (90,), MOST)


def contract_of(spec) -> Contract:
    if isinstance(spec, SelectSpec):
        return SELECT_CONTRACT.of_node({"dispatch": spec.dispatch_taken})
    return EXPERTS_CONTRACT.of_node({"dispatch": spec.dispatch_given})


def launcher_of(kernels: Kernels, spec, driver: FakeDriver) -> Launcher:
    contract = contract_of(spec)
    n_inputs = contract.input_counts[-1 if getattr(spec, "bias", False) else 0]
    return Launcher(contract, kernels, spec.key, n_inputs, driver)


def prescribed(kernels: Kernels, spec, tokens: int, driver: FakeDriver) -> list[dict]:
    """What plan.py says, put together in the plainest way."""
    contract = contract_of(spec)
    names = [tensor.name for tensor in contract.inputs]
    if not getattr(spec, "bias", True):
        names = [name for name in names if not name.endswith("_bias")]
    plan = find_plan(lookup(kernels, 90, spec.key), tokens)
    places = {"null": 0, "T": tokens}
    places |= dict(zip(names, INPUTS, strict=False))
    places |= {tensor.name: address for tensor, address in zip(contract.outputs, OUTPUTS, strict=False)}
    places |= {name: WORKSPACE + offset for name, offset in plan.offsets(tokens).items()}
    launches = []
    for step in plan.steps:
        cubin, programs = step.kernel, step.grid.programs(tokens, driver.here.multiprocessors)
        scratch = places["scratch"] if cubin.scratch else 0
        words = [*(places[name] for name in step.arguments), scratch, 0]
        entry = {"entry": cubin.entry, "programs": programs, "threads": cubin.threads, "shared": cubin.shared}
        entry |= {"stream": STREAM, "words": words, "programmatic": step.programmatic, "cluster": step.cluster}
        launches.append(entry)
    return [launch for launch in launches if launch["programs"]]


# One token; a decode batch; the last with one program; the first with blocks; a prefill that fills no block.
@pytest.mark.parametrize("tokens", [1, 17, 512, 513, 4095])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_launches_are_the_plans(kernels, spec, tokens):
    driver = FakeDriver()
    launcher_of(kernels, spec, driver).prepare(tokens).run(driver, INPUTS, OUTPUTS, WORKSPACE, STREAM)
    assert driver.launched
    assert driver.launched == prescribed(kernels, spec, tokens, driver)


@pytest.mark.parametrize("tokens", [9, 16])
def test_a_cluster_is_one_launch_of_all_its_programs(tokens):
    """Also of those that have no token: the others wait for them."""
    kernels = Kernels.from_bytes(clustered_kernels(HANDING, MOST).to_bytes())
    driver = FakeDriver()
    launcher_of(kernels, HANDING, driver).prepare(tokens).run(driver, INPUTS, OUTPUTS, WORKSPACE, STREAM)
    assert driver.launched == prescribed(kernels, HANDING, tokens, driver)
    (launch,) = driver.launched
    assert launch["cluster"]
    assert launch["programs"] == 4
    launcher_of(kernels, HANDING, driver).prepare(8).run(driver, INPUTS, OUTPUTS, WORKSPACE, STREAM)
    assert not driver.launched[1]["cluster"]


@pytest.mark.parametrize("tokens", [1, 17, 64])
def test_a_layer_that_hands_over_is_a_launch_less(kernels, tokens):
    """What LynxSelect writes is what LynxExperts reads: a tensor between them, and no region of a workspace."""
    launched = {}
    for name, pair in (("apart", (SELECT, EXPERTS)), ("handed", (HANDING, HANDED))):
        driver = FakeDriver()
        for spec in pair:
            launcher_of(kernels, spec, driver).prepare(tokens).run(driver, INPUTS, OUTPUTS, WORKSPACE, STREAM)
        launched[name] = driver.launched
    assert [len(launched[name]) for name in ("apart", "handed")] == [5, 4]
    select, gate_up, *_ = launched["handed"]
    assert OUTPUTS[3] in select["words"]  # its fourth output
    assert INPUTS[5] in gate_up["words"]  # the input behind `down`
    assert WORKSPACE not in select["words"]


def test_a_second_run_takes_the_new_pointers(kernels):
    """Nothing is resolved again, and nothing of the run before is left."""
    driver = FakeDriver()
    prepared = launcher_of(kernels, EXPERTS, driver).prepare(4)
    prepared.run(driver, INPUTS, OUTPUTS, WORKSPACE, STREAM)
    loaded, first = len(driver.loaded), driver.launched
    driver.launched = []
    prepared.run(driver, [2 * each for each in INPUTS], OUTPUTS, WORKSPACE, STREAM)
    prepared.run(driver, INPUTS, OUTPUTS, WORKSPACE, STREAM)
    assert driver.launched[len(first) :] == first != driver.launched[: len(first)]
    assert len(driver.loaded) == loaded


@pytest.mark.parametrize("where", ["inputs", "outputs", "workspace"])
def test_misaligned_pointers_are_refused(kernels, where):
    driver = FakeDriver()
    given = {"inputs": INPUTS, "outputs": OUTPUTS, "workspace": WORKSPACE, "stream": STREAM}
    given[where] = WORKSPACE + 8 if where == "workspace" else [given[where][0] + 8, *given[where][1:]]
    with pytest.raises(ArtifactError, match=f"the kernels want multiples of {64 if where == 'workspace' else 16}"):
        launcher_of(kernels, SELECT, driver).prepare(700).run(driver, **given)
    assert driver.launched == []


def test_single_values_may_lie_in_a_larger_tensor(kernels):
    """`active` of each layer, say, in the tensor of all layers: at multiples of 4."""
    names = [tensor.name for tensor in SELECT_CONTRACT.inputs]
    inputs = [each + 4 * (name in SINGLE_VALUES) for name, each in zip(names, INPUTS, strict=False)]
    outputs = [OUTPUTS[0], OUTPUTS[1], OUTPUTS[2] + 12]
    driver = FakeDriver()
    launcher_of(kernels, SELECT, driver).prepare(4).run(driver, inputs, outputs, WORKSPACE, STREAM)
    assert {OUTPUTS[2] + 12, *inputs[4:6]} <= set(driver.launched[0]["words"])
    with pytest.raises(ArtifactError, match="multiples of 4: "):
        launcher_of(kernels, SELECT, driver).prepare(4).run(driver, inputs, [*outputs[:2], 14], WORKSPACE, STREAM)


def test_another_gpu_is_refused_by_name(kernels):
    with pytest.raises(
        ArtifactError, match="kernels are for SM 90, and this GPU is SM 120: build it again with --sm 120"
    ):
        launcher_of(kernels, SELECT, FakeDriver(sm=120)).prepare(1)


def test_a_larger_batch_is_refused(kernels):
    with pytest.raises(
        ArtifactError, match=r"9000 tokens: the kernels are made for up to 4096: build the engine again"
    ):
        launcher_of(kernels, SELECT, FakeDriver()).prepare(9000)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@pytest.mark.parametrize("tokens", [1, 64, 1000, MOST])
def test_workspace(spec, tokens):
    """Enough for every smaller batch; that of the plans when there are kernels for all SMs."""
    every = fake_kernels([spec], SMS, MOST)
    assert workspace_bytes(every, spec.key, tokens) == max(
        plan.workspace_bytes(min(plan.max_tokens, tokens)) for sm in SMS for plan in plans(spec, sm, MOST)
    )
    assert workspace_bytes(every, spec.key, tokens) >= planned_workspace(spec, tokens)
    for fewer in (1, tokens // 2, tokens):
        plan = find_plan(lookup(every, 90, spec.key), max(fewer, 1))
        assert plan.workspace_bytes(max(fewer, 1)) <= workspace_bytes(every, spec.key, tokens)
    with pytest.raises(ArtifactError, match="no kernels for nothing"):
        workspace_bytes(every, "nothing", tokens)


# ---- kernels of a process


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_BLOBS", {})
    monkeypatch.setattr(launcher, "_PARSED", {})


@pytest.mark.usefixtures("registry")
def test_kernels_are_found_whenever_they_come(kernels):
    blob = kernels.to_bytes()
    name = hashlib.sha256(blob).hexdigest()
    with pytest.raises(ArtifactError, match=f"{name[:12]} are in none of the engines"):
        published(name)
    publish("another engine", fake_kernels([SELECT], (80,), 8).to_bytes())
    publish(name, blob)
    publish(name, blob)  # a clone, or a second engine from the same plan
    assert published(name) is published(name)
    assert published(name).ops.keys() == kernels.ops.keys()
    assert published("another engine").sms == (80,)


@pytest.mark.usefixtures("registry")
def test_damaged_kernels_are_refused():
    publish("damaged", b"lynx-kernels 4 3\nab")
    with pytest.raises(ArtifactError, match="can't be read"):
        published("damaged")


# ---- what the kernels are made for


def test_ops_of_layers():
    """Equal layers are one op; T is that of the input ids."""
    select = select_attributes(PRESETS["lynx"], experts_per_token=2, renormalize=True, scale=1.0)
    shapes = [[-1, 8], [-1, 8], [-1, 2], [-1, 2], [], [], [-1]]
    layers = [
        {"name": f"s{n}", "op": "LynxSelect", "attributes": select, "shapes": shapes, "type": "float32"} for n in (0, 1)
    ]
    form = ExpertsForm(transposed=True, limit=7.0)
    shapes = [[-1, 128], [-1, 2], [-1, 2], [8, 128, 96], [8, 48, 128], [8, 96], [8, 128]]
    experts = {"name": "e", "op": "LynxExperts", "attributes": experts_attributes(form), "shapes": shapes}
    profile = Profile("decode", {"input_ids": ((1, 1), (4, 1), (8, 1)), "lengths": ((1,), (4,), (8,))})
    ops = ops_of([*layers, {**experts, "type": "bfloat16"}], [profile, profile])
    assert [op.ranges for op in ops] == [((1, 8),)] * 2
    assert ops[1].spec == ExpertsSpec(8, 2, 128, 48, "bfloat16", form, bias=True)
    assert isinstance(ops[0].spec, SelectSpec)
    # A pair that hands over has kernels of its own; the size of the metadata is open, as T is.
    handing = {**layers[1], "attributes": {**select, "dispatch": 1}}
    handed = {**experts, "attributes": {**experts["attributes"], "dispatch": 1}, "shapes": [*shapes, [-1]]}
    found = ops_of([layers[1], handing, {**handed, "type": "bfloat16"}], [profile])
    assert [op.spec for op in found] == [
        ops[0].spec,
        replace(ops[0].spec, dispatch_taken=True),
        replace(ops[1].spec, dispatch_given=True),
    ]
    layers[0]["shapes"] = [[-1, -1], *shapes[1:]]
    with pytest.raises(TensorRTError, match="E of choice of node s0 is not known before the engine runs"):
        ops_of(layers[:1], [profile])


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_spec_of_a_node(spec):
    """A node's fields and shapes give back the spec that the kernels were made for."""
    if isinstance(spec, SelectSpec):
        shapes = [(5, 8), (5, 8), (5, 2), (5, 2), (), (), (5,)]
        values = {field.name: getattr(spec, field.name) for field in CONTRACTS["LynxSelect"].fields[:-1]}
        assert spec_of("LynxSelect", {**values, "dispatch": spec.dispatch_taken}, shapes, "float32") == spec
        return
    e, h, i = spec.experts, spec.hidden, spec.inner
    weights = [(e, h, 2 * i), (e, i, h)] if spec.form.transposed else [(e, 2 * i, h), (e, h, i)]
    shapes = [(5, h), (5, 2), (5, 2), *weights, *([(e, 2 * i), (e, h)] if spec.bias else [])]
    shapes += [(28,)] if spec.dispatch_given else []
    values = {**experts_attributes(spec.form), "dispatch": spec.dispatch_given}
    assert spec_of("LynxExperts", values, shapes, spec.dtype) == spec


def test_without_cuda_python():
    from lynx_trt.plugins.cuda_driver import CudaDriver

    try:
        import cuda.bindings.driver  # noqa: F401
    except ImportError:
        with pytest.raises(TensorRTError, match=r'not installed: pip install "cuda-python>=12.8"'):
            CudaDriver()
    else:
        pytest.skip("cuda-python is installed")


def test_sources_name_no_layer_above():
    """The launcher runs in servers: no torch, no Triton language, no TensorRT on import."""
    import subprocess
    import sys

    code = "import sys, lynx_trt.plugins.launcher, lynx_trt.plugins.cuda_driver; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "triton", "onnx", "tensorrt"} & set(loaded)
    assert Path(launcher.__file__).name == "launcher.py"
