"""Finding a TensorRT: real wheels where they are installed, the other cases simulated."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lynx_trt.errors import TensorRTError, UsageError
from lynx_trt.tensorrt import gpu, loader


def has_wheels() -> bool:
    try:
        return all(importlib.metadata.version(wheel) for wheel in loader.RTX_WHEELS)
    except importlib.metadata.PackageNotFoundError:
        return False


needs_wheels = pytest.mark.skipif(not has_wheels(), reason=f"{' or '.join(loader.RTX_WHEELS)} is not installed")


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the real thing


@needs_wheels
def test_load():
    code = """
import json, sys
from lynx_trt.tensorrt import gpu, loader
before = [name for name in sys.modules if name in ("numpy", "onnx", "torch") or name.startswith("tensorrt")]
loaded = loader.load("rtx")
again = loader.load("rtx")
trt = loaded.module
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
print(json.dumps([before, loaded is again, loaded.flavor, loaded.version, loaded.origin, builder is not None,
                  "tensorrt" in sys.modules]))
"""
    output = run(code)
    # The only line: TensorRT and the loader print nothing.
    before, same, flavor, version, origin, builds, foreign = json.loads(output)
    assert before == []  # importing the loader costs nothing
    assert same
    assert flavor == "rtx"
    assert version.split(".")[0].isdigit()
    assert version == importlib.metadata.version(loader.RTX_WHEELS[0]) == loader.describe()["rtx"]
    assert "the module tensorrt_rtx" in origin
    assert builds
    assert not foreign  # it is another product


@needs_wheels
def test_the_parser_finds_its_library_by_the_name_that_it_opens(monkeypatch):
    """With a plugin node it ends the process where it can't: a graph with one is built in test_tensorrt_build.py."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    with loader.parser_environment() as environment:
        folder, mine = environment["LD_LIBRARY_PATH"].split(":")
        link = Path(folder) / "libtensorrt_rtx.so"
        assert link.resolve().name.startswith("libtensorrt_rtx.so.")
        assert link.is_file()
        assert mine == "/mine"
        run("import ctypes; ctypes.CDLL('libtensorrt_rtx.so')", **environment)
    assert not Path(folder).exists()


def test_without_the_wheels_the_environment_is_as_it_was(monkeypatch):
    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    with loader.parser_environment() as environment:
        assert list(Path(environment["LD_LIBRARY_PATH"]).iterdir()) == []


@needs_wheels
def test_describe_loads_nothing():
    code = """
import json, sys
from lynx_trt.tensorrt import gpu, loader
found = loader.describe()
assert not [name for name in sys.modules if name.startswith("tensorrt")]
assert "libtensorrt" not in open("/proc/self/maps").read()
print(json.dumps(found))
"""
    found = json.loads(run(code))
    assert found.keys() == {"gpus", "full", "rtx", "auto"}
    assert found["rtx"]


# ---- which one


def test_unknown_flavor():
    with pytest.raises(UsageError, match="'lean': choose auto, full or rtx"):
        loader.load("lean")


def fake_tensorrt(monkeypatch, *, works: bool, version: str = "11.4.0.106") -> types.ModuleType:
    module = types.ModuleType("tensorrt")
    module.__version__ = version
    module.__file__ = "/somewhere/tensorrt/__init__.py"
    module.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, severity: None})

    def builder(logger):
        if not works:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return object()

    module.Builder = builder
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def test_full_is_taken_where_there_is_a_gpu(monkeypatch):
    module = fake_tensorrt(monkeypatch, works=True)
    monkeypatch.setattr(loader, "count_gpus", lambda: 1)
    loaded = loader._load.__wrapped__("auto")
    assert loaded.module is module
    assert (loaded.flavor, loaded.version) == ("full", "11.4.0.106")


