"""The TensorRT backend on a GPU of host memory (`host_gpu.py`): what is bound, copied, padded and captured."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized_models
import tiny_models
from fake_kernels import fake_kernels
from host_gpu import SM, HostGpu, tensorrt_for

from lynx_trt.artifact import DRAWS, Artifact, EngineRecord
from lynx_trt.budgets import Restriction
from lynx_trt.errors import ArtifactError, GenerationError, TensorRTError
from lynx_trt.experts import FORMATS
from lynx_trt.plugins.specs import DrawSpec
from lynx_trt.runtime import open as opening
from lynx_trt.runtime.open import limits_of, open_backend
from lynx_trt.runtime.ort import OrtBackend
from lynx_trt.runtime.sampling import Sampling
from lynx_trt.runtime.trt import TensorRTBackend
from lynx_trt.tensorrt.prepare import prepare

PROMPTS = ["def add(a, b):\n", "i", "class Point:\n    def", "x = ["]
LIMITS = {"decode": ((1, 4), (1, 1)), "prefill": ((1, 2), (2, 8))}


def profile(name: str, batch: tuple[int, int], length: tuple[int, int]) -> dict[str, Any]:
    ends = [(batch[0], length[0]), (batch[0], length[0]), (batch[1], length[1])]
    return {"name": name, "shapes": {"input_ids": ends, "lengths": [(b,) for b, _ in ends]}}


def with_engine(artifact: Artifact, folder: Path, limits: dict[str, Any] | None = None, **changes: Any) -> Artifact:
    """A copy of an artifact that says it has an engine."""
    shutil.copytree(artifact.folder, folder)
    (folder / "engine.plan").write_bytes(b"plan")
    draws = [DrawSpec(artifact.manifest.model.vocabulary, nucleus) for nucleus in (False, True)]
    (folder / DRAWS).write_bytes(fake_kernels(draws, [SM], 64).to_bytes())
    record = EngineRecord(
        **{
            "flavor": "rtx",
            "tensorrt": "1.7.1",
            "expert_weights": "engine",
            "compute_capabilities": [SM],
            "seconds": 1.0,
            "peak_bytes": 1,
            "plan_bytes": 4,
            "plugin_layers": {},
            "profiles": [profile(name, *ranges) for name, ranges in {**LIMITS, **(limits or {})}.items()],
            "tensors": [],
            "external": [],
            "warnings": [],
            **changes,
        }
    )
    return Artifact(folder, artifact.manifest.model_copy(update={"engine": record}))


@pytest.fixture(scope="module")
def engined(text_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return with_engine(text_artifact, tmp_path_factory.mktemp("engined") / "artifact")


def backend_of(artifact: Artifact, slots: int, gpu: HostGpu | None = None, **options: Any) -> TensorRTBackend:
    gpu = gpu or HostGpu()
    return TensorRTBackend(artifact, slots, gpu=gpu, tensorrt=tensorrt_for(artifact, gpu), **options)


def texts(
    artifact: Artifact,
    backend: Any,
    prompts: list[str],
    budget: int = 8,
    new: int = 20,
    floor: float = 0.0,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
) -> list[str]:
    from lynx_trt.artifact import TOKENIZER
    from lynx_trt.runtime.decode import generate
    from lynx_trt.runtime.text import Tokenizer

    sequences, _ = generate(
        backend,
        Tokenizer(artifact.path(TOKENIZER)),
        limits_of(artifact.manifest),
        prompts,
        restriction=Restriction((budget, budget), (floor, floor)),
        max_new_tokens=new,
        sampling=sampling,
    )
    return [one.text for one in sequences]


@pytest.mark.parametrize(("budget", "floor"), [(8, 0.0), (3, 0.0), (8, 0.1)])
@pytest.mark.parametrize("graphs", [True, False])
def test_same_text_as_onnx_runtime(engined: Artifact, budget: int, floor: float, graphs: bool) -> None:
    """Prompts longer than the prefill profile, more of them than it has rows, one of a single token; sizes of decode
    steps that are captured; sequences that end at different times, so that slots are copied."""
    gpu = HostGpu()
    backend = backend_of(engined, len(PROMPTS), gpu, graphs=graphs)
    reference = OrtBackend(engined, len(PROMPTS), threads=1)
    got = texts(engined, backend, PROMPTS, budget, floor=floor)
    assert got == texts(engined, reference, PROMPTS, budget, floor=floor)
    assert (gpu.launches > 0) == graphs
    assert backend.graphs_refused is None


@pytest.mark.parametrize(
    ("sampling", "where"),
    [
        (Sampling(), "greedy"),
        (Sampling(1.0, seed=4), "plain"),
        (Sampling(0.8, 0.9, seed=4, top_k=20), "nucleus"),  # all on the GPU
        (Sampling(3.0, 0.95, seed=4), "host"),  # of 256 tokens more than 64
        (Sampling(0.8, seed=4, min_p=0.05), "host"),
        (Sampling(repetition_penalty=1.3, presence_penalty=0.5), "host"),
    ],
)
def test_tokens_are_drawn_on_the_gpu(engined: Artifact, sampling: Sampling, where: str) -> None:
    """As ONNX Runtime's are on the host; logits come to the host only where a nucleus is large, a row at a time."""
    gpu = HostGpu()
    downloads: list[int] = []
    download = gpu.download
    gpu.download = lambda target, source: (downloads.append(target.nbytes), download(target, source))  # type: ignore
    backend = backend_of(engined, len(PROMPTS), gpu)
    got = texts(engined, backend, PROMPTS, sampling=sampling)
    assert got == texts(engined, OrtBackend(engined, len(PROMPTS), threads=1), PROMPTS, sampling=sampling)
    row = 4 * engined.manifest.model.vocabulary
    assert (max(downloads) == row) == (where == "host")
    assert row not in downloads or where == "host"
    assert set(gpu.driver.drawn) == {"draw_blocks_kernel", "draw_kernel"}


