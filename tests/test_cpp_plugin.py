"""The C++ plugin against the contract and the Python plugin: fields, shapes, types, formats, workspace, launches.

Compiled here, so it needs TensorRT's public headers (TENSORRT_INCLUDE_DIR or TENSORRT_ROOT), CMake and a C++ compiler.
A program of the tests (cpp/probe.cpp) does with it what TensorRT would, on a CUDA driver that only prints.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_kernels import FakeDriver, clustered_kernels, fake_kernels
from test_plugin_contract import ATTRIBUTES, STATES, WRONG_SIZES, WRONG_STATES, shapes_of

from lynx_trt.experts import FORMATS, WEIGHTS, ExpertsForm
from lynx_trt.export.ops import (
    PLUGIN,
    causal_conv_attributes,
    experts_attributes,
    linear_attention_attributes,
    select_attributes,
)
from lynx_trt.plugins.contract import CONTRACTS, FLOAT_TYPES, Contract, Sources
from lynx_trt.plugins.launcher import Launcher, spec_of, workspace_bytes
from lynx_trt.plugins.specs import CausalConvSpec, LinearAttentionSpec
from lynx_trt.selection import PRESETS
from lynx_trt.tensorrt import loader

ROOT = Path(__file__).parent.parent
TYPES = ("float32", "float16", "bfloat16", "int32", "int64", "bool", "int8")
FIELD_KINDS = {"float32": 1, "int8": 3, "int32": 5, "char": 6}  # nvinfer1::PluginFieldType
MOST = 4096


def tensorrt_headers() -> Path | None:
    """Where the user says that they are; as CMakeLists.txt looks for them."""
    root = os.environ.get("TENSORRT_ROOT", "/nowhere")
    folders = [os.environ.get("TENSORRT_INCLUDE_DIR", "/nowhere"), f"{root}/include", "/usr/include/x86_64-linux-gnu"]
    return next((Path(folder) for folder in folders if (Path(folder) / "NvInferRuntime.h").is_file()), None)


def cuda_headers() -> Path | None:
    """A toolkit's, or those that the Triton language brings along."""
    spec = importlib.util.find_spec("triton")
    wheel = Path(spec.origin).parent / "backends/nvidia/include" if spec and spec.origin else Path("/nowhere")
    folders = [Path(os.environ.get("CUDA_INCLUDE_DIR", "/nowhere")), Path("/usr/local/cuda/include"), wheel]
    return next((folder for folder in folders if (folder / "cuda_runtime_api.h").is_file()), None)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the plugin library, the probe and the driver that prints."""
    headers, cuda = tensorrt_headers(), cuda_headers()
    if headers is None:
        pytest.skip("TensorRT's headers are not here: set TENSORRT_INCLUDE_DIR to the folder of NvInferRuntime.h")
    if cuda is None:
        pytest.skip("cuda_runtime_api.h is not here: set CUDA_INCLUDE_DIR to its folder")
    if not (shutil.which("cmake") and shutil.which("g++") and shutil.which("make")):
        pytest.skip("no CMake, make or g++ here")
    folder = tmp_path_factory.mktemp("plugin")
    places = [f"-DTENSORRT_INCLUDE_DIR={headers}", f"-DCUDA_INCLUDE_DIR={cuda}", "-DCMAKE_CXX_FLAGS=-Werror"]
    run(["cmake", "-S", str(ROOT / "plugins/cpp"), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Debug", *places])
    run(["cmake", "--build", str(folder), "--parallel", "2"])
    sources = Path(__file__).parent / "cpp"
    run(["gcc", "-shared", "-fPIC", str(sources / "fake_cuda.c"), "-ldl", "-o", str(folder / "libcuda.so.1")])
    includes = ["-isystem", str(headers), "-isystem", str(cuda)]
    run(["g++", "-std=c++17", *includes, str(sources / "probe.cpp"), "-ldl", "-o", str(folder / "probe")])
    return folder


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def metadata(tokens: int) -> int:
    """D, the size of the dispatch metadata: K is 2 and E 8 in all cases."""
    return 2 * tokens + 2 * 8 + 2


class Case:
    """One node: its op, attributes, and inputs' types and shapes, with T and B, the tokens and sequences, and D."""

    def __init__(self, op: str, attributes: dict, inputs: list[tuple[str, tuple]]) -> None:
        self.attributes = {name: value for name, value in attributes.items() if name not in PLUGIN}
        self.contract: Contract = CONTRACTS[op].of_node(self.attributes)
        self.inputs = inputs

    @property
    def values(self) -> dict:
        return self.contract.parse_fields(self.attributes)

    def shapes(self, tokens: int, sequences: int = 1) -> list[tuple[int, ...]]:
        sizes = {"T": tokens, "B": sequences, "D": metadata(tokens)}
        return [tuple(sizes.get(size, size) for size in shape) for _, shape in self.inputs]

    @property
    def spec(self):
        return spec_of(self.contract.name, self.values, self.shapes(1), self.inputs[0][0])

    def commands(self, *then: str, kernels: str = "") -> str:
        lines = [f"op {self.contract.name}"]
        for field in self.contract.fields:
            if field.name in self.attributes:
                lines.append(f"field {field.name} {field.type} {self.attributes[field.name]}")
        lines += [kernels, "create"]
        lines += [f"input {kind} {' '.join(map(str, shape))}" for kind, shape in self.inputs]
        return "\n".join([*lines, *then, ""])


