"""Finding a TensorRT: real wheels where they are installed, the other cases simulated."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import stat
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lynx_trt.errors import TensorRTError, UsageError
from lynx_trt.tensorrt import gpu, loader

WHEELS = (loader.LIBRARIES_WHEEL, loader.BINDINGS_WHEEL)


def has_wheels() -> bool:
    try:
        return all(importlib.metadata.version(wheel) for wheel in WHEELS)
    except importlib.metadata.PackageNotFoundError:
        return False


needs_wheels = pytest.mark.skipif(not has_wheels(), reason=f"{' or '.join(WHEELS)} is not installed")


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(loader.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def links(tmp_path):
    """Links to made-up files: what the folder does needs no TensorRT."""
    wheel = tmp_path / "wheel"
    wheel.mkdir()
    for name in ("library", "bindings"):
        (wheel / name).write_text(name)
    return {"libnvinfer.so.11": wheel / "library", "tensorrt.so": wheel / "bindings"}


@pytest.fixture
def no_compiler_needed(monkeypatch):
    monkeypatch.setattr(loader, "_compile_stub", lambda library: library.write_text("stub"))


# ---- the real thing


@needs_wheels
def test_load(cache):
    code = """
import json, sys
from lynx_trt.tensorrt import gpu, loader
before = [name for name in sys.modules if name in ("numpy", "onnx", "torch") or "_native" in name]
loaded = loader.load("rtx")
again = loader.load("rtx")
trt = loaded.module
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
print(json.dumps([before, loaded is again, loaded.flavor, loaded.version, loaded.origin, loaded.matched,
                  builder is not None, "tensorrt" in sys.modules]))
"""
    output = run(code)
    # The only line: TensorRT and the loader print nothing.
    before, same, flavor, version, origin, matched, builds, foreign = json.loads(output)
    assert before == []  # importing the loader costs nothing
    assert same
    assert flavor == "rtx"
    assert version.split(".")[0].isdigit()
    assert loader.LIBRARIES_WHEEL in origin
    assert str(cache) in origin
    assert not matched
    assert builds
    assert not foreign  # `import tensorrt` elsewhere must not find ours


@needs_wheels
def test_processes_at_once(cache):
    """Several first starts at once, as under mpirun: each works, one folder is left."""
    code = "from lynx_trt.tensorrt import loader; print(loader.load('rtx').version)"
    with ThreadPoolExecutor(3) as pool:
        versions = list(pool.map(lambda _: run(code), range(3)))
    assert len(set(versions)) == 1
    assert len(list(cache.iterdir())) == 1


@needs_wheels
def test_describe_loads_nothing():
    code = """