def test_a_chunk_that_ends_no_prompt_draws_nothing(engined: Artifact) -> None:
    """Two chunks of a prompt: the draw is of the second alone."""
    gpu = HostGpu()
    backend = backend_of(engined, 1, gpu)
    texts(engined, backend, ["0123456789abcde"], new=1)  # 15 tokens, 8 a step
    assert gpu.driver.drawn == ["draw_blocks_kernel", "draw_kernel"]


def test_each_size_is_captured_once_with_a_context_of_its_own(engined: Artifact) -> None:
    gpu = HostGpu()
    backend = backend_of(engined, 4, gpu)
    assert backend.sizes.decode_rows == (1, 2, 4)
    engine = backend._rt.engine
    everything = Restriction((8, 8))
    for rows, runs in ((1, 5), (4, 4), (1, 2), (2, 1)):
        for _ in range(runs):
            backend.step(np.full((rows, 1), 65), np.zeros(rows, np.int64), np.ones(rows, np.int64), everything)
    # Two contexts from the start, and one for each of the sizes 1 and 4; size 2 came only once.
    assert len(engine.contexts) == 4
    assert gpu.launches == (5 - 3) + (4 - 3) + 2
    # All share one block of scratch memory.
    assert len({context.scratch for context in engine.contexts}) == 1
    assert engine.kernels == [0] * 4


def test_what_is_captured_has_its_kernels_before(engined: Artifact) -> None:
    """TensorRT for RTX compiles a shape's in the background at first; a graph would keep what it began with."""
    gpu = HostGpu()
    backend = TensorRTBackend(engined, 4, gpu=gpu, tensorrt=tensorrt_for(engined, gpu, rtx=True))
    for _ in range(5):
        backend.step(np.full((1, 1), 65), np.zeros(1, np.int64), np.ones(1, np.int64), Restriction((8, 8)))
    assert backend._rt.engine.kernels == [0, 0, 1]  # decode, prefill, the captured size
    assert gpu.launches == 2


def test_capture_that_is_refused_goes_on_without(engined: Artifact) -> None:
    gpu = HostGpu(captures=False)
    backend = backend_of(engined, 2, gpu)
    assert texts(engined, backend, PROMPTS[:2]) == texts(engined, OrtBackend(engined, 2, threads=1), PROMPTS[:2])
    assert gpu.launches == 0
    assert "CAPTURE_INVALIDATED" in str(backend.graphs_refused)


def test_step_of_one_token_off_the_first_slot(engined: Artifact) -> None:
    """The last piece of a prompt can be one token, at any slot: no captured size, no cache of others touched."""
    gpu = HostGpu()
    backend, reference = backend_of(engined, 3, gpu), OrtBackend(engined, 3, threads=1)
    everything = Restriction((8, 8))
    for one in (backend, reference):
        one.step(np.array([[65, 66, 67], [70, 71, 72]]), np.zeros(2, np.int64), np.array([3, 3]), everything, first=1)
    before = _slot(backend, gpu, 2)
    results = [
        one.step(np.array([[80]]), np.array([3]), np.array([1]), everything, first=1) for one in (backend, reference)
    ]
    np.testing.assert_array_equal(_slot(backend, gpu, 2), before)
    np.testing.assert_allclose(results[0].logits, results[1].logits, atol=1e-5)
    np.testing.assert_array_equal(results[0].active, results[1].active)


