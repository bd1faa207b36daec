"""What does latent attention cost a step, with two caches a layer or one, and with heads apart or folded?

    git worktree add /tmp/before f5a3413
    python benchmarks/latent_attention.py --before /tmp/before

First the decode attention of DeepSeek-V2-Lite's sizes (16 heads of 512 + 64 values, 2048 rows of cache) in each form:
ONNX Runtime in float32 on one thread, milliseconds of CPU time, and the scratch memory of an engine of TensorRT for RTX
in float16 for 16 sequences. Then a model of three such layers, small elsewhere, as a checkout of before and this one
build and run it: milliseconds of a step on all cores, memory at the peak, the engine's memory. Medians of rounds in
which all take turns. It takes some minutes; everything goes to benchmarks/results/latent_attention.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from serving_common import RESULTS, where

from lynx_trt.tensorrt import loader

ROOT = Path(__file__).resolve().parents[1]
HEADS, LATENT, TURNED, ROWS = 16, 512, 64, 2048
WHOLE = LATENT + TURNED
# Sequences, tokens of each, rows that the cache has already.
STEPS = ((16, 1, 100), (16, 1, 1000), (16, 1, 2000), (1, 1, 2000), (1, 256, 0), (1, 256, 1000), (4, 128, 500))
BATCHES = {"decode": (1, 16, 16), "prefill": (1, 1, 2)}
LENGTHS = {"decode": (1, 1, 1), "prefill": (1, 256, 512)}

CACHES = {"two": {"latent": LATENT, "turned": TURNED}, "one": {"row": WHOLE}}
TWO = "key = Concat <axis=-1> (used_latent, used_turned)"
ONE, ONE_ROW = "key = Identity(used_row)", "row = Concat <axis=-1> (latent, turned)"
ATTENTION = "Attention <is_causal={causal}, scale=0.07>"
APART = f"all = {ATTENTION.format(causal=1)} (q, key, key, , , , ends) out = Slice(all, zero, width, three)"
SLICED = f"value = Slice(key, zero, width, three) out = {ATTENTION.format(causal=1)} (q, key, value, , , , ends)"
FOLDED = f"""heads = Reshape(q, folded) all = {ATTENTION.format(causal=0)} (heads, key, key, , , , ends)
    some = Slice(all, zero, width, three) out = Reshape(some, apart)"""
FORMS = {
    "two caches": ("two", TWO, APART),
    "one cache": ("one", ONE, APART),
    "one cache, value cut out": ("one", ONE, SLICED),
    "two caches, heads folded": ("two", TWO, FOLDED),
    "one cache, heads folded": ("one", ONE, FOLDED),
}


def form_model(form: str, kind: str, *, cut: bool) -> Any:
    """The graph of one decode attention; with `cut` it sees the cache up to `longest`, as in ONNX Runtime."""
    import onnx.parser

    caches, key, attention = FORMS[form]
    sizes = CACHES[caches]
    past = "".join(f", {kind}[b,1,{ROWS},{size}] past_{name}" for name, size in sizes.items())
    present = "".join(f", {kind}[b,1,{ROWS},{size}] present_{name}" for name, size in sizes.items())
    lines = [ONE_ROW] if caches == "one" else []
    for name in sizes:
        lines.append(f"present_{name} = TensorScatter <axis=2> (past_{name}, {name}, past)")
        used = f"Slice(present_{name}, zero, longest, two)" if cut else f"Identity(present_{name})"
        lines.append(f"used_{name} = {used}")
    constants = {"zero": "[1] {0}", "two": "[1] {2}", "three": "[1] {3}", "width": f"[1] {{{LATENT}}}"}
    constants |= {"folded": f"[4] {{0,1,-1,{WHOLE}}}", "apart": f"[4] {{0,{HEADS},-1,{LATENT}}}"}
    given = ", ".join(f"int64{value.replace(' ', f' {name} = ', 1)}" for name, value in constants.items())
    inputs = (
        f"{kind}[b,{HEADS},1,{WHOLE}] q, {kind}[b,1,1,{LATENT}] latent, {kind}[b,1,1,{TURNED}] turned, int64[b] past"
    )
    inputs += ", int64[b] ends" + (", int64[1] longest" if cut else "")
    return onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["" : 24]>
        form ({inputs}{past}) => ({kind}[b,{HEADS},1,{LATENT}] out{present}) <{given}>
        {{ {" ".join((*lines, key, attention))} }}"""
    )