import json, sys
from lynx_trt.tensorrt import gpu, loader
found = loader.describe()
assert not [name for name in sys.modules if "_native" in name]
assert "libtensorrt" not in open("/proc/self/maps").read()
print(json.dumps(found))
"""
    found = json.loads(run(code))
    assert found.keys() == {"gpus", "full", "rtx", "rtx_source", "auto", "missing", "compiler"}
    assert found["rtx"]
    assert found["missing"] == []


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
    assert (loaded.flavor, loaded.version, loaded.matched) == ("full", "11.4.0.106", True)


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
    package = loader.Loaded(types.ModuleType("tensorrt_rtx"), "rtx", "1.8.0", "somewhere", matched=True)
    monkeypatch.setattr(loader, "_rtx_package", lambda reasons: package)
    loaded = loader._load.__wrapped__("auto")
    assert reason in loaded.passed_over
    # An engine that can't run here: it is said why full TensorRT, which could, was not taken.
    monkeypatch.setattr(gpu, "compute_capabilities", lambda: [90] * gpus)
    refused = loader.unbuildable_by(loaded, [90])
    assert "not on SM 90" in refused
    assert f"(full TensorRT was not taken here: {loaded.passed_over})" in refused
    assert loader.unbuildable_by(loaded, [89]) is None
    assert loader._load.__wrapped__("rtx").passed_over is None  # it was not tried


def test_rtx_package_is_taken_before_the_wheels(monkeypatch):
    module = types.ModuleType("tensorrt_rtx")
    module.__version__, module.__file__ = "1.8.0", "/somewhere/tensorrt_rtx/__init__.py"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    loaded = loader._load.__wrapped__("rtx")
    assert (loaded.module, loaded.flavor, loaded.version, loaded.matched) == (module, "rtx", "1.8.0", True)


@pytest.mark.parametrize("missing", [WHEELS, WHEELS[:1], WHEELS[1:]])
def test_missing_wheels(monkeypatch, missing):
    monkeypatch.setattr(loader, "_importable", lambda module: False)
    monkeypatch.setattr(loader, "_wheel_version", lambda wheel: None if wheel in missing else "1.0")
    with pytest.raises(TensorRTError) as caught:
        loader._load.__wrapped__("auto")
    assert 'pip install "lynx-trt[cpu]"' in str(caught.value)
    assert all((wheel in str(caught.value)) == (wheel in missing) for wheel in WHEELS)
    found = loader.describe()
    assert found["missing"] == list(missing)
    assert found["rtx"] is None
    assert found["auto"] is None


def test_damaged_wheel(tmp_path):
    with pytest.raises(TensorRTError, match=r"libtensorrt_rtx.so.\* is not in .*lynx-trt\[cpu\]"):
        loader._links(tmp_path, tmp_path)


def test_newest_library_is_taken(tmp_path):
    for version in ("1.7.1", "1.10.0", "1.9.3"):  # as numbers, not as text
        (tmp_path / f"libtensorrt_rtx.so.{version}").touch()
    assert loader._rtx_version(tmp_path) == "1.10.0"


# ---- the private folder


@pytest.mark.usefixtures("no_compiler_needed")
class TestLinkFolder:
    def test_made_once(self, cache, links):
        folder = loader.link_folder(links, ["1"])
        assert {path.name for path in folder.iterdir()} == {*links, loader.STUB_NAME}
        assert (folder / "libnvinfer.so.11").resolve() == links["libnvinfer.so.11"]
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700
        before = folder.stat().st_ino
        assert loader.link_folder(links, ["1"]) == folder
        assert folder.stat().st_ino == before
        assert list(cache.iterdir()) == [folder]

    def test_named_by_versions_and_paths(self, cache, links, tmp_path):
        other = tmp_path / "other"
        other.write_text("x")
        folders = {
            loader.link_folder(links, ["1"]),
            loader.link_folder(links, ["2"]),
            loader.link_folder({**links, "tensorrt.so": other}, ["1"]),
        }
        assert len(folders) == 3

    @pytest.mark.parametrize("damage", ["dangling", "elsewhere", "no stub", "open to others", "a file"])
    def test_made_again(self, cache, links, tmp_path, damage):
        folder = loader.link_folder(links, ["1"])
        link = folder / "tensorrt.so"
        if damage == "dangling":
            link.unlink()
            link.symlink_to(tmp_path / "gone")
        elif damage == "elsewhere":
            link.unlink()
            link.symlink_to(links["libnvinfer.so.11"])
        elif damage == "no stub":
            (folder / loader.STUB_NAME).unlink()
        elif damage == "open to others":  # somebody else could have put a library there
            folder.chmod(0o777)
        else:
            subprocess.run(["rm", "-r", folder], check=True)
            folder.write_text("")
        assert loader.link_folder(links, ["1"]) == folder
        assert link.resolve() == links["tensorrt.so"]
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert list(cache.iterdir()) == [folder]

    def test_many_at_once(self, cache, links):
        with ThreadPoolExecutor(16) as pool:
            folders = list(pool.map(lambda _: loader.link_folder(links, ["1"]), range(64)))
        assert set(folders) == set(cache.iterdir())
        assert loader._intact(folders[0], {name: path.resolve() for name, path in links.items()})

    def test_many_at_once_over_a_broken_one(self, cache, links):
        folder = loader.link_folder(links, ["1"])
        (folder / "tensorrt.so").unlink()
        with ThreadPoolExecutor(16) as pool:
            folders = list(pool.map(lambda _: loader.link_folder(links, ["1"]), range(64)))
        assert set(folders) == {folder} == set(cache.iterdir())
        assert loader._intact(folder, {name: path.resolve() for name, path in links.items()})

    def test_another_process_sets_the_broken_one_aside(self, cache, links, monkeypatch):
        """Between the attempt to take its place and the look at what was in the way."""
        folder = loader.link_folder(links, ["1"])
        (folder / "tensorrt.so").unlink()
        rename = Path.rename

        def late(path: Path, target: Path) -> Path:
            if target == folder and folder.exists():
                shutil.rmtree(folder)
                raise OSError(errno.ENOTEMPTY, "Directory not empty")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", late)
        assert loader.link_folder(links, ["1"]) == folder
        assert list(cache.iterdir()) == [folder]

    def test_nowhere_to_write(self, monkeypatch, links):
        monkeypatch.setenv(loader.CACHE_VARIABLE, "/proc/lynx-trt")
        with pytest.raises(TensorRTError, match=r"can't make /proc/lynx-trt/.* Set LYNX_TRT_CACHE to a folder"):
            loader.link_folder(links, ["1"])


def test_cache_root(monkeypatch):
    monkeypatch.delenv(loader.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert loader.cache_root() == Path("/caches/lynx-trt")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: ignore it
    assert loader.cache_root() == Path("/home/me/.cache/lynx-trt")
    monkeypatch.setenv(loader.CACHE_VARIABLE, "~/mine")
    assert loader.cache_root() == Path("/home/me/mine")


# ---- the compiler


def test_no_compiler(monkeypatch, cache, links, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(TensorRTError, match=r"no C compiler found.*apt install gcc.*set CC"):
        loader.link_folder(links, ["1"])
    assert list(cache.iterdir()) == []


def test_compiler_that_fails(monkeypatch, cache, links, tmp_path):
    compiler = tmp_path / "my-cc"
    compiler.write_text("#!/bin/sh\necho 'ld: cannot find crti.o' >&2\nexit 7\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"{compiler} -O2")
    with pytest.raises(TensorRTError, match=r"exit code 7\).*my-cc -O2 .*cannot find crti.o.* Set CC"):
        loader.link_folder(links, ["1"])
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(loader.find_compiler() is None, reason="no C compiler is installed")
def test_the_stub_compiles(tmp_path):
    import ctypes

    loader._compile_stub(tmp_path / "stub.so")
    stub = ctypes.CDLL(str(tmp_path / "stub.so"))
    stub.initLibNvInferPlugins.restype = ctypes.c_bool
    assert stub.initLibNvInferPlugins(None, b"") is True