def _slot(backend: TensorRTBackend, gpu: HostGpu, slot: int) -> Any:
    gpu.synchronize()
    return np.concatenate([gpu.view(c.address + slot * c.slot, c.slot).copy() for c in backend._caches])


def test_copy_and_clear_slot(engined: Artifact) -> None:
    gpu = HostGpu()
    backend = backend_of(engined, 3, gpu)
    everything = Restriction((8, 8))
    backend.step(np.array([[65, 66, 67, 68]]), np.zeros(1, np.int64), np.array([4]), everything, first=2)
    backend.copy_slot(2, 0, 3)
    gpu.synchronize()
    rows = engined.manifest.model.cache_rows
    for cache in backend._caches:
        kept = [
            gpu.view(cache.address + slot * cache.slot, cache.slot).reshape(cache.heads, rows, -1) for slot in range(3)
        ]
        np.testing.assert_array_equal(kept[0][:, :3], kept[2][:, :3])
        assert not kept[0][:, 3:].any()
        assert kept[2][:, 3].any()
    backend.clear_slot(2)
    assert not _slot(backend, gpu, 2).any()
    assert _slot(backend, gpu, 0).any()


def test_expert_weights_from_their_file(text_artifact: Artifact, tmp_path: Path, monkeypatch: Any) -> None:
    """External weights reach the device byte for byte, in pieces, one copy whatever the number of contexts."""
    monkeypatch.setattr("lynx_trt.runtime.trt.UPLOAD_BYTES", 1000)
    file, data = "experts.safetensors", np.random.default_rng(0).bytes(8000)
    items = [
        {"name": name, "dtype": "float32", "shape": [1], "file": file, "offset": offset, "length": length}
        for name, offset, length in (("layer.0", 512, 4096), ("layer.1", 5000, 2500))
    ]
    artifact = with_engine(text_artifact, tmp_path / "artifact", expert_weights="external", external=items)
    artifact.path(file).write_bytes(data)
    gpu = HostGpu()
    backend = backend_of(artifact, 1, gpu)
    for item in items:
        there = gpu.view(backend._experts[str(item["name"])], int(str(item["length"])))
        start = int(str(item["offset"]))
        assert there.tobytes() == data[start : start + there.size]
    artifact.path(file).write_bytes(data[:600])
    with pytest.raises(ArtifactError, match=r"can't be read .*copy or build the artifact again"):
        backend_of(artifact, 1)


def test_text_with_expert_weights_outside(text_artifact: Artifact, tmp_path: Path) -> None:
    """The engine finds in the GPU's memory what the record of the build says lies there."""
    external = prepare(text_artifact.path("model.onnx"), expert_weights="external").external
    assert len(external) == 2 * len(text_artifact.manifest.model.moe_layers)
    items = [asdict(item) for item in external]
    artifact = with_engine(text_artifact, tmp_path / "artifact", expert_weights="external", external=items)
    backend, reference = backend_of(artifact, 2), OrtBackend(artifact, 2, threads=1)
    assert {item["name"] for item in items} <= set(backend._rt.engine.inputs)
    assert texts(artifact, backend, ["abc", "de"]) == texts(artifact, reference, ["abc", "de"])


def stored_in(weights: str, checkpoint: Callable[[str], Path], folder: Path) -> Path:
    """A checkpoint whose experts are stored so."""
    if weights == "mxfp4":
        return quantized_models.mxfp4(checkpoint("gpt_oss"), folder / "checkpoint")
    model = tiny_models.random_model("qwen3_moe", hidden_size=256, moe_intermediate_size=128)
    if weights == "fp8":
        return quantized_models.fp8(tiny_models.save(model, folder / "full"), folder / "checkpoint", (128, 128))
    method = "packed" if FORMATS[weights].zeros else "symmetric"
    full = tiny_models.save(model.half(), folder / "full")
    return quantized_models.integers(full, folder / "checkpoint", method=method, group=FORMATS[weights].block)


SLOW_WEIGHTS = [pytest.param(name, marks=pytest.mark.slow) for name in ("mxfp4", "int4_g128", "int4_g32_zeros")]