def time_forms(batch: int, rows: int, rounds: int) -> dict[str, float]:
    """Milliseconds of CPU time of each form, the cache in place."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    random = np.random.default_rng(0)
    ends = np.full(batch, rows + 1)
    inputs = {"past": ends - 1, "ends": ends, "longest": ends[:1]}
    for name, shape in {"q": (HEADS, 1, WHOLE), "latent": (1, 1, LATENT), "turned": (1, 1, TURNED)}.items():
        inputs[name] = random.standard_normal((batch, *shape), np.float32)
    bindings, kept = {}, []
    for form, (caches, _, _) in FORMS.items():
        model = form_model(form, "float", cut=True).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name in {value.name for value in session.get_inputs()} & set(inputs):
            binding.bind_cpu_input(name, inputs[name])
        for name, size in CACHES[caches].items():
            cache = random.standard_normal((batch, 1, ROWS, size), np.float32)
            kept.append(cache)
            for bind, prefix in ((binding.bind_input, "past"), (binding.bind_output, "present")):
                bind(f"{prefix}_{name}", "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
        binding.bind_output("out", "cpu")
        bindings[form] = session, binding
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(rounds + 2):
        for form, (session, binding) in bindings.items():
            started = time.process_time()
            session.run_with_iobinding(binding)
            seconds[form].append(time.process_time() - started)
    return {form: round(float(np.median(times[2:])) * 1e3, 3) for form, times in seconds.items()}


def engine_memory(model: bytes, folder: str, shapes: list[dict[str, Any]]) -> list[float] | str:
    """MB of scratch memory of each profile of an engine of TensorRT for RTX; or why it takes no such graph."""
    from lynx_trt.plugins import python_plugin

    trt = loader.load("rtx").module
    python_plugin.register(trt)
    said: list[tuple[bool, str]] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            said.append((severity == trt.ILogger.Severity.ERROR, text))

    logger = Logger()
    builder = trt.Builder(logger)
    network, config = builder.create_network(0), builder.create_builder_config()
    parser = trt.OnnxParser(network, logger)
    parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse(model, folder):
        reason = next(text for error, text in said if error)
        return re.sub(r".*Usage Error \([^:]*: (.*?) In .*", r"\1", reason.splitlines()[0])
    for each in shapes:
        profile = builder.create_optimization_profile()
        for name, sizes in each.items():
            profile.set_shape(name, *(tuple(size) for size in sizes))
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    found = [re.search(r"Total Activation Memory: (\d+)", text) for _, text in said]
    return [round(int(each[1]) / 1e6, 1) for each in found if each]


def form_memory(form: str) -> float | str:
    """Of a decode step of 1 to 16 sequences."""
    model = form_model(form, "float16", cut=False)
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.add(name="TRT_decomposable", type=2, i=1)
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    shapes = {name: [[batch, *size[1:]] for batch in BATCHES["decode"]] for name, size in sizes.items()}
    found = engine_memory(model.SerializeToString(), "", [shapes])
    return found if isinstance(found, str) else found[0]


# --- A model, before and now.


def make_checkpoint(folder: Path) -> None:
    """Three layers with attention of DeepSeek-V2-Lite's sizes."""
    import transformers

    config = transformers.DeepseekV2Config(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=TURNED,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        max_position_embeddings=ROWS,
    )
    transformers.set_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def package(checkout: Path, folder: Path) -> dict[str, str]:
    """The environment in which a checkout's packages are found before any that is installed."""
    links = folder / "lynx_trt"
    links.mkdir(parents=True)
    for path in (*(checkout / "lynx_trt").iterdir(), *(checkout / name for name in ("export", "plugins", "models"))):
        (links / path.name).symlink_to(path.resolve())
    return {**os.environ, "PYTHONPATH": str(folder)}


