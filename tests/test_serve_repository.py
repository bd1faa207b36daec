"""The model repository and the commands around it: what the server reads, and what an operator can get wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lynx_trt import console, partials, serve
from lynx_trt.artifact import MANIFEST, Artifact, EngineRecord, StateRecord
from lynx_trt.errors import LynxError, ServingError, UsageError
from lynx_trt.serving import environment, server
from lynx_trt.serving.config import Name, protobuf_text, text_config
from lynx_trt.serving.dial import DialSetting
from lynx_trt.serving.repository import Repository, set_dial, write_repository
from lynx_trt.serving.schema import INPUTS, OUTPUTS
from lynx_trt.serving.settings import Settings

needs_client = pytest.mark.skipif(
    importlib.util.find_spec("tritonclient") is None, reason='needs the client: pip install "lynx-trt[serve]"'
)


def parsed(text: str) -> Any:
    """As the server reads it: protobuf text of its own message; an unknown field or enum is an error."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def write(artifact: Artifact, folder: Path, **options: Any) -> Repository:
    return write_repository(artifact, folder, **{"name": "tiny", "settings": Settings(), **options})


@pytest.fixture
def with_engine(text_artifact: Artifact, tmp_path: Path) -> Artifact:
    """The artifact with an engine's record (the engine itself takes a builder; its bytes don't matter here)."""
    import shutil

    folder = Path(shutil.copytree(text_artifact.folder, tmp_path / "with-engine"))
    (folder / "engine.plan").write_bytes(b"plan")
    shapes = {"input_ids": [[1, 1], [8, 1], [64, 1]], "past_lengths": [[1], [8], [64]], "lengths": [[1], [8], [64]]}
    cache = [[1, 2, 64, 16], [8, 2, 64, 16], [64, 2, 64, 16]]
    shapes |= {f"past_key_values.{layer}.{part}": cache for layer in (0, 1) for part in ("key", "value")}
    tensors: list[dict[str, Any]] = [
        {"name": "input_ids", "mode": "input", "dtype": "int64", "shape": [-1, -1]},
        {"name": "past_lengths", "mode": "input", "dtype": "int64", "shape": [-1]},
        {"name": "lengths", "mode": "input", "dtype": "int64", "shape": [-1]},
        {"name": "budgets", "mode": "input", "dtype": "int32", "shape": [2]},
        {"name": "logits", "mode": "output", "dtype": "float32", "shape": [-1, 256]},
        {"name": "active_experts", "mode": "output", "dtype": "int32", "shape": [2]},
    ]
    for mode, kind in (("input", "past"), ("output", "present")):
        for layer in (0, 1):
            for part in ("key", "value"):
                name = f"{kind}_key_values.{layer}.{part}"
                tensors.append({"name": name, "mode": mode, "dtype": "float16", "shape": [-1, 2, 64, 16]})
    engine = EngineRecord(
        flavor="full",
        tensorrt="11.0.0",
        expert_weights="engine",
        compute_capabilities=[90],
        seconds=1.0,
        peak_bytes=1,
        plan_bytes=4,
        plugin_layers={"LynxSelect": 2, "LynxExperts": 2},
        profiles=[{"name": "decode", "shapes": shapes}, {"name": "prefill", "shapes": shapes}],
        tensors=tensors,
        external=[],
        warnings=[],
    )
    return Artifact(folder, text_artifact.manifest.model_copy(update={"engine": engine}))


def test_bf16_is_served_on_the_cpu_too(
    byte_model: Path, build_quietly: Callable[..., Artifact], tmp_path: Path
) -> None:
    """ONNX Runtime computes it in float32, as it does fp16."""
    built = build_quietly(byte_model, tmp_path / "bf16", precision="bf16")
    assert serve._opened(built.folder, Settings(backend="onnxruntime"), verify=True, here=True) == built


# --- Configurations.