def select_case(preset: str = "lynx", **changes) -> Case:
    attributes = select_attributes(PRESETS[preset], experts_per_token=2, renormalize=True, scale=2.5)
    kinds = [tensor.type for tensor in CONTRACTS["LynxSelect"].inputs]
    shapes = [("T", 8), ("T", 8), ("T", 2), ("T", 2), (), (), ("T",)]
    return Case("LynxSelect", {**attributes, **changes}, list(zip(kinds, shapes, strict=True)))


def quantized_inputs(weights: str, shapes: list[tuple[int, ...]], kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """The types and shapes in which matrices of such shapes are stored: the values of each, then the scales of each."""
    stored = FORMATS[weights]
    scale = kind if stored.scale_type == "float" else stored.scale_type
    values = [("int8", (*rows, depth // stored.per_byte)) for *rows, depth in shapes]
    return values + [(scale, (*rows, stored.scales(depth))) for *rows, depth in shapes]


def sizes_for(weights: str, small: tuple[int, int]) -> tuple[int, int]:
    """H and I: `small` unless blocks are wider."""
    return (128, 256) if weights in FORMATS and FORMATS[weights].block == 128 else small


def experts_case(form: ExpertsForm | None = None, kind: str = "float16", *, bias: bool = False, **changes) -> Case:
    form = form or ExpertsForm()
    e, k, (h, i) = 8, 2, sizes_for(form.weights, (128, 96))
    r = 2 * i if form.gated else i
    if form.quantized:
        weights = quantized_inputs(form.weights, [(e, r, h), (e, h, i)], kind)
    else:
        weights = [(kind, (e, h, r)), (kind, (e, i, h))] if form.transposed else [(kind, (e, r, h)), (kind, (e, h, i))]
    inputs = [(kind, ("T", h)), ("int64", ("T", k)), ("float32", ("T", k)), *weights]
    inputs += [(kind, (e, r)), (kind, (e, h))] if bias else []
    inputs += [("int32", ("D",))] if changes.get("dispatch") else []
    return Case("LynxExperts", {**experts_attributes(form), **changes}, inputs)


def conv_case(kind: str = "float16", *, bias: bool = True, **changes) -> Case:
    c, w = 48, 4
    inputs = [(kind, ("T", c)), (kind, (c, w)), (kind, ("B", w - 1, c)), ("int64", ("B",)), *[(kind, (c,))] * bias]
    return Case("LynxCausalConv", {**causal_conv_attributes("silu"), **changes}, inputs)


def attention_case(kind: str = "float16", *, per_key: bool = False, **changes) -> Case:
    g, n, d, m = 2, 4, 16, 24
    attributes = linear_attention_attributes(
        key_heads=g, value_heads=n, update_rule="gated_delta", scale=d**-0.5, epsilon=1e-6
    )
    inputs = [*[(kind, ("T", g * d))] * 2, (kind, ("T", n * m)), ("float32", ("T", n * d if per_key else n))]
    inputs += [("float32", ("T", n)), ("float32", ("B", n, d, m)), ("int64", ("B",))]
    return Case("LynxLinearAttention", {**attributes, **changes}, inputs)


def sequences_of(tokens: int) -> int:
    """How many a step of so many tokens is taken to be of."""
    return next(each for each in (3, 4, 1) if tokens % each == 0)


CASES = {
    "conv": conv_case(),
    "conv-no-bias": conv_case("float32", bias=False, activation="none"),
    "attention": attention_case(),
    "attention-per-key": attention_case("bfloat16", per_key=True),
    "attention-gated": attention_case("float32", update_rule="gated", epsilon=0.0, scale=1.0),
    **{f"select-{preset}": select_case(preset) for preset in PRESETS},
    "experts": experts_case(),
    "experts-bias": experts_case(kind="bfloat16", bias=True),
    "experts-gpt-oss": experts_case(
        ExpertsForm(transposed=True, interleaved=True, alpha=1.702, limit=7.0, up_offset=1.0), "bfloat16", bias=True
    ),
    "experts-ungated": experts_case(ExpertsForm("relu2", gated=False), "float32"),
    **{
        name.format(weights): case
        for weights in FORMATS
        for name, case in {
            "experts-{}": experts_case(ExpertsForm(weights=weights)),
            "experts-{}-ungated": experts_case(ExpertsForm("gelu", gated=False, weights=weights), "bfloat16"),
            "experts-{}-gpt-oss-handed": experts_case(
                ExpertsForm(interleaved=True, alpha=1.702, limit=7.0, up_offset=1.0, weights=weights),
                "bfloat16",
                bias=True,
                dispatch=1,
            ),
            "experts-{}-handed": experts_case(ExpertsForm(weights=weights), dispatch=1),
        }.items()
    },
    "select-handing": select_case(dispatch=1),
    "experts-handed": experts_case(dispatch=1),
    "experts-bias-handed": experts_case(kind="bfloat16", bias=True, dispatch=1),
}


def probe(built: Path, commands: str, **environment: str) -> list[str]:
    # The fake driver's folder comes first for dlopen too.
    environment = {**os.environ, "LD_LIBRARY_PATH": str(built), **environment}
    library = str(built / "liblynx_plugin.so")
    return run([str(built / "probe"), library], input=commands, env=environment).splitlines()


def lines_of(lines: list[str], *kinds: str) -> list[str]:
    return [line for line in lines if line.split(" ", 1)[0] in kinds]


def stored(name: str, kind: str, data: bytes) -> str:
    return f"stored {name} {FIELD_KINDS[kind]} {data.hex()}"


def stored_fields(case: Case, kernels_id: str, blob: bytes) -> list[str]:
    """What the Python plugin stores."""
    from lynx_trt.plugins import python_plugin

    class Trt:
        """The two names of TensorRT that a field is made with."""

        PluginFieldType = type("PluginFieldType", (), {"INT32": 5, "FLOAT32": 1, "CHAR": 6, "INT8": 3})

        @staticmethod
        def PluginField(name, data, kind):
            return f"stored {name} {kind} {(data if isinstance(data, bytes) else data.tobytes()).hex()}"

    values = {**case.values, "kernels_id": kernels_id, "kernels": blob}
    return [
        python_plugin._plugin_field(Trt, field.name, field.type, values[field.name])
        for field in case.contract.stored_fields
        if values[field.name] not in ("", b"")
    ]


@pytest.mark.parametrize("name", CASES)
def test_contract(built, tmp_path, name):
    """One contract: everything that the probe asks the C++ plugin has the contract's answer."""
    case = CASES[name]
    contract = case.contract
    blob = fake_kernels([case.spec], (80, 90), MOST).to_bytes()
    (tmp_path / "kernels").write_bytes(blob)
    kernels_id = hashlib.sha256(blob).hexdigest()
    then = ("outputs", "formats", "workspace 1 1", f"workspace {MOST} 4")
    lines = probe(built, case.commands(*then, kernels=f"kernels {kernels_id} {tmp_path / 'kernels'}"))
    assert lines_of(lines, "plugin") == [f"plugin {contract.name} {contract.version} {contract.namespace}"]
    assert lines_of(lines, "field") == [f"field {f.name} {FIELD_KINDS[f.type]}" for f in contract.stored_fields]
    assert lines_of(lines, "stored") == stored_fields(case, kernels_id, blob)
    types = contract.output_types([kind for kind, _ in case.inputs])
    sources = [[expression(dim) for dim in dims] for dims in contract.output_sources()]
    assert lines_of(lines, "output") == [" ".join(["output", *each]) for each in zip_words(types, sources)]
    kinds = [*(kind for kind, _ in case.inputs), *types]
    assert len(lines_of(lines, "formats")) == len(kinds)
    for position, line in enumerate(lines_of(lines, "formats")):
        answers = [
            contract.supports(
                position, [*kinds[:position], kind, *kinds[position + 1 :]], len(case.inputs), linear=linear
            )
            for linear in (True, False)
            for kind in TYPES
        ]
        assert line == f"formats {position} {''.join(str(int(answer)) for answer in answers)}"
    kernels = fake_kernels([case.spec], (80, 90), MOST)
    assert lines_of(lines, "workspace") == [
        f"workspace {workspace_bytes(kernels, case.spec.key, tokens)}" for tokens in (1, MOST)
    ]


def expression(sources: Sources) -> str:
    """A dimension as the probe writes it."""
    words = [[str(each) if isinstance(each, int) else f"{each[0]}.{each[1]}" for each in term] for term in sources]
    return "+".join("*".join(term) for term in words)


def zip_words(types: list[str], sources: list[list[str]]) -> list[list[str]]:
    return [[kind, *words] for kind, words in zip(types, sources, strict=True)]


@pytest.mark.parametrize(("name", "cluster"), [*((name, False) for name in CASES), ("select-handing", True)])
def test_launches(built, tmp_path, name, cluster):
    """The same launches as the Python launcher's, for each number of tokens in turn, down to the arguments."""
    case, tokens = CASES[name], (1, 9, 17, 512, 513, MOST, 3)
    kernels = clustered_kernels(case.spec, MOST) if cluster else fake_kernels([case.spec], (90,), MOST)
    (tmp_path / "kernels").write_bytes(kernels.to_bytes())
    lines = probe(
        built,
        case.commands(
            *(f"run {each} {sequences_of(each)}" for each in tokens), kernels=f"kernels id {tmp_path / 'kernels'}"
        ),
    )
    driver = FakeDriver()
    launcher = Launcher(case.contract, kernels, case.spec.key, len(case.inputs), driver)
    inputs, outputs = [0x1000 * n for n in range(1, 11)], [0x100000 * n for n in range(1, 5)]
    for each in tokens:
        counts = case.contract.counts(case.shapes(each, sequences_of(each)))
        launcher.prepare(*counts).run(driver, inputs, outputs, 0x7000000, 77)
    numbers = {cubin.entry: number for number, cubin in enumerate(kernels.cubins)}
    assert lines_of(lines, "launch") == [
        f"launch {numbers[it['entry']]} {it['programs']} {it['threads']} {it['shared']} 77 "
        + " ".join(map(str, it["words"]))
        + (" attribute 6 1" if it["programmatic"] else "")
        + (f" attribute 4 {it['programs']} 1 1" if it["cluster"] else "")
        for it in driver.launched
    ]
    assert [it["programs"] for it in driver.launched if it["cluster"]] == ([4] if cluster else [])
    assert len(driver.launched) >= len(tokens)
    assert lines_of(lines, "status") == ["status 0 0"] * len(tokens)
    once = dict.fromkeys(cubin.entry for cubin in driver.loaded)
    assert lines_of(lines, "load") == [f"load {entry}" for entry in once]  # in the same order, each once
    allowed = [numbers[cubin.entry] for cubin in dict.fromkeys(driver.loaded) if cubin.shared > 48 * 1024]
    assert lines_of(lines, "attribute") == [f"attribute {number} 8 60000" for number in allowed]


def test_a_builder_may_run_it_on_anything(built, tmp_path):
    """TensorRT may time a plugin on inputs of its own, which hold indices of experts that there are not."""
    case = experts_case(dispatch=1)
    (tmp_path / "kernels").write_bytes(fake_kernels([case.spec], (90,), 8).to_bytes())
    commands = case.commands("time 4", kernels=f"kernels id {tmp_path / 'kernels'}")
    lines = probe(built, commands + "run 4\n")
    assert lines_of(lines, "status", "launch")[0] == "status 0 0"
    assert len(lines_of(lines, "status", "launch")) > 2
    assert lines_of(probe(built, commands), "status", "launch", "load") == ["status 0 0"]


@pytest.mark.parametrize(
    ("sm", "built_for", "runs"), [(86, 80, True), (80, 86, False), (120, 90, False), (91, 90, False)]
)
def test_other_gpus(built, tmp_path, sm, built_for, runs):
    case = select_case()
    (tmp_path / "kernels").write_bytes(fake_kernels([case.spec], (built_for,), 8).to_bytes())
    lines = probe(built, case.commands("run 4", kernels=f"kernels id {tmp_path / 'kernels'}"), FAKE_SM=str(sm))
    assert lines_of(lines, "status") == [f"status {'0 0' if runs else '-1 -1'}"]
    if not runs:
        assert f"LynxSelect node: this engine's kernels are for SM {built_for}, and this GPU is SM {sm}" in "\n".join(
            lines
        )


@pytest.mark.parametrize(
    ("case", "kernels", "message"),
    [
        (select_case(vote="majority"), "", "vote is 'majority', which is not allowed"),
        (experts_case(gated=2), "", "gated is '2', which is not allowed"),
        (select_case(dispatch=2), "", "dispatch is '2', which is not allowed"),
        (experts_case(weights="int4"), "", "weights is 'int4', which is not allowed"),
        *(
            (
                experts_case(ExpertsForm(transposed=True), weights=weights),
                "",
                f"transposed is 1, and weights in {weights} have to lie along what is summed over",
            )
            for weights in FORMATS
        ),
        (select_case(), "", "it holds no GPU kernels, so this engine can't run"),
        (select_case(), "noblob lost", "the GPU kernels lost are in none of the engines loaded here"),
        (select_case(), "kernels id FILE", "can't be read"),
        (conv_case(activation="gelu"), "", "activation is 'gelu', which is not allowed"),
        (attention_case(update_rule="delta"), "", "update_rule is 'delta', which is not allowed"),
    ],
)
def test_refusals(built, tmp_path, case, kernels, message):
    (tmp_path / "file").write_bytes(b"lynx-kernels 4 9\nnonsense\n")
    commands = case.commands(kernels=kernels.replace("FILE", str(tmp_path / "file")))
    lines = probe(built, commands)
    if "refused" not in lines:
        lines = probe(built, commands + "run 4\n")
        assert lines_of(lines, "status")[0].endswith("-1")
    assert message in "\n".join(lines)


def test_metadata_of_another_size_is_refused(built, tmp_path):
    """That of 5 tokens in a step of 4: the kernels would read what nobody wrote."""
    case = experts_case(dispatch=1)
    (tmp_path / "kernels").write_bytes(fake_kernels([case.spec], (90,), 8).to_bytes())
    case.inputs[-1] = ("int32", (metadata(5),))
    lines = probe(built, case.commands("run 4", kernels=f"kernels id {tmp_path / 'kernels'}"))
    assert lines_of(lines, "status", "launch") == ["status -1 -1"]
    assert "LynxExperts node: dispatch has D = 28, and D has to be T K + 2 E + 2, which is 26" in lines


@pytest.mark.parametrize(("values", "weights", "changes", "message"), WRONG_SIZES)
def test_sizes_that_do_not_fit(built, values, weights, changes, message):
    """In the contract's words, while the network is made."""
    shapes = shapes_of(weights, **changes)
    case = Case("LynxExperts", values, [])
    kinds = ["float16" if tensor.type == "float" else tensor.type for tensor in case.contract.inputs_of(len(shapes))]
    case.inputs = list(zip(kinds, shapes, strict=True))
    lines = probe(built, case.commands("outputs"))
    assert f"LynxExperts node: {message}" in lines
    assert lines_of(lines, "refused", "output") == ["refused"]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG_STATES)
def test_sizes_of_states_that_do_not_fit(built, name, changes, message):
    """In the contract's words, too."""
    case = Case(name, ATTRIBUTES[name], [])
    kinds = ["float16" if tensor.type == "float" else tensor.type for tensor in case.contract.inputs]
    case.inputs = list(zip(kinds, (STATES[name] | changes).values(), strict=True))
    lines = probe(built, case.commands("outputs"))
    assert f"{name} node: {message}".replace("\\", "") in lines
    assert lines_of(lines, "refused", "output") == ["refused"]


@pytest.mark.parametrize("case", [conv_case(), attention_case()], ids=["conv", "attention"])
def test_steps_of_sequences(built, tmp_path, case):
    """As many tokens of other sequences are another step; all have as many. Kernels of no other decay are taken."""
    (tmp_path / "kernels").write_bytes(fake_kernels([case.spec], (90,), 64).to_bytes())
    kernels = f"kernels id {tmp_path / 'kernels'}"
    lines = probe(built, case.commands("run 12 3", "run 12 4", "run 12 5", kernels=kernels))
    assert lines_of(lines, "status") == ["status 0 0", "status 0 0", "status -1 -1"]
    assert [line.split(" attribute")[0].split()[-4:] for line in lines_of(lines, "launch")] == [
        ["12", str(sequences), "0", "0"] for sequences in (3, 4)
    ]
    assert f"{case.contract.name} node: T = 12 is no multiple of B = 5" in lines
    if case.contract.name == "LynxLinearAttention":
        case.inputs[3] = ("float32", ("T", 5))
        lines = probe(built, case.commands("run 12 3", kernels=kernels))
        assert lines_of(lines, "status") == ["status -1 -1"]
        assert "has no kernels for linear_attention;" in "\n".join(lines)


def test_kernels_of_before_states(built, tmp_path):
    """Engines that were built before are as they were."""
    case = CASES["experts"]
    blob = fake_kernels([case.spec], (90,), 64).to_bytes()
    head, _, rest = blob.partition(b"\n")
    size = int(head.split()[-1])
    text = re.sub(rb"(?m)^(step(?: \d+){8}) 0 ", rb"\1 ", rest[:size])
    (tmp_path / "now").write_bytes(blob)
    (tmp_path / "before").write_bytes(b"lynx-kernels 3 %d\n" % len(text) + text + rest[size:])
    now, before = (
        probe(built, case.commands("run 17", kernels=f"kernels id {tmp_path / name}")) for name in ("now", "before")
    )
    assert len(lines_of(now, "launch")) > 2
    assert lines_of(now, "launch", "status") == lines_of(before, "launch", "status")


@pytest.mark.parametrize("weights", FORMATS)
def test_sizes_of_a_step_that_do_not_fit(built, tmp_path, weights):
    """What is not known while the network is made is looked at in each step."""
    case = experts_case(ExpertsForm(weights=weights))
    (tmp_path / "kernels").write_bytes(fake_kernels([case.spec], (90,), 8).to_bytes())
    case.inputs[1:3] = [("int64", (4, 2)), ("float32", (4, 2))]
    lines = probe(built, case.commands("outputs", "run 4", "run 5", kernels=f"kernels id {tmp_path / 'kernels'}"))
    assert lines_of(lines, "refused", "status") == ["status 0 0", "status -1 -1"]
    assert "LynxExperts node: index has T = 4, and hidden has 5" in lines


@pytest.mark.parametrize("weights", FORMATS)
def test_types_of_quantized_weights(built, weights):
    """In the contract's words. uint8 is none of the probe's; TensorRT makes int32 of it."""
    case = experts_case(ExpertsForm(weights=weights))
    kinds = [kind for kind, _ in case.inputs]
    other = "float32" if kinds[5] == "int8" else "int8"
    for position, kind in ((3, "int32"), (4, "float16"), (5, other), (6, "bfloat16")):
        types = [*kinds[:position], kind, *kinds[position + 1 :]]
        case.inputs = [(each, shape) for each, (_, shape) in zip(types, case.inputs, strict=True)]
        lines = probe(built, case.commands("outputs"))
        with pytest.raises(ValueError, match=f"{kind}; allowed: {kinds[position]}") as refused:
            case.contract.check_types(types)
        assert str(refused.value).replace("LynxExperts:", "LynxExperts node:") in lines
    case = experts_case(ExpertsForm(weights=weights))
    case.inputs = case.inputs[:5]
    assert "LynxExperts node: it has 5 inputs; it takes 7 or 9" in probe(built, case.commands("outputs"))


@pytest.mark.parametrize(("dispatch", "metadata_input"), [(1, False), (0, True)])
def test_the_field_and_the_inputs_agree(built, dispatch, metadata_input):
    case = experts_case(dispatch=dispatch)
    case.inputs = [*case.inputs[:5], *([("int32", ("D",))] if metadata_input else [])]
    lines = probe(built, case.commands("outputs"))
    assert lines_of(lines, "refused")
    counts = "5 inputs; it takes 6 or 8 with dispatch = 1" if dispatch else "6 inputs; it takes 5 or 7"
    assert f"LynxExperts node: it has {counts}" in lines


def test_an_error_of_cuda_has_its_name(built, tmp_path):
    case = select_case()
    (tmp_path / "kernels").write_bytes(fake_kernels([case.spec], (90,), 8).to_bytes())
    lines = probe(built, case.commands("run 4", kernels=f"kernels id {tmp_path / 'kernels'}"), FAKE_ERROR="209")
    assert "LynxSelect node: cuModuleLoadData failed: CUDA_ERROR_FAKE (209)" in lines


DRIVER_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_cpp_plugin import CASES, MOST, clustered_kernels, fake_kernels
from lynx_trt.plugins.cuda_driver import CudaDriver
from lynx_trt.plugins.launcher import Launcher
cluster = {cluster}
case = CASES[{name!r}]
kernels = clustered_kernels(case.spec, MOST) if cluster else fake_kernels([case.spec], (90,), MOST)
driver = CudaDriver()
launcher = Launcher(case.contract, kernels, case.spec.key, len(case.inputs), driver)
inputs, outputs = [0x1000 * n for n in range(1, 11)], [0x100000 * n for n in range(1, 5)]
for tokens in (9, 17, 513):
    launcher.prepare(tokens).run(driver, inputs, outputs, 0x7000000, 77)
"""


@pytest.mark.parametrize(
    ("name", "cluster"),
    [("experts-bias-handed", False), ("experts-fp8-gpt-oss-handed", False), ("select-handing", True)],
)
def test_cuda_python_does_the_same(built, tmp_path, name, cluster):
    """The Python plugin's driver, cuda-python, on the library that prints: the same loads and launches."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip('cuda-python is not installed: pip install "cuda-python>=12.8"')
    case = CASES[name]
    kernels = clustered_kernels(case.spec, MOST) if cluster else fake_kernels([case.spec], (90,), MOST)
    (tmp_path / "kernels").write_bytes(kernels.to_bytes())
    runs = (f"run {tokens}" for tokens in (9, 17, 513))
    expected = probe(built, case.commands(*runs, kernels=f"kernels id {tmp_path / 'kernels'}"))
    script = DRIVER_SCRIPT.format(tests=str(Path(__file__).parent), name=name, cluster=cluster)
    lines = run([sys.executable, "-c", script], env={**os.environ, "LD_LIBRARY_PATH": str(built)}).splitlines()
    assert lines_of(lines, "launch")
    assert lines_of(lines, "load", "attribute", "launch") == lines_of(expected, "load", "attribute", "launch")


def test_only_two_symbols_are_exported(built):
    if not shutil.which("nm"):
        pytest.skip("no nm here")
    symbols = run(["nm", "-D", "--defined-only", str(built / "liblynx_plugin.so")]).splitlines()
    assert {line.split()[-1] for line in symbols if " T " in line} == {"getCreators", "setLoggerFinder"}
    assert "nvinfer" not in run(["ldd", str(built / "liblynx_plugin.so")])


def test_the_contract_has_no_type_that_cpp_lacks():
    for contract in CONTRACTS.values():
        assert {tensor.type for tensor in (*contract.inputs, *contract.outputs)} <= {"float", *TYPES}
    assert set(FLOAT_TYPES) < set(TYPES)


BUILD_SCRIPT = """
import os, sys
from dataclasses import asdict
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_tensorrt_build import profiles_of
from lynx_trt.plugins import python_plugin
from lynx_trt.tensorrt import loader, worker
trt = loader.load("rtx").module
if {library!r}:
    assert trt.get_plugin_registry().load_library({library!r})
path = Path({path!r})
request = dict(onnx=str(path), partial={plan!r}, flavor="rtx", expert_weights="engine", workspace_bytes=None, sms=[],
               user_memory=True,
               kernels={kernels!r}, profiles=[asdict(profile) for profile in profiles_of(path)])
report = worker._build(request, worker._Channel(os.open(os.devnull, os.O_WRONLY)))
print(report["plugin_layers"], len(python_plugin._PLUGINS))
"""


@pytest.mark.parametrize("form", [ExpertsForm(weights=weights) for weights in WEIGHTS], ids=lambda form: form.weights)
def test_engines(built, tmp_path, form):
    """TensorRT for RTX loads the library and builds with it: the same fields in an engine of the same size."""
    from trt_graphs import E, K, make_graph

    for package in ("tensorrt_rtx_bindings", "tensorrt_rtx_libs"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    h, i = sizes_for(form.weights, (32, 64))
    path = make_graph(tmp_path / "model.onnx", "fp16", layers=2, bias=True, hidden=h, intermediate=i, form=form)
    attributes = select_attributes(PRESETS["lynx"], experts_per_token=K, renormalize=True, scale=1.0)
    values = CONTRACTS["LynxSelect"].parse_fields(attributes)
    shapes = [(1, E), (1, E), (1, K), (1, K), (), (), (1,)]
    specs = [spec_of("LynxSelect", {**values, "dispatch": 1}, shapes, "float32")]
    values = CONTRACTS["LynxExperts"].parse_fields({**experts_attributes(form), "dispatch": 1})
    weights = [(E, 2 * i, h), (E, h, i)]
    if form.quantized:
        weights = [shape for _, shape in quantized_inputs(form.weights, weights, "float16")]
    shapes = [(1, h), (1, K), (1, K), *weights, (E, 2 * i), (E, h), (metadata(1),)]
    specs.append(spec_of("LynxExperts", values, shapes, "float16"))
    (tmp_path / "kernels").write_bytes(blob := fake_kernels(specs, (90,), 256).to_bytes())
    plans = {}
    for name, library in (("python", ""), ("cpp", str(built / "liblynx_plugin.so"))):
        plan, kernels = str(tmp_path / name), str(tmp_path / "kernels")
        tests = str(Path(__file__).parent)
        script = BUILD_SCRIPT.format(tests=tests, library=library, path=str(path), plan=plan, kernels=kernels)
        with loader.parser_environment() as environment:
            out = run([sys.executable, "-c", script], env=environment)
        assert "{'LynxSelect': 2, 'LynxExperts': 2}" in out
        assert out.split()[-1] == "0" if library else out.split()[-1] != "0"  # the Python plugin stays out of it
        plans[name] = Path(plan).read_bytes()
    assert len(plans["python"]) == len(plans["cpp"])
    for plan in plans.values():
        assert 0 < plan.count(blob) <= 4  # of one node, for each of two profiles, twice at most
    for start in (rb"vote\0.{8}weight", rb"weights\0.{8}" + form.weights.encode()):
        found = {name: re.findall(start + rb".{300}", plan, re.DOTALL) for name, plan in plans.items()}
        assert len(found["python"]) == 4  # two layers, two profiles
        assert found["python"] == found["cpp"]


def test_engines_with_states(built, tmp_path):
    """The same for a layer that keeps states."""
    from trt_graphs import make_state_graph

    for package in ("tensorrt_rtx_bindings", "tensorrt_rtx_libs"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    path = make_state_graph(tmp_path / "model.onnx", "bf16")
    conv = CausalConvSpec(96, 4, "bfloat16", True, "silu")
    attention = LinearAttentionSpec(16, 8, "bfloat16", 4, 2, 4, "gated_delta", 0.25, 1e-6)
    (tmp_path / "kernels").write_bytes(fake_kernels([conv, attention], (90,), 256).to_bytes())
    plans = []
    for library in ("", str(built / "liblynx_plugin.so")):
        plan, kernels = str(tmp_path / "plan"), str(tmp_path / "kernels")
        tests = str(Path(__file__).parent)
        script = BUILD_SCRIPT.format(tests=tests, library=library, path=str(path), plan=plan, kernels=kernels)
        with loader.parser_environment() as environment:
            out = run([sys.executable, "-c", script], env=environment)
        assert "'LynxCausalConv': 1, 'LynxLinearAttention': 1}" in out
        assert (out.split()[-1] == "0") == bool(library)
        plans.append(Path(plan).read_bytes())
    assert len(plans[0]) == len(plans[1])
    found = [re.findall(rb"update_rule\0.{8}gated_delta.{100}", plan, re.DOTALL) for plan in plans]
    assert len(found[0]) == 2  # two profiles
    assert found[0] == found[1]


@pytest.mark.parametrize("weights", ["mxfp4", "fp8", "int4_g32_zeros"])
def test_an_engine_of_wrong_sizes(built, tmp_path, weights):
    """TensorRT knows the sizes while it parses, and stops there; the plugin's words are in its log."""
    from test_tensorrt_build import edit, reshape
    from trt_graphs import make_graph

    hidden, intermediate = sizes_for(weights, (32, 64))
    form = ExpertsForm(weights=weights)
    path = make_graph(tmp_path / "model.onnx", "fp16", hidden=hidden, intermediate=intermediate, form=form)
    edit(path, reshape("down_scale.0", 4, 2 * hidden, FORMATS[weights].scales(intermediate)))
    library, tests = str(built / "liblynx_plugin.so"), str(Path(__file__).parent)
    script = BUILD_SCRIPT.format(
        tests=tests, library=library, path=str(path), plan=str(tmp_path / "plan"), kernels=None
    )
    script = script.replace("os.open(os.devnull, os.O_WRONLY)", "os.dup(1)")
    with loader.parser_environment() as environment:
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "LynxExperts.experts.0: down_scale has E = 4, and gate_up has 8" in done.stdout
    assert "TensorRT can't read" in done.stderr
    assert not (tmp_path / "plan").exists()
