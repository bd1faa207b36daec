"""`inspect`: what is in an artifact, and every way in which it may not fit this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lynx_trt import artifact as artifacts
from lynx_trt import preflight as preflights
from lynx_trt.artifact import DRAWS, MANIFEST, Artifact, CalibrationRecord, ForeignRecord, read, record_files
from lynx_trt.console import Progress
from lynx_trt.errors import ArtifactError
from lynx_trt.inspect import rows
from lynx_trt.preflight import engine_problems, preflight
from lynx_trt.tensorrt import gpu, loader


@pytest.fixture(scope="session")
def with_engine(checkpoint: Callable[[str], Path], workspace: Path, build_quietly: Callable[..., Artifact]) -> Artifact:
    return build_quietly(checkpoint("qwen3_moe"), workspace / "inspected", tensorrt="auto", prefill_length="1:16:32")


@pytest.fixture
def own_artifact(with_engine: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_engine.folder, tmp_path / "artifact"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lynx_trt.inspect", *arguments], capture_output=True, text=True, check=False
    )


def test_table_says_what_was_built(with_engine: Artifact) -> None:
    table = dict(rows(with_engine.manifest))
    assert table["layers"] == "2, 2 of them MoE"
    assert table["experts"] == "8 a layer, 2 a token, 24.6 kB each"  # 3 * 64 * 32 numbers of 4 bytes
    assert table["profile decode"] == "batch 1:8:64, length 1:1:1"
    assert table["profile prefill"] == "batch 1:1:8, length 1:16:32"
    assert table["budgets"] == "no limit"
    assert table["floors"] == "0.01562 in every MoE layer"  # a quarter of 1 / (K E)
    assert "expert weights inside" in table["engine"]
    assert table["calibrated"] == "no: nothing is promised about quality"


def test_a_tokenizer_that_can_t_be_read(text_artifact: Artifact, tmp_path: Path) -> None:
    """It was built in so, and its sum is right: said here, and not by the server that starts with it."""
    folder = Path(shutil.copytree(text_artifact.folder, tmp_path / "artifact"))
    (folder / "tokenizer.json").write_text('{"version": "9"}')
    manifest = text_artifact.manifest.model_copy(update={"files": record_files(folder)})
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    result = command(str(folder))
    assert result.returncode == 1
    assert f"error: {folder / 'tokenizer.json'} can't be read as a tokenizer" in result.stderr
    assert preflight(text_artifact).problems == []


def test_a_tokenizer_that_was_changed_is_one_problem(text_artifact: Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_artifact.folder, tmp_path / "artifact"))
    (folder / "tokenizer.json").write_text("{}")
    assert len(preflight(read(folder)).problems) == 1


@pytest.mark.parametrize(
    ("text", "checked"),
    [
        ({"name": "chats.txt"}, "held-out parts of chats.txt"),
        ({"name": "chats.txt", "validation_name": "mails.txt"}, "mails.txt"),
    ],
)
def test_table_says_what_is_promised(with_engine: Artifact, text: dict[str, str], checked: str) -> None:
    """The promise, the largest batch that it is for, and what it was checked on."""
    record = CalibrationRecord(
        created="2026-11-26",
        promise={"max_kl": 0.02, "min_agreement": 0.98},
        batch=16,
        budgets_by_batch={16: [8, 8]},
        floors_by_batch={16: [0.01, 0.02]},
        held_out={},
        text=text,
        hardware="h200",
        seed=0,
        versions={},
    )
    table = dict(rows(with_engine.manifest.model_copy(update={"calibration": record})))
    assert table["calibrated"] == f"max kl 0.02, min agreement 0.98; up to a batch of 16; checked on {checked}"


def test_command_of_a_good_artifact(with_engine: Artifact) -> None:
    result = command(str(with_engine.folder))
    assert result.returncode == 0, result.stderr
    assert "everything fits" in result.stdout
    assert "Qwen3MoeForCausalLM" in result.stdout


def test_json_is_whole(with_engine: Artifact) -> None:
    report = json.loads(command(str(with_engine.folder), "--json").stdout)
    assert report["problems"] == []
    assert report["manifest"] == json.loads((with_engine.folder / MANIFEST).read_text())


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "engine.plan"])
def test_one_changed_byte(name: str, own_artifact: Path) -> None:
    path = own_artifact / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = command(str(own_artifact))
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert name in line
    assert "sha256" in line


def test_every_problem_has_its_line(own_artifact: Path) -> None:
    (own_artifact / "engine.plan").unlink()
    with (own_artifact / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    problems = preflight(read(own_artifact)).problems
    assert len(problems) == 2
    assert "engine.plan is missing" in problems[0]
    assert "model.onnx has" in problems[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "manifest"),
        ("[]", "manifest"),
        ('{"schema_version": 2}', "build the artifact again"),
        ("\x00\xff", "manifest"),
    ],
    ids=["cut", "list", "of another version", "binary"],
)
def test_manifest_that_is_none(content: str, words: str, own_artifact: Path) -> None:
    (own_artifact / MANIFEST).write_bytes(content.encode("latin-1"))
    with pytest.raises(ArtifactError, match=words) as caught:
        read(own_artifact)
    assert "\n" not in str(caught.value)


def test_manifest_may_not_leave_its_folder(own_artifact: Path) -> None:
    """A manifest is data that somebody sent: a name with a path in it is not followed."""
    manifest = json.loads((own_artifact / MANIFEST).read_text())
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": "0"}
    (own_artifact / MANIFEST).write_text(json.dumps(manifest))
    assert any("outside the artifact" in problem for problem in preflight(read(own_artifact)).problems)


def test_sums_are_checked_last_and_shown_where_they_take_long(
    own_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tens of GB take half a minute: a file that is missing is said before, and what takes so long."""
    opened = read(own_artifact)
    monkeypatch.setattr(artifacts, "LONG_TO_READ", sum(record.bytes for record in opened.manifest.files.values()) + 1)
    with Progress() as progress:
        assert preflight(opened, on_progress=progress.sums()).problems == []
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(artifacts, "LONG_TO_READ", 1)
    seen: list[float] = []
    assert preflight(opened, on_progress=seen.append).problems == []
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    with Progress() as progress:
        preflight(opened, on_progress=progress.sums())
    assert capsys.readouterr().err == "Checking the files' sums ...\n"
    first = next(iter(opened.manifest.files))
    opened.path(first).write_bytes(bytes(opened.manifest.files[first].bytes))
    opened.path("weights.safetensors").unlink()
    missing, changed = preflight(opened).problems[:2]
    assert "weights.safetensors is missing" in missing
    assert f"{first} was changed" in changed