@needs_client
def test_text_model_s_configuration(text_artifact: Artifact) -> None:
    settings = Settings(slots=7, quality="fast")
    config = parsed(text_config("tiny", text_artifact.manifest, settings, {"top_k": 20}))
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert [tensor.name for tensor in config.input] == [tensor.name for tensor in INPUTS]
    assert [tensor.optional for tensor in config.input] == [tensor.optional for tensor in INPUTS]
    assert [tensor.name for tensor in config.output] == [tensor.name for tensor in OUTPUTS]
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert Settings.of(parameters) == settings
    assert config.version_policy.latest.num_versions == 1
    assert config.instance_group[0].count == 1
    assert {name for warm_up in config.model_warmup for name in warm_up.inputs} == {"text_input", "max_tokens"}


@needs_client
def test_text_format_takes_any_string() -> None:
    """Quotes, line breaks, control characters and other scripts come back as they went in."""
    for value in ['a "b" \\ c', "line\nbreak\ttab", "\x01\x1f", "żółw 龟", ""]:
        config = parsed(protobuf_text({"name": value, "parameters": [{"key": "k", "value": {"string_value": value}}]}))
        assert config.name == config.parameters["k"].string_value == value
    assert protobuf_text({"kind": Name("KIND_CPU"), "on": True, "n": [1, 2]}) == "kind: KIND_CPU\non: true\nn: [1, 2]\n"


# --- The folder.


def test_repository_is_whole(with_engine: Artifact, tmp_path: Path) -> None:
    folder = write(with_engine, tmp_path / "repository").folder
    assert json.loads((folder / "dial.json").read_text()) == {"quality": "balanced", "tpot": 0.0, "max_kl": 0.0}
    layers = (folder / "tiny" / "moe_layers.txt").read_text().splitlines()
    assert layers == [layer.name for layer in with_engine.manifest.model.moe_layers]
    assert sorted(path.name for path in folder.iterdir()) == ["dial.json", "lynx-repository.json", "tiny"]
    # A hard link: the same file, once on the disk.
    weights = folder / "tiny" / "1" / "artifact" / "weights.safetensors"
    assert weights.samefile(with_engine.folder / "weights.safetensors")
    assert str(tmp_path) not in (folder / "tiny" / "config.pbtxt").read_text()


