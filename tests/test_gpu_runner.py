"""`make gpu` without a GPU: the runner with parts that fail, hang or are missing; the verdicts; the scripts in tiny."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_path import BENCHMARKS
from dry_runs import dry_run
from fake_kernels import FakeDriver, fake_kernels

# isort: split
import gpu
import gpu_layer
import gpu_select
import gpu_targets
import gpu_vllm
from gpu import Part, Runner
from gpu_common import ROOT, Options, Report
from gpu_timing import AbsentError, measure, summary

from lynx_trt.plugins import execute
from lynx_trt.plugins.blob import lookup
from lynx_trt.plugins.plan import find_plan

# ------------------------------------------------------------------------------------------------ the runner

GOOD = """
import json, pathlib, sys
pathlib.Path(sys.argv[sys.argv.index("--output") + 1]).write_text(json.dumps({"rows": [], "said": sys.argv[1:]}))
"""
BROKEN = """
print("all is well so far")
raise SystemExit("error: the GPU is on fire")
"""
# Records something, starts a process of its own, and never ends.
HANGS = """
import json, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[sys.argv.index("--output") + 1]).write_text(json.dumps({"rows": [], "child": child.pid}))
time.sleep(600)
"""


def fake(folder: Path, name: str, source: str, *, weight: float = 1.0, timed: bool = False) -> Part:
    path = folder / f"{name}.py"
    path.write_text(source)
    return Part(name, (sys.executable, str(path)), weight, timed=timed)


def run(folder: Path, parts: list[Part], minutes: float = 0.5) -> dict[str, Any]:
    with (folder / "log.txt").open("w") as log:
        Runner(folder, minutes, log).run(parts)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def gone(pid: int) -> bool:
    """Whether a process has ended, or will be no more than a name once its parent looks."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_failed_part_is_written_down_and_the_next_begins(tmp_path: Path) -> None:
    parts = [
        fake(tmp_path, "broken", BROKEN),
        Part("missing", (sys.executable, str(tmp_path / "nowhere.py")), 1.0),
        fake(tmp_path, "good", GOOD, timed=True),
    ]
    found = run(tmp_path, parts)["parts"]
    assert [found[name]["status"] for name in ("broken", "missing", "good")] == ["failed", "missing", "ok"]
    assert found["broken"]["exit_code"] == 1
    assert found["broken"]["summary"] == "error: the GPU is on fire"
    assert "all is well so far" in found["broken"]["tail"]
    assert found["missing"]["summary"] == "nowhere.py is not here"
    # Told how long it may begin something new, which is before it would be ended.
    said = found["good"]["result"]["said"]
    assert 0 < float(said[said.index("--seconds") + 1]) < found["good"]["limit"] <= 30
    assert (tmp_path / "table.md").read_text().startswith("| target | wanted | measured |")
    assert not list(tmp_path.glob("*.part"))