def test_not_an_artifact(tmp_path: Path) -> None:
    for folder, words in ((tmp_path / "nowhere", "no such artifact"), (tmp_path, "holds no lynx.json")):
        result = command(str(folder))
        assert result.returncode == 1
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


def on_a_machine_with(monkeypatch: pytest.MonkeyPatch, *, sms: list[int], tensorrt: str | None) -> None:
    monkeypatch.setattr(gpu, "compute_capabilities", lambda: sms)
    monkeypatch.setattr(loader, "describe", lambda: {"full": None, "rtx": tensorrt, "gpus": len(sms)})


def test_gpu_with_another_tensorrt(with_engine: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most repeated complaint about engines: built by one version, loaded by another."""
    on_a_machine_with(monkeypatch, sms=[89], tensorrt="1.6.0")
    problems = preflight(with_engine).problems
    assert any("1.7.1" in problem and "1.6.0" in problem for problem in problems)


def test_gpu_without_tensorrt(with_engine: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_machine_with(monkeypatch, sms=[89], tensorrt=None)
    assert any("is not installed" in problem for problem in preflight(with_engine).problems)


def test_gpu_of_another_sm(with_engine: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_engine.manifest.engine
    engine = with_engine.manifest.engine.model_copy(update={"compute_capabilities": [80, 89]})
    (tmp_path / DRAWS).write_bytes(b"kernels")
    files = {**with_engine.manifest.files, **record_files(tmp_path)}
    update = {"engine": engine, "files": files}
    built = Artifact(with_engine.folder, with_engine.manifest.model_copy(update=update))
    on_a_machine_with(monkeypatch, sms=[120], tensorrt=engine.tensorrt)
    assert any("SM 80, 89" in problem and "SM 120" in problem for problem in preflight(built, verify=False).problems)
    on_a_machine_with(monkeypatch, sms=[89], tensorrt=engine.tensorrt)
    assert preflight(built, verify=False).problems == []
    # The first GPU is the one that is taken, and kernels of SM 80 run on a later 8.
    for sms in ([89, 75], [86], [89, 120]):
        on_a_machine_with(monkeypatch, sms=sms, tensorrt=engine.tensorrt)
        assert preflight(built, verify=False).problems == [], sms
    on_a_machine_with(monkeypatch, sms=[75, 89], tensorrt=engine.tensorrt)
    assert any("SM 75" in problem for problem in preflight(built, verify=False).problems)


@pytest.mark.parametrize(("sm", "runs"), [(80, True), (90, False), (100, False), (110, False), (121, True)])
def test_gpu_that_this_tensorrt_does_not_run_on(
    sm: int, runs: bool, with_engine: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT for RTX on Hopper (seen on an H200): one sentence, whatever kernels it has; full TensorRT runs there."""
    assert with_engine.manifest.engine
    (tmp_path / DRAWS).write_bytes(b"kernels")
    files = {**with_engine.manifest.files, **record_files(tmp_path)}

    def built(flavor: str, kernels: list[int]) -> Artifact:
        update = {"compute_capabilities": kernels, "flavor": flavor, "tensorrt": "1.7.1"}
        engine = with_engine.manifest.engine.model_copy(update=update)  # type: ignore[union-attr]
        return Artifact(with_engine.folder, with_engine.manifest.model_copy(update={"engine": engine, "files": files}))

    on_a_machine_with(monkeypatch, sms=[sm], tensorrt="1.7.1")
    monkeypatch.setattr(loader, "describe", lambda: {"full": "1.7.1", "rtx": "1.7.1"})
    for kernels in ([sm], [80], []):
        problems = engine_problems(built("rtx", kernels))
        said = [f"SM 80, 86, 89, 120 and later, not on SM {sm}" in problem for problem in problems]
        assert said == ([False] * len(problems) if runs else [True])
        if not runs:
            assert "with full TensorRT there: pip install tensorrt" in problems[0]
    assert engine_problems(built("full", [sm])) == []
    if not runs:
        assert preflight(built("rtx", [sm]), verify=False).problems == engine_problems(built("rtx", [sm]))


def test_engine_without_its_draws(with_engine: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built before tokens were drawn on the GPU: `auto` then takes ONNX Runtime, and it is said why."""
    assert with_engine.manifest.engine
    engine = with_engine.manifest.engine.model_copy(update={"compute_capabilities": [89]})
    built = Artifact(with_engine.folder, with_engine.manifest.model_copy(update={"engine": engine}))
    on_a_machine_with(monkeypatch, sms=[89], tensorrt=engine.tensorrt)
    (problem,) = preflight(built).problems
    assert "there is no draws.kernels" in problem
    assert "build it again" in problem


def test_another_plugin_version(with_engine: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflights, "PLUGIN", {"namespace": "lynx", "version": "2"})
    assert any("plugin version 1" in problem for problem in preflight(with_engine).problems)


def test_no_gpu_is_no_problem(with_engine: Artifact) -> None:
    """On a laptop the graph runs in ONNX Runtime; that the engine can't is worth a note, not an exit code."""
    found = preflight(with_engine)
    if gpu.compute_capabilities():
        pytest.skip("this machine has a GPU")
    assert any("no GPU here" in line and "ONNX Runtime on the CPU can" in line for line in found.notes)


def test_a_graph_of_others_runs_in_no_runtime_of_ours(with_engine: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` refuses it, so nothing here says that the CPU could."""
    monkeypatch.setattr(gpu, "compute_capabilities", list)
    known = {"file": "x.onnx", "producer": "torch", "opset": 24, "patterns": {}, "phase_known": True, "packed": {}}
    foreign = ForeignRecord.model_validate({**known, "inputs": [], "outputs": [], "added": [], "kept": [], "notes": []})
    theirs = Artifact(with_engine.folder, with_engine.manifest.model_copy(update={"foreign": foreign}))
    assert "no GPU here, so the engine can't run" in preflight(theirs, verify=False).notes