class Side:
    """A checkout: it builds the model and runs it in a process of its own, one request a line."""

    def __init__(self, checkout: Path, checkpoint: Path, folder: Path) -> None:
        environment = package(checkout, folder)
        python, artifact = sys.executable, str(folder / "artifact")
        build = [python, "-m", "lynx_trt.build", str(checkpoint), "-o", artifact, "--precision", "fp16"]
        build += ["--max-length", str(ROWS), "--tensorrt", "rtx"]
        for name in BATCHES:
            build += [f"--{name}-batch", ":".join(map(str, BATCHES[name]))]
        build += ["--prefill-length", ":".join(map(str, LENGTHS["prefill"]))]
        subprocess.run(build, env=environment, cwd=folder, check=True, capture_output=True)  # noqa: S603
        worker = [python, __file__, "--worker", artifact]
        self._process = subprocess.Popen(  # noqa: S603
            worker, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *request: Any) -> Any:
        """Milliseconds of a step, or with no step the memory."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def worker(folder: Path) -> None:
    """Answer requests until there are none."""
    from lynx_trt.artifact import open_artifact
    from lynx_trt.inspect import cache_bytes
    from lynx_trt.runtime.ort import OrtBackend
    from lynx_trt.tensorrt.prepare import prepare

    artifact = open_artifact(folder)
    backend = OrtBackend(artifact, 16, form="auto")
    random = np.random.default_rng(0)
    for cache in backend._caches.values():
        random.standard_normal(dtype=np.float32, out=cache)
    restriction = artifact.manifest.selection.restriction
    for line in sys.stdin:
        if step := json.loads(line):
            batch, length, rows = step
            ids = random.integers(3, 2000, (batch, length))
            started = time.perf_counter()
            backend.step(ids, np.full(batch, rows), np.full(batch, length), restriction)
            answer: Any = (time.perf_counter() - started) * 1e3
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            engine = artifact.manifest.engine
            assert engine
            path = folder / "model.onnx"
            with redirect_stdout(sys.stderr):
                prepared = prepare(path).model.SerializeToString()
                memory = engine_memory(prepared, str(path), [profile["shapes"] for profile in engine.profiles])
            names = [profile["name"] for profile in engine.profiles]
            answer = {
                "cache MB a sequence": round(cache_bytes(artifact.manifest) / 1e6, 2),
                "peak MB in ONNX Runtime": round(peak / 1e3),
                "engine's scratch MB": dict(zip(names, memory, strict=True)),
            }
        print(json.dumps(answer), flush=True)


def compare(before: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of each step and memory, before and now."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder / "checkpoint")
        sides = {n: Side(c, folder / "checkpoint", folder / n) for n, c in (("before", before), ("now", ROOT))}
        steps = {}
        for step in STEPS:
            times: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(rounds + 2):
                for name, side in sides.items():
                    times[name].append(side.ask(*step))
            medians = {name: round(float(np.median(each[2:])), 2) for name, each in times.items()}
            batch, length, rows = step
            label = f"{batch} x {length} tokens behind {rows}"
            steps[label] = medians | {"ratio": round(medians["before"] / medians["now"], 2)}
        memory = {name: side.ask() for name, side in sides.items()}
        for side in sides.values():
            side.close()
    return {"ms": steps, "memory": memory}


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout that has latent attention, of before")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS / "latent_attention.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    record = where()
    del record["server"]
    record["tensorrt-rtx"] = loader.load("rtx").version
    decode = [(batch, rows) for batch, length, rows in STEPS if length == 1]
    record["forms"] = {
        "ms of CPU": {f"{b} x 1 behind {rows}": time_forms(b, rows, options.rounds) for b, rows in decode},
        "engine's scratch MB": {form: form_memory(form) for form in FORMS},
    }
    if options.before:
        git = ["git", "-C", str(options.before), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
        record["model"] = {"before": commit, **compare(options.before, options.rounds)}
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: record[key] for key in ("forms", "model") if key in record}, indent=2))


if __name__ == "__main__":
    main()