@pytest.mark.parametrize("weights", ["fp8", *SLOW_WEIGHTS])
def test_quantized_expert_weights_outside(
    weights: str, checkpoint: Callable[[str], Path], build_quietly: Callable[..., Artifact], tmp_path: Path
) -> None:
    """The same of quantized experts: what the engine is given are their own bytes, of int8, and the scales."""
    stored = stored_in(weights, checkpoint, tmp_path)
    built = build_quietly(stored, tmp_path / "built", precision="fp16", preset="lynx")
    items = [asdict(item) for item in prepare(built.path("model.onnx"), expert_weights="external").external]
    layers = built.manifest.model.moe_layers
    assert [layer.form["weights"] for layer in layers] == [weights] * len(layers)
    kinds = [str(item["dtype"]) for item in items]
    # Small scales are in the ONNX file itself.
    if weights == "mxfp4":
        assert kinds.count("int8") >= 3 * len(layers)
    else:
        scale = "float32" if weights == "fp8" else "float16"  # the model's own precision
        assert (kinds.count("int8"), kinds.count(scale)) == (2 * len(layers), 2 * len(layers))
        assert len(kinds) == 4 * len(layers)
    outside = with_engine(built, tmp_path / "outside", expert_weights="external", external=items)
    backend, reference = backend_of(outside, 2), backend_of(with_engine(built, tmp_path / "inside"), 2)
    everything = Restriction((layers[0].experts,) * len(layers))
    ids, past, lengths = np.array([[65, 66, 67, 68], [5, 6, 7, 0]]), np.zeros(2, np.int64), np.array([4, 3])
    for step in ((ids, past, lengths), (ids[:, :1], lengths, np.ones(2, np.int64))):
        found, right = (each.step(*step, everything).logits.copy() for each in (backend, reference))
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found, right)


def test_profiles_that_do_not_fit(text_artifact: Artifact, engined: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"5 sequences at a time, .* decodes 4 at most: .*--decode-batch 1:8:5"):
        backend_of(engined, 5)
    two = with_engine(text_artifact, tmp_path / "two", {"prefill": ((2, 4), (2, 8))})
    with pytest.raises(ArtifactError, match=r"no fewer than 2 sequences .*--prefill-batch 1:1:4"):
        backend_of(two, 1)
    none = with_engine(text_artifact, tmp_path / "none", profiles=[])
    with pytest.raises(ArtifactError, match="no profile decode"):
        backend_of(none, 1)


def test_least_sizes_are_filled_up(text_artifact: Artifact, tmp_path: Path) -> None:
    """An engine that decodes no fewer than 2 rows and prefills no fewer than 6 tokens."""
    artifact = with_engine(
        text_artifact, tmp_path / "artifact", {"decode": ((2, 4), (1, 1)), "prefill": ((1, 2), (6, 8))}
    )
    backend = backend_of(artifact, 1)
    assert (backend.slots, backend.sizes.decode_rows) == (2, (2,))
    reference = OrtBackend(artifact, 1, threads=1)
    assert texts(artifact, backend, ["abc"]) == texts(artifact, reference, ["abc"])


def test_a_prompt_of_one_token_is_no_decode_step_of_more_rows(text_artifact: Artifact, tmp_path: Path) -> None:
    artifact = with_engine(
        text_artifact, tmp_path / "artifact", {"decode": ((2, 4), (1, 1)), "prefill": ((1, 2), (1, 8))}
    )
    reference, everything = OrtBackend(artifact, 3, threads=1), Restriction((8, 8))
    steps = [
        backend.step(np.array([[65]]), np.zeros(1, np.int64), np.array([1]), everything, first=2).logits
        for backend in (backend_of(artifact, 3), reference)
    ]
    np.testing.assert_allclose(steps[0], steps[1], rtol=1e-4, atol=1e-4)
    # Nine tokens are a chunk of eight and one of one.
    assert texts(artifact, backend_of(artifact, 1), ["abcdefghi"]) == texts(artifact, reference, ["abcdefghi"])


def test_steps_that_do_not_fit(engined: Artifact) -> None:
    backend = backend_of(engined, 2)
    everything = Restriction((8, 8))
    rows = engined.manifest.model.cache_rows
    with pytest.raises(GenerationError, match=f"exceeds {rows} rows"):
        backend.step(np.zeros((1, 3), np.int64), np.array([rows - 2]), np.array([3]), everything)
    with pytest.raises(GenerationError, match=r"1 sequences of 9 tokens is outside the engine's profiles: input_ids"):
        backend.step(np.zeros((1, 9), np.int64), np.array([0]), np.array([9]), everything)