@pytest.mark.parametrize(("version", "taken"), [("10.14.1.48", False), ("10.15.0", True), ("12.0", True)])
def test_full_that_is_too_old(monkeypatch, version, taken):
    """Its parser would refuse our graphs operator by operator."""
    fake_tensorrt(monkeypatch, works=True, version=version)
    monkeypatch.setattr(loader, "count_gpus", lambda: 1)
    if taken:
        assert loader._load.__wrapped__("full").version == version
        return
    with pytest.raises(TensorRTError, match=r'TensorRT 10\.14\.1\.48 .*TensorScatter: pip install "tensorrt>=10\.15"'):
        loader._load.__wrapped__("full")


@pytest.mark.parametrize(("gpus", "works", "reason"), [(0, True, "reports no GPU"), (1, False, "returned nullptr")])
def test_full_that_does_not_work(monkeypatch, gpus, works, reason):
    fake_tensorrt(monkeypatch, works=works)
    monkeypatch.setattr(loader, "count_gpus", lambda: gpus)
    with pytest.raises(TensorRTError, match=f"full TensorRT does not work here: .*{reason}.*pip install tensorrt"):
        loader._load.__wrapped__("full")
    package = loader.Loaded(types.ModuleType("tensorrt_rtx"), "rtx", "1.8.0", "somewhere")
    monkeypatch.setattr(loader, "_rtx", lambda reasons: package)
    loaded = loader._load.__wrapped__("auto")
    assert reason in loaded.passed_over
    # An engine that can't run here: it is said why full TensorRT, which could, was not taken.
    monkeypatch.setattr(gpu, "compute_capabilities", lambda: [90] * gpus)
    refused = loader.unbuildable_by(loaded, [90])
    assert "not on SM 90" in refused
    assert f"(full TensorRT was not taken here: {loaded.passed_over})" in refused
    assert loader.unbuildable_by(loaded, [89]) is None
    assert loader._load.__wrapped__("rtx").passed_over is None  # it was not tried


def fake_rtx(monkeypatch, name: str, builder: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__version__, module.__file__ = "1.8.0.1", f"/somewhere/{name}/__init__.py"
    module.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, severity: None})
    module.Builder = lambda logger: builder
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_either_name_of_rtx_will_do(monkeypatch):
    """That of the SDK's package before that of the wheels, which it is made of."""
    bindings = fake_rtx(monkeypatch, "tensorrt_rtx_bindings", object())
    if not loader._importable("tensorrt_rtx"):
        loaded = loader._load.__wrapped__("rtx")
        assert (loaded.module, loaded.flavor, loaded.version) == (bindings, "rtx", "1.8.0.1")
        assert loaded.origin == "the module tensorrt_rtx_bindings in /somewhere/tensorrt_rtx_bindings"
    module = fake_rtx(monkeypatch, "tensorrt_rtx", object())
    assert loader._load.__wrapped__("rtx").module is module


def test_no_tensorrt_at_all(monkeypatch):
    monkeypatch.setattr(loader, "_importable", lambda module: False)
    with pytest.raises(
        TensorRTError, match=r"no module named tensorrt.*is not installed: pip install .lynx-trt\[cpu\]"
    ):
        loader._load.__wrapped__("auto")
    found = loader.describe()
    assert (found["full"], found["rtx"], found["auto"]) == (None, None, None)


def test_rtx_that_does_not_start(monkeypatch):
    """Bindings without the wheel of their libraries, say."""
    fake_rtx(monkeypatch, "tensorrt_rtx", None)
    with pytest.raises(TensorRTError, match=r"can't be loaded: RuntimeError: it makes no Builder; install it again"):
        loader._load.__wrapped__("rtx")


def test_cache_root(monkeypatch):
    monkeypatch.delenv(loader.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert loader.cache_root() == Path("/caches/lynx-trt")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: ignore it
    assert loader.cache_root() == Path("/home/me/.cache/lynx-trt")
    monkeypatch.setenv(loader.CACHE_VARIABLE, "~/mine")
    assert loader.cache_root() == Path("/home/me/mine")