def test_a_part_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    """What it had recorded stays, and the rest of the time is the next one's."""
    started = time.monotonic()
    found = run(tmp_path, [fake(tmp_path, "hangs", HANGS), fake(tmp_path, "good", GOOD)], minutes=0.3)["parts"]
    assert time.monotonic() - started < 60
    assert found["hangs"]["status"] == "timed out"
    assert found["hangs"]["exit_code"] is None
    child = found["hangs"]["result"]["child"]
    until = time.monotonic() + 10
    while not gone(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert gone(child)
    assert found["good"]["status"] == "ok"


def test_a_killed_run_keeps_what_it_had(tmp_path: Path) -> None:
    fake(tmp_path, "good", GOOD)
    fake(tmp_path, "hangs", HANGS)
    source = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
import gpu
folder = Path({str(tmp_path)!r})
parts = [gpu.Part(name, (sys.executable, str(folder / (name + ".py"))), 1.0, timed=False) for name in ("good", "hangs")]
gpu.Runner(folder, 5.0, (folder / "log.txt").open("w")).run(parts)
"""
    process = subprocess.Popen([sys.executable, "-c", source], start_new_session=True)
    results = tmp_path / "results.json"
    until = time.monotonic() + 40
    found: dict[str, Any] = {}
    while time.monotonic() < until and "result" not in found.get("hangs", {}):
        time.sleep(0.2)
        if results.exists():
            found = json.loads(results.read_text())["parts"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What the killed runner could not end: the part, which leads a session of its own.
    child = found["hangs"]["result"]["child"]
    os.killpg(os.getpgid(child), signal.SIGKILL)
    found = json.loads(results.read_text())["parts"]
    assert found["good"]["status"] == "ok"
    assert found["hangs"]["status"] == "running"


def test_several_runs_are_one(tmp_path: Path) -> None:
    """A lease that takes two commands: a part that is ok beats one that isn't, whichever came first."""
    for name, parts in (
        ("one", {"machine": {"status": "ok", "result": {"rows": [1]}}, "select": {"status": "failed"}}),
        ("two", {"machine": {"status": "timed out"}, "select": {"status": "ok", "result": {"rows": []}}}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(
            json.dumps({"environment": {"commit": name}, "minutes": 9, "parts": parts})
        )
    gpu.merge([tmp_path / "one", tmp_path / "two"], tmp_path)
    merged = json.loads((tmp_path / "results.json").read_text())
    assert {name: part["status"] for name, part in merged["parts"].items()} == {"machine": "ok", "select": "ok"}
    assert [run["commit"] for run in merged["runs"]] == ["one", "two"]


def test_the_table_that_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the tuner runs with its table, so a copy of it is part of the results."""
    table = tmp_path / "launch_table.py"
    table.write_text("measured")
    monkeypatch.setattr(gpu, "TABLE", table)
    results = tmp_path / "results"
    results.mkdir()
    run(results, [fake(tmp_path, "tune", GOOD)])
    assert (results / "launch_table.py").read_text() == "measured"


def test_every_part_has_its_script(tmp_path: Path) -> None:
    """And they come in the order that is asked for, launches measured before whatever runs with them."""
    options = argparse.Namespace(dry_run=False, vllm=None, kit=tmp_path, tune=True, part=None, output=tmp_path)
    parts = gpu.parts(options)
    assert all(part.script is None or part.script.exists() for part in parts)
    names = [part.name.split("-")[0] for part in parts]
    assert list(dict.fromkeys(names)) == [
        *("machine", "tune", "engine", "compile", "kernels", "select", "states", "decode", "prefill", "model"),
        "end_to_end",
    ]
    assert [part.name for part in gpu.parts(argparse.Namespace(**{**vars(options), "part": ["decode"]}))] == [
        f"decode-{model}" for model in gpu_layer.MODELS
    ]


def test_packages_are_found_without_an_installation_and_without_pydantic() -> None:
    """The machine has no pydantic: what the kernels need must not ask for it."""
    gpu.links()
    source = """
import sys
sys.modules.update(dict.fromkeys(("pydantic", "polygraphy", "tensorrt"), None))
# Nor is an installation of the project to be what it is found by.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path.insert(0, "../../benchmarks")
import gpu_layer, gpu_peers, gpu_timing
import lynx_trt.plugins.aot, lynx_trt.plugins.tune, lynx_trt.plugins.launcher, lynx_trt.plugins.python_plugin
print(lynx_trt.plugins.tune.__file__)
"""
    said = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        cwd=gpu.WORK,
        env=gpu.child_environment(),
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert Path(said.stdout.strip()).is_relative_to(gpu.WORK)


def test_wrong_minutes() -> None:
    said = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--minutes", "0"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 1
    assert said.stderr == "error: --minutes is 0: it has to be more than 0\n"


# ------------------------------------------------------------------------------------------------ the verdicts


def row(contender: str, us: float | None, **values: Any) -> dict[str, Any]:
    base = {"model": "mixtral-8x7b", "tokens": 16, "fraction": 1.0, "active": 8.0, "bandwidth_share": 0.9}
    base |= {"matmul_share": 0.9, "contender": contender}
    return {**base, **({} if us is None else {"us": us}), **values}


def verdict(rows: list[dict[str, Any]], part: str, target: str) -> gpu_targets.Verdict:
    (found,) = [v for v in gpu_targets.verdicts({part: {"result": {"rows": rows}}}) if v.target.startswith(target)]
    return found


def test_nothing_measured_is_neither_met_nor_missed() -> None:
    assert {v.passed for v in gpu_targets.verdicts({})} == {None}
    assert {v.passed for v in gpu_targets.verdicts({"engine": {"status": "missing"}, "decode": {}})} == {None}


@pytest.mark.parametrize(("share", "passed"), [(0.86, True), (0.84, False)])
def test_every_batch_has_to_reach_the_bandwidth(share: float, passed: bool) -> None:
    rows = [row("lynx", 9.0, bandwidth_share=0.9, tokens=1), row("lynx", 9.0, bandwidth_share=share, tokens=32)]
    rows += [row("lynx", 9.0, bandwidth_share=0.1, tokens=64), row("dense", 9.0, bandwidth_share=0.1)]
    found = verdict(rows, "decode-mixtral-8x7b", "decode, Mixtral-8x7B")
    assert found.passed is passed
    assert f"{share:.1%}" in found.measured


def test_the_best_right_peer_is_the_one_to_beat() -> None:
    """A peer that is wrong or did not run is no time to beat; a slower one doesn't excuse."""
    rows = [row("lynx", 10.0), row("dense", 30.0, right=True), row("grouped_mm", 9.0, right=False), row("vllm", None)]
    assert verdict(rows, "decode", "decode: never").passed is True
    found = verdict([*rows, row("grouped_mm", 9.0, right=True)], "decode", "decode: never")
    assert found.passed is False
    assert "0.90x (mixtral-8x7b, T=16, grouped_mm)" in found.measured


def test_half_of_the_experts_against_the_fastest_of_anyone() -> None:
    """The layer with its selection, against LynxExperts alone or a peer, whichever is faster."""
    rows = [row("lynx", 100.0), row("lynx_layer", 105.0), row("grouped_mm", 90.0)]
    rows += [row("lynx_layer", 60.0, fraction=0.5), row("lynx", 1.0, fraction=0.5)]
    found = verdict(rows, "decode", "layer at 50%")
    assert found.passed is False
    assert "1.50x" in found.measured
    assert verdict([*rows[:2], *rows[3:]], "decode", "layer at 50%").passed is True


def test_quantized_weights_are_beside_the_same_in_full_and_no_target() -> None:
    """Peers that have all of the weights are none to beat, and no share of the matmul rate is asked."""
    full, packed = {"model": "gpt-oss-120b"}, {"model": "gpt-oss-120b-mxfp4"}
    rows = [row("lynx", 100.0, tokens=n, **full) for n in (1, 16)] + [row("lynx", 40.0, tokens=1, **packed)]
    rows += [row("lynx", 50.0, **packed), row("lynx", 7.0, tokens=64, **packed), row("vllm", 10.0, **packed)]
    found = verdict(rows, "decode", "decode: LynxExperts with quantized")
    assert found.passed is None
    assert found.measured == "gpt-oss-120b-mxfp4: median 2.25x, 2.00x to 2.50x of 2 points"
    assert verdict(rows, "decode", "decode: never").measured == "not measured"
    assert verdict([row("lynx", 1.0, right=False, **packed)], "decode", "error against").passed is False


def test_the_fixed_cost_is_where_the_line_begins() -> None:
    """15 us and 2 us an expert."""
    rows = [row("lynx_layer", 15 + 2 * n, active=n, fraction=n / 8) for n in (8, 6, 4, 2)]
    found = verdict(rows, "decode", "fixed cost")
    assert found.passed is True
    assert "worst 15.0 us (mixtral-8x7b, 2.00 us an expert)" in found.measured
    assert verdict(rows[:2], "decode", "fixed cost").passed is None


def test_one_wrong_result_is_named() -> None:
    rows = [
        row("lynx", 9.0, right=True),
        row("lynx_layer", 9.0, right=False, error=0.5),
        row("dense", 1.0, right=False),
    ]
    found = verdict(rows, "prefill", "error against float64")
    assert found.passed is False
    assert found.measured == "1 of 2; not mixtral-8x7b, T=16 (lynx_layer: 0.5)"
    failed = verdict([row("lynx", None, failed="RuntimeError: no")], "decode", "error against float64")
    assert failed.passed is False
    assert "RuntimeError: no" in failed.measured


def test_nan_is_no_error_that_passes() -> None:
    nan = float("nan")
    found = gpu_layer.error_columns({"lynx": {"error": nan, "worst": nan}, "pytorch": {"error": 0.1}}, "lynx")
    assert found == {"error": None, "worst": None, "error_pytorch": 0.1, "right": False}


def test_engines_and_tests() -> None:
    """The lines that the engine's part and pytest end with."""
    engine = {"status": "failed", "result": {"answer": "it runs", "rows": [{"name": "a", "passed": True}]}}
    engine["result"]["rows"].append({"name": "b", "passed": False})  # type: ignore[index]
    kernels = {"kernels": {"status": "ok", "summary": "9 passed"}, "kernels-tiny": {"status": "timed out"}}
    compiled = {"rows": [{"function": "a", "spills": 0}, {"function": "b", "spills": 8}]}
    found = gpu_targets.verdicts({"engine": engine, "compile": {"result": compiled}, **kernels})
    assert [(v.measured, v.passed) for v in found[:4]] == [
        ("it runs", None),
        ("1 of 2; not b", False),
        ("2 kernels, not b (8 bytes)", False),
        ("ok: 9 passed; timed out: ", False),
    ]


# ------------------------------------------------------------------------------------------------ measuring


def test_contenders_that_fail_have_a_reason() -> None:
    def refuse() -> None:
        raise RuntimeError("no kernel image\nand more")

    found = measure({"works": lambda: None, "fails": refuse}, torch.device("cpu"))
    assert found["fails"] == "RuntimeError: no kernel image"
    assert not isinstance(found["works"], str)
    assert found["works"].median >= 0


def test_percentiles() -> None:
    found = summary([float(n) for n in range(1, 12)][::-1])
    assert (found.median, found.p10, found.p90, found.rounds) == (6.0, 2.0, 10.0, 11)


def test_compiled_kernels_get_the_tensors_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a driver that only writes down: every word is a tensor's address, one in the workspace, T or null."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: argparse.Namespace(cuda_stream=77))
    experts, select = gpu_layer.specs_of("gpt-oss-120b", "bfloat16", dry=True)
    layer = gpu_layer.Layer("gpt-oss-120b", experts, select, {})
    batch = gpu_layer.make_batch(layer, 5, 0, torch.device("cpu"))
    kernels = fake_kernels([select], (90,), 8)
    plan = find_plan(lookup(kernels, 90, select.key), 5)
    tensors = gpu_layer.selection_tensors(batch, select)
    driver = FakeDriver()
    execute.prepare_compiled(plan, tensors, 5, driver)()
    assert [launch["stream"] for launch in driver.launched] == [77] * len(plan.steps)
    regions = set(plan.offsets(5))
    for step, launch in zip(plan.steps, driver.launched, strict=True):
        for name, word in zip([*step.arguments, "null", "null"], launch["words"], strict=True):
            if name in tensors:
                assert word == tensors[name].data_ptr(), name
            elif name in regions:
                assert word % 16 == 0, name
            else:
                assert word == {"T": 5, "null": 0}[name]


# ------------------------------------------------------------------------------------------------ the scripts


@pytest.mark.parametrize(
    ("script", "model"),
    [
        ("machine", None),
        ("compile", None),
        ("select", "mixtral-8x7b"),
        ("states", "kimi-linear"),  # a decay a key
        ("experts_decode", "gpt-oss-120b"),  # transposed, interleaved, biased; prefill is run below
    ],
)
def test_scripts_in_tiny(script: str, model: str | None, tmp_path: Path) -> None:
    """Every line of them but the CUDA graphs: peers, kernels by the interpreter, errors, the record."""
    record = dry_run(script, tmp_path, *(["--model", model] if model else []))
    assert record["environment"]["commit"]
    # Of a wheel for CUDA from PyPI the build is not in its metadata.
    assert torch.__version__.startswith(record["environment"]["versions"]["torch"])
    assert not record["left_out"]
    rows = record["rows"]
    if script == "machine":
        assert rows[0]["copy_tb_per_second"] > 0
        return
    if script == "compile":
        assert {each["sm"] for each in rows} == {90}
        assert {"select_kernel", "dispatch_kernel", "combine_kernel"} < {each["function"] for each in rows}
        return
    assert all("failed" not in each for each in rows), [each for each in rows if "failed" in each]
    contenders = {each["contender"] for each in rows}
    if script == "states":
        assert contenders == {"lynx", "lynx_conv", "pytorch"}
        assert all(each["right"] is True for each in rows if each["contender"] != "pytorch")
        assert all(each["us"] > 0 < each["floor_us"] and "bandwidth_share" in each for each in rows)
        return
    if script == "select":
        assert contenders == {"lynx", "lynx_metadata", "sort"}
        half, floored, off = (next(r for r in rows if (r["fraction"], r["by"]) == each) for each in gpu_select.SETTINGS)
        assert half["vote_floor"] == off["vote_floor"] == 0 < floored["vote_floor"]
        assert half["budget"] == half["active"] < floored["budget"] == off["budget"]
        assert 0 < floored["active"] < off["active"] == off["natural"]
        assert all(each["right"] is True for each in rows if each["contender"] != "sort")
        return
    assert {"lynx", "lynx_layer", "lynx_apart", "grouped_mm", "dense"} <= contenders
    assert next(iter(record["absent"].values())).startswith("vLLM")
    assert record["extra"]["kernels"] == "interpreted"
    for each in rows:
        # bfloat16 has 8 bits; one token's few values say no more.
        assert 0 < each["error"] < 0.03, each
        assert each["floor_us"] > 0
    whole, half = (next(r for r in rows if r["fraction"] == part) for part in (1.0, 0.5))
    assert half["active"] == sum(half["budgets"]) / len(half["budgets"]) < whole["active"]


# A kernel in the place of vLLM's, with some of its parameters, in a file that has more than a benchmark can import.
KERNEL = """
import vllm.nothing
from vllm.triton_utils import tl, triton

@triton.jit
def write_zeros_to_output(c_ptr):
    pass

@triton.jit
def fused_moe_kernel(
    a_ptr, b_ptr, c_ptr, topk_weights_ptr, sorted_token_ids_ptr, expert_ids_ptr, num_tokens_post_padded_ptr,
    N, K, EM, num_valid_tokens, stride_am, stride_ak, stride_be, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    MUL_ROUTED_WEIGHT: tl.constexpr, top_k: tl.constexpr, compute_type: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_SIZE_N)
    block = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    if block * BLOCK_SIZE_M < tl.load(num_tokens_post_padded_ptr):
        pair = tl.load(sorted_token_ids_ptr + block * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M))
        here = pair < num_valid_tokens
        b = b_ptr + tl.load(expert_ids_ptr + block) * stride_be
        total = tl.zeros([BLOCK_SIZE_M, BLOCK_SIZE_N], tl.float32)
        for k in range(K):
            x = tl.load(a_ptr + pair // top_k * stride_am + k * stride_ak, mask=here, other=0.0).to(tl.float32)
            w = tl.load(b + k * stride_bk + row * stride_bn, mask=row < N, other=0.0).to(tl.float32)
            total += x[:, None] * w[None, :]
        if MUL_ROUTED_WEIGHT:
            total *= tl.load(topk_weights_ptr + pair, mask=here, other=0.0)[:, None]
        at = c_ptr + pair[:, None] * stride_cm + row[None, :] * stride_cn
        tl.store(at, total.to(compute_type), mask=here[:, None] & (row < N)[None, :])

def get_default_config(M, E, N, K, topk, dtype):
    return {"BLOCK_SIZE_M": 4, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 16, "num_warps": 4, "num_stages": 2}
"""


def test_a_kernel_from_another_tree_is_called_as_it_wants(tmp_path: Path) -> None:
    """Its parameters by name, tokens in padded blocks by expert; the result is held to float64 as everyone's."""
    (tmp_path / "fused_moe.py").write_text(KERNEL)
    record = dry_run("experts_prefill", tmp_path, "--model", "mixtral-8x7b", "--vllm", str(tmp_path))
    (found,) = [each for each in record["rows"] if each["contender"] == "vllm"]
    assert 0 < found["error"] < 0.01, found
    assert not record["absent"]
    assert {each["contender"] for each in record["rows"]} == {"lynx", "lynx_layer", "grouped_mm", "dense", "vllm"}
    assert all(0 < each["error"] < 0.03 and each["us"] > 0 for each in record["rows"])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "has no fused_moe.py"),
        ("def get_default_config(): pass", "has no write_zeros_to_output, fused_moe_kernel"),
        (KERNEL.replace("    N, K, EM,", "    N, K, EM, magic,"), "takes magic, which this benchmark doesn't know"),
    ],
)
def test_a_peer_that_can_not_take_part_says_why(source: str | None, reason: str, tmp_path: Path) -> None:
    if source:
        (tmp_path / "fused_moe.py").write_text(source)
    layer = gpu_layer.make_layer("mixtral-8x7b", options(tmp_path))
    batch = gpu_layer.make_batch(layer, 3, 0, torch.device("cpu"))
    with pytest.raises(AbsentError, match=reason):
        gpu_vllm.fused_moe(layer, [batch], tmp_path)()