def test_code_in_the_repository_stands_alone(text_artifact: Artifact, tmp_path: Path) -> None:
    """The copy of lynx_trt imports without this checkout, with the packages of a server's environment only."""
    written = write(text_artifact, tmp_path / "repository")
    version = written.folder / "tiny" / "1"
    code = (
        "import sys, types; sys.path[:] = [p for p in sys.path if 'lynx' not in p and p != '']\n"
        "sys.meta_path[:] = [m for m in sys.meta_path if 'editable' not in repr(m)]\n"
        f"sys.path.insert(0, {str(version)!r})\n"
        "sys.modules['triton_python_backend_utils'] = types.ModuleType('utils')\n"
        "for name in ('torch', 'transformers', 'typer', 'rich', 'psutil'): sys.modules[name] = None\n"
        "import model, lynx_trt.runtime.trt, lynx_trt.runtime.cuda, lynx_trt.plugins.python_plugin\n"
        "from pathlib import Path; from lynx_trt.artifact import read; from lynx_trt.runtime.open import open_backend\n"
        f"open_backend(read(Path({str(version / 'artifact')!r})), 1)\n"
        "print(lynx_trt.__file__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(version / "lynx_trt" / "__init__.py")


def test_same_repository_is_reused(text_artifact: Artifact, tmp_path: Path) -> None:
    """Starting again must not touch what a server may be reading; other settings need --overwrite."""
    first = write(text_artifact, tmp_path / "repository")
    before = (first.folder / "tiny" / "config.pbtxt").stat().st_ino
    assert write(text_artifact, tmp_path / "repository").reused
    assert (first.folder / "tiny" / "config.pbtxt").stat().st_ino == before
    with pytest.raises(UsageError, match="--overwrite"):
        write(text_artifact, tmp_path / "repository", settings=Settings(slots=2))
    again = write(text_artifact, tmp_path / "repository", settings=Settings(slots=2), overwrite=True)
    assert not again.reused
    assert 'string_value: "2"' in (again.folder / "tiny" / "config.pbtxt").read_text()
    assert not list(tmp_path.glob("*partial*"))


def left_behind(target: Path) -> Path:
    """What a process that was killed leaves beside `target`: a folder with something in it, and no lock."""
    folder = target.with_name(f"{target.name}.partial-{partials._boot()}-00000000")
    folder.mkdir()
    (folder / "half").touch()
    return folder


def test_what_a_killed_process_left_is_removed(
    text_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a repository and of the server's environment, by the next one that is made."""
    left = [left_behind(tmp_path / "repository")]
    write(text_artifact, tmp_path / "repository")
    monkeypatch.setenv("LYNX_TRT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    left.append(left_behind(environment.environment(server=False).folder))
    with pytest.raises(ServingError):
        environment.prepare(server=False, phase=lambda _: lambda _: None)
    assert capsys.readouterr().err.splitlines() == [
        f"note: removed {folder}, which a process that was killed had left behind" for folder in left
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_foreign_folder_is_not_touched(text_artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UsageError, match="no model repository of ours"):
        write(text_artifact, tmp_path, overwrite=True)
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.parametrize("name", ["", "../up", "a/b", "-x", "a b", "x" * 200, "${HOME}", "żółw"])
def test_names_that_are_no_model_s(name: str, text_artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--name"):
        write(text_artifact, tmp_path / "repository", name=name)
    assert not list(tmp_path.iterdir())


def test_set_dial(text_artifact: Artifact, tmp_path: Path) -> None:
    """In place, so that a file mounted into a container follows; a wrong one changes nothing."""
    written = write(text_artifact, tmp_path / "repository")
    inode = (written.folder / "dial.json").stat().st_ino
    set_dial(written.folder, quality="0.25")
    assert json.loads((written.folder / "dial.json").read_text()) == {"quality": "0.25", "tpot": 0.0, "max_kl": 0.0}
    assert (written.folder / "dial.json").stat().st_ino == inode
    with pytest.raises(LynxError, match="'best'"):
        set_dial(written.folder, quality="best")
    with pytest.raises(UsageError, match="no repository"):
        set_dial(tmp_path, quality="max")
    with pytest.raises(UsageError, match="tpot is nan"):
        set_dial(written.folder, tpot=float("nan"))
    assert json.loads((written.folder / "dial.json").read_text()) == {"quality": "0.25", "tpot": 0.0, "max_kl": 0.0}
    set_dial(written.folder, tpot=30.0)
    assert json.loads((written.folder / "dial.json").read_text()) == {"quality": "0.25", "tpot": 30.0, "max_kl": 0.0}
    (written.folder / "dial.json").write_text("{")  # what became of it is no obstacle
    set_dial(written.folder, tpot=20.0)
    assert json.loads((written.folder / "dial.json").read_text()) == {
        "quality": "balanced",
        "tpot": 20.0,
        "max_kl": 0.0,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "it has to be a JSON object with quality, tpot, max_kl, and nothing else"),
        ('{"max-kl": 0.02}', "and nothing else"),
        ('{"tpot": "soon"}', 'its tpot is "soon"'),
        ('{"tpot": true}', "its tpot is true"),
        ('{"quality": null}', "its quality is null"),
        ('{"max_kl": [1]}', r"its max_kl is \[1\]"),
        ('{"tpot": -1}', r"tpot is -1\.0"),
        ('{"tpot": NaN}', "tpot is nan"),
        ('{"tpot": 1e300}', r"tpot is 1e\+300"),
        ('{"tpot": 1' + "0" * 400 + "}", "its tpot is a number of 401 digits"),
        ('{"max_kl": 2000}', "max-kl is 2000"),
    ],
)
def test_what_is_no_dial_file(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        DialSetting.read(text, Settings())


def test_a_dial_file_that_says_less() -> None:
    """The file of an operator, or of an older repository: the rest is as the repository was made."""
    settings = Settings(quality="max", tpot=25.0)
    assert DialSetting.read("{}", settings) == DialSetting("max", 25.0)
    assert DialSetting.read('{"quality": "fast"}', settings) == DialSetting("fast", 25.0)
    assert DialSetting.read('{"tpot": 0}', settings) == DialSetting("max", 0.0)
    assert DialSetting.read('{"quality": 0.5}', settings) == DialSetting("0.5", 25.0)


# --- Flags, ports, environment.


def test_flags_keep_to_loopback_and_close_the_doors() -> None:
    """Loopback on all three ports; what could load models or name files answers to a random key alone."""
    found = server.flags("/r", "m", server.Address(), drain=5)
    assert found.count("--http-address=127.0.0.1") == 1
    assert {"--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1", "--load-model=m"} <= set(found)
    restricted = [flag for flag in found if "restricted" in flag]
    assert len(restricted) == 2
    assert all("model-repository,shared-memory,trace,logging:lynx-operator=" in flag for flag in restricted)
    again = server.flags("/r", "m", server.Address(), drain=5)
    assert not set(restricted) & set(again)


def test_docker_command_is_one_shell_command(text_artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "it's a path"
    repository = write(text_artifact, folder)
    text = server.docker_command(repository, server.Address(), image="image:1", gpu=True, drain=9)
    words = shlex.split(text.replace("\\\n", " "))
    assert words[:2] == ["docker", "run"]
    assert f"{folder}:/models:ro" in words
    assert {"127.0.0.1:8000:8000", "127.0.0.1:8001:8001", "127.0.0.1:8002:8002", "--gpus"} <= set(words)
    inside = shlex.split(words[-1])
    assert words[-3:-1] == ["bash", "-c"]
    assert {"tritonserver", "--load-model=tiny", "--http-address=0.0.0.0", "numpy>=1.26,<2"} <= set(inside)


def test_what_runs_the_engine_goes_into_the_container(
    with_engine: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Where this machine can run it, and unless ONNX Runtime is asked for."""
    from lynx_trt import preflight
    from lynx_trt.serve import app

    (with_engine.folder / MANIFEST).write_text(with_engine.manifest.model_dump_json())
    monkeypatch.setattr(preflight, "engine_problems", lambda _: [])
    for backend, there in (("auto", True), ("onnxruntime", False)):
        command = [str(with_engine.folder), "-o", str(tmp_path / backend), "--no-verify", "--docker"]
        app([*command, "--backend", backend], standalone_mode=False)
        assert ("cuda-python>=12.8" in capsys.readouterr().out) == there


def test_engine_that_can_t_be_served_is_refused(text_artifact: Artifact, tmp_path: Path) -> None:
    from lynx_trt.serve import app

    with pytest.raises(ServingError, match="can't be served: there is none: built with --tensorrt none"):
        app([str(text_artifact.folder), "-o", str(tmp_path / "x"), "--backend", "tensorrt"], standalone_mode=False)


def test_taken_port_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"can't listen on 127.0.0.1:{port}.*--http-port"):
            server._check_ports(server.Address(http=port, grpc=1, metrics=2))
    with pytest.raises(UsageError, match="are not 3"):
        server._check_ports(server.Address(http=8000, grpc=8000))


def test_stale_memory_goes_and_that_of_others_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions of a process that is gone are removed, of a living one (this) not."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    regions = [Path(f"/dev/shm/lynx_trt_{pid}_x") for pid in (ended.pid, os.getpid())]
    for region in regions:
        region.touch()
    try:
        server._remove_stale_memory()
        assert [region.exists() for region in regions] == [False, True]
    finally:
        for region in regions:
            region.unlink(missing_ok=True)


def test_environment_that_can_t_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, say: one sentence with pip's own reason, and nothing is left behind."""
    monkeypatch.setenv("LYNX_TRT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ServingError, match=r"can't be made: pip install .* failed: ") as failed:
        environment.prepare(server=True, phase=lambda _: lambda _: None)
    assert "\n" not in str(failed.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [("PYTHONS", ((3, 1), (3, 2)), "runs models with Python 3.1 to 3.2"), ("libpython", lambda: None, "libpython")],
)
def test_python_that_the_wheel_can_t_use(
    attribute: str, value: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LYNX_TRT_CACHE", str(tmp_path))
    monkeypatch.setattr(environment, attribute, value)
    with pytest.raises(ServingError, match=words):
        environment.prepare(server=True, phase=lambda _: lambda _: None)


# --- As a user runs it.


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lynx_trt.serve", *arguments], capture_output=True, text=True, check=False
    )


def test_command_writes_and_tells(text_artifact: Artifact, tmp_path: Path) -> None:
    arguments = [str(text_artifact.folder), "-o", str(tmp_path / "r"), "--name", "tiny", "--docker"]
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    assert "16 slots with 524.3 kB of cache" in result.stdout
    assert "docker run" in result.stdout
    report = json.loads(command(*arguments, "--json").stdout)
    assert report["model"] == "tiny"
    changed = command("-o", str(tmp_path / "r"), "--set-quality", "fast")
    assert changed.returncode == 0
    assert json.loads((tmp_path / "r" / "dial.json").read_text()) == {"quality": "fast", "tpot": 0.0, "max_kl": 0.0}


def without_tokenizer(artifact: Artifact, folder: Path) -> Path:
    import shutil

    shutil.copytree(artifact.folder, folder)
    (folder / "tokenizer.json").unlink()
    manifest = json.loads((folder / "lynx.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (folder / "lynx.json").write_text(json.dumps(manifest))
    return folder


def with_another_manifest(artifact: Artifact, folder: Path, **changes: dict[str, Any]) -> None:
    """A copy whose manifest says something else in some of its parts."""
    import shutil

    shutil.copytree(artifact.folder, folder)
    parts = {name: getattr(artifact.manifest, name).model_copy(update=change) for name, change in changes.items()}
    (folder / MANIFEST).write_text(artifact.manifest.model_copy(update=parts).model_dump_json())


def test_slots_for_a_larger_machine(text_artifact: Artifact, tmp_path: Path) -> None:
    """A repository may be served elsewhere: its size is only said."""
    with_another_manifest(text_artifact, tmp_path / "huge", model={"cache_rows": 10**9})
    result = command(str(tmp_path / "huge"), "-o", str(tmp_path / "r"), "--slots", "9999")
    assert result.returncode == 0, result.stderr
    assert "note: 9999 sequences need" in result.stderr
    assert "serve the repository on a larger one" in result.stderr


def test_set_quality_for_machines(text_artifact: Artifact, tmp_path: Path) -> None:
    written = write(text_artifact, tmp_path / "r")
    result = command("-o", str(written.folder), "--set-quality", "0.3", "--json")
    assert json.loads(result.stdout) == {
        "repository": str(written.folder),
        "quality": "0.3",
        "tpot": 0.0,
        "max_kl": 0.0,
    }
    result = command("-o", str(written.folder), "--set-tpot", "12.5")
    assert "is 0.3, lowered under load for a TPOT of 12.5 ms; a running server" in result.stdout
    assert command("-o", str(written.folder), "--set-quality", "best").returncode == 2


def test_an_artifact_without_a_dial(text_artifact: Artifact, tmp_path: Path) -> None:
    """Of the preset off: what would restrict it is refused, as `generate --budget` is, and the default is not."""
    from lynx_trt.artifact import read

    with_another_manifest(text_artifact, tmp_path / "off", selection={"preset": "off", "budgets": [8, 8]})
    written = write(read(tmp_path / "off"), tmp_path / "r")
    for quality in ("0.1", "fast"):
        with pytest.raises(UsageError, match=f"'{quality}' means nothing .* --preset off"):
            set_dial(written.folder, quality=quality)
    set_dial(written.folder, quality="max")
    with pytest.raises(UsageError, match=r"tpot is 30, but an artifact built with --preset off"):
        set_dial(written.folder, tpot=30.0)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "there is no artifact"),
        (["nowhere"], 1, "no such artifact"),
        (["ARTIFACT", "--quality", "best"], 2, "'best'"),
        (["OFF", "--quality", "fast"], 2, "'fast' means nothing for an artifact built with --preset off"),
        (["ARTIFACT", "--tpot", "-1"], 2, "tpot is -1.0"),
        (["ARTIFACT", "--tpot", "20", "--lowest", "worst"], 2, "'worst'"),
        (["ARTIFACT", "--max-kl", "-1"], 2, "max-kl is -1.0"),
        (["ARTIFACT", "--max-kl", "0.01", "--check", "0"], 2, "max-kl is 0.01, and check is 0"),
        (["OFF", "--max-kl", "0.01"], 2, "max-kl is 0.01, but an artifact built with --preset off"),
        (["ARTIFACT", "--quality", "0.2", "--tpot", "9", "--lowest", "0.3"], 2, "'0.3' is nowhere lower than '0.2'"),
        (["STATES", "--max-kl", "0.01"], 2, "layers of this model keep a state, which can't be taken back"),
        (["--set-max-kl", "0.01"], 2, "--set-max-kl changes a repository; name it with --output"),
        (["OFF", "--tpot", "20"], 2, "tpot is 20, but an artifact built with --preset off"),
        (["ARTIFACT", "--slots", "0"], 2, "slots is 0"),
        (["ARTIFACT", "--slots", "9" * 20], 2, "slots is 99999999999999999999; it must be 65536 or less"),
        (["HUGE", "--slots", "9999", "--start"], 2, "9999 sequences need"),
        (["ARTIFACT", "--threads", "9999999999"], 2, "threads is 9999999999; it must be 1024 or less"),
        (["ARTIFACT", "--threads", "1024", "--start"], 2, "--threads is 1024, and this process may use"),
        (["ARTIFACT", "--name", "../x"], 2, "--name"),
        (["ARTIFACT", "--http-port", "70000"], 2, "--http-port"),
        (["--set-quality", "max"], 2, "--set-quality changes a repository; name it with --output"),
        (["--set-tpot", "20"], 2, "--set-tpot changes a repository; name it with --output"),
        (["BARE"], 1, "has no tokenizer"),
        (["CHANGED"], 1, "was changed since it was built"),
        (["GARBLED", "--no-verify"], 1, "tokenizer.json can't be read as a tokenizer"),
    ],
)
def test_command_mistakes(
    arguments: list[str],
    code: int,
    words: str,
    text_artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import shutil

    places = {name: tmp_path / name.lower() for name in ("BARE", "CHANGED", "OFF", "HUGE", "GARBLED", "STATES")}
    places["ARTIFACT"] = text_artifact.folder
    without_tokenizer(text_artifact, places["BARE"])
    with_another_manifest(text_artifact, places["OFF"], selection={"preset": "off", "floors": [0.0, 0.0]})
    with_another_manifest(text_artifact, places["HUGE"], model={"cache_rows": 10**9})
    state = StateRecord(name="1.convolution", shape=[8, 3], precision="fp32")
    with_another_manifest(text_artifact, places["STATES"], model={"states": [state]})
    with_another_manifest(text_artifact, places["GARBLED"])
    (places["GARBLED"] / "tokenizer.json").write_text("{}")
    shutil.copytree(text_artifact.folder, places["CHANGED"])
    content = bytearray((places["CHANGED"] / "model.onnx").read_bytes())
    content[-1] ^= 1
    (places["CHANGED"] / "model.onnx").write_bytes(content)
    output = [] if any(word.startswith("--set-") for word in arguments) else ["-o", str(tmp_path / "r")]
    words_given = [str(places.get(argument, argument)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["serve", *words_given, *output])
    with pytest.raises(SystemExit) as ended:
        console.run(serve.app)
    assert ended.value.code == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_help_is_quick() -> None:
    import time

    fastest = 9.0
    for _ in range(3):
        started = time.monotonic()
        assert command("--help").returncode == 0
        fastest = min(fastest, time.monotonic() - started)
    assert fastest < 0.7


def test_alerts_are_about_metrics_that_there_are() -> None:
    """Each by its name as Prometheus has it; what they mean was tried with promtool and a Prometheus."""
    from lynx_trt.serving.metrics import FINISHES, SPECS

    path = Path(__file__).parent.parent / "examples" / "prometheus-alerts.yml"
    rules = [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
    known = {spec.name for spec in SPECS if spec.kind != "histogram"}
    known |= {f"{spec.name}_bucket" for spec in SPECS if spec.kind == "histogram"}
    assert len(rules) >= 7
    for rule in rules:
        used = set(re.findall(r"\blynx_\w+", rule["expr"]))
        assert used
        assert used <= known
        assert set(re.findall(r'finish="(\w+)"', rule["expr"])) <= set(FINISHES)