def test_engine_that_tensorrt_refuses(engined: Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(engined.folder, tmp_path / "artifact"))
    broken = Artifact(folder, engined.manifest)
    (folder / "engine.plan").write_bytes(b"another")
    with pytest.raises(ArtifactError, match=r"can't load .*engine\.plan: the engine is of another version; .*inspect"):
        backend_of(broken, 1)
    (folder / "engine.plan").unlink()
    with pytest.raises(ArtifactError, match=r"engine\.plan can't be read"):
        backend_of(broken, 1)


def test_a_gpu_that_this_tensorrt_does_not_run_on(engined: Artifact) -> None:
    """Said before TensorRT is asked, in our words; an engine of full TensorRT has no such limit."""
    gpu = HostGpu()
    gpu.driver.sm = 90
    asked: list[bytes] = []
    tensorrt = tensorrt_for(engined, gpu)
    tensorrt.Runtime.deserialize_cuda_engine = lambda _, plan: asked.append(bytes(plan))
    with pytest.raises(ArtifactError, match=r"can't run here: .* SM 80, 86, 89, 120 and later, not on SM 90; .*full"):
        TensorRTBackend(engined, 1, gpu=gpu, tensorrt=tensorrt)
    assert asked == []
    assert engined.manifest.engine
    engine = engined.manifest.engine.model_copy(update={"flavor": "full"})
    full = Artifact(engined.folder, engined.manifest.model_copy(update={"engine": engine}))
    with pytest.raises(ArtifactError, match="TensorRT can't load"):
        TensorRTBackend(full, 1, gpu=gpu, tensorrt=tensorrt)
    assert asked == [b"plan"]


def test_draws_that_are_none(engined: Artifact, tmp_path: Path) -> None:
    """Their file is missing, cut off, or of another GPU's kernels."""
    folder = Path(shutil.copytree(engined.folder, tmp_path / "artifact"))
    broken = Artifact(folder, engined.manifest)
    path = folder / DRAWS
    data = path.read_bytes()
    for written, words in (
        (data[:-40], "GPU kernels can't be read"),
        (fake_kernels([DrawSpec(engined.manifest.model.vocabulary, False)], [80], 64).to_bytes(), f"SM 80.* SM {SM}"),
    ):
        path.write_bytes(written)
        with pytest.raises(ArtifactError, match=words):
            backend_of(broken, 1)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"draws\.kernels, the kernels that draw tokens, can't be read"):
        backend_of(broken, 1)


def test_close_gives_everything_back(engined: Artifact) -> None:
    gpu = HostGpu()
    backend = backend_of(engined, 1, gpu)
    backend.close()
    assert gpu.closed


# --- Which backend.


def test_auto_takes_the_engine_only_where_it_fits(engined: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr("lynx_trt.runtime.trt.TensorRTBackend", lambda *_: made.append("tensorrt"))
    monkeypatch.setattr("lynx_trt.runtime.ort.OrtBackend", lambda *_, **__: made.append("onnxruntime"))
    problems: list[str] = []
    monkeypatch.setattr("lynx_trt.preflight.engine_problems", lambda _: problems)
    open_backend(engined, 1)
    open_backend(engined, 1, name="onnxruntime")
    problems.append("the engine has kernels for SM 80, and this GPU is SM 90")
    open_backend(engined, 1)
    assert made == ["tensorrt", "onnxruntime", "onnxruntime"]
    with pytest.raises(ArtifactError, match=r"can't run here: the engine has kernels for SM 80"):
        open_backend(engined, 1, name="tensorrt")


def test_no_gpu_is_said(engined: Artifact) -> None:
    from lynx_trt.tensorrt.gpu import compute_capabilities

    if compute_capabilities():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ArtifactError, match="there is no GPU that the CUDA driver reports"):
        open_backend(engined, 1, name="tensorrt")
    assert not opening.backend_available("tensorrt")
    assert opening.backend_available("onnxruntime")


def test_cuda_without_a_driver() -> None:
    """No `cuda-python`, or no driver: a sentence in either case."""
    from lynx_trt.runtime.cuda import Cuda
    from lynx_trt.tensorrt.gpu import compute_capabilities

    if compute_capabilities():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TensorRTError, match=r"cuda-python|driver"):
        Cuda()


def test_artifact_without_engine(text_artifact: Artifact, build_quietly: Callable[..., Artifact]) -> None:
    with pytest.raises(ArtifactError, match="there is no engine: "):
        open_backend(text_artifact, 1, name="tensorrt")