def options(folder: Path) -> Options:
    return Options(folder, 0.0, True, ("mixtral-8x7b",), "bfloat16", False, None)


# ------------------------------------------------------------------------------------------------ plots


def test_plots_are_made_of_what_was_recorded(tmp_path: Path) -> None:
    times = {"p10": 9.0, "p90": 12.0, "floor_us": 8.0, "matmul_share": 0.6, "rounds": 5}
    decode = [row(name, 10.0 + n, tokens=16, active=n, **times) for n in (4, 8) for name in ("lynx", "grouped_mm")]
    results = {
        "environment": {"gpu": {"name": "a GPU"}, "commit": "abc", "date": "today"},
        "parts": {
            "decode-mixtral-8x7b": {"result": {"rows": decode}},
            "prefill-mixtral-8x7b": {"status": "failed"},
            "select": {"result": {"rows": [row("lynx_metadata", 7.0, fraction=0.5, **times)]}},
        },
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    said = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_plots.py"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    assert [Path(line).name for line in said.stdout.splitlines()] == ["decode.png", "active.png", "select.png"]
    assert all(Path(line).read_bytes()[:4] == b"\x89PNG" for line in said.stdout.splitlines())


@pytest.mark.slow
def test_the_tests_for_a_gpu_in_tiny() -> None:
    """A machine with a GPU is no place to find out that they don't run."""
    environment = {**os.environ, "LYNX_GPU_DRY": "1", "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600, cwd=ROOT)
    assert said.returncode == 0, said.stdout
    assert " passed" in said.stdout


def test_without_a_gpu_a_script_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    said = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_machine.py"), "--output", str(tmp_path / "x.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 1
    assert said.stderr == "error: PyTorch finds no GPU here; --dry-run tries the script on a CPU\n"


def test_a_record_is_whole_after_every_row(tmp_path: Path) -> None:
    report = Report(tmp_path / "deep" / "record.json", "x", {})
    report.add({"us": 1.0})
    assert json.loads(report.path.read_text())["rows"] == [{"us": 1.0}]
    report.add({"us": 2.0})
    assert len(json.loads(report.path.read_text())["rows"]) == 2
