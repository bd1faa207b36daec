"""The one place that imports TensorRT: which one this machine has, and where it came from.

Three sources, tried in this order by `load("auto")`:

1. full TensorRT, the module `tensorrt`. Its Builder needs a GPU, so it is only tried where there is one.
2. TensorRT for RTX as NVIDIA packages it, the module `tensorrt_rtx`.
3. TensorRT for RTX from two wheels of PyPI (`pip install "lynx-trt[cpu]"`): `onnxruntime-ep-nv-tensorrt-rtx-cu13`
   has the libraries, `tensorrt-cu13-bindings` the Python API. Both products share the API, and building an
   engine with TensorRT for RTX needs no GPU.

For the third, `tensorrt.so` of the bindings looks for three libraries beside itself, under the names of full
TensorRT. A private folder in the user's cache holds symbolic links with those names, so nothing has to be
patched, and no LD_LIBRARY_PATH is needed. Importing this module costs nothing; `load` costs about 0.4 s.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from lynx_trt.errors import TensorRTError, UsageError
from lynx_trt.tensorrt.gpu import compute_capabilities, unbuildable

Flavor = Literal["auto", "full", "rtx"]

LIBRARIES_WHEEL = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
BINDINGS_WHEEL = "tensorrt-cu13-bindings"
INSTALL_CPU = 'pip install "lynx-trt[cpu]"'
INSTALL_FULL = "pip install tensorrt"
# The first whose ONNX parser knows all operators of our graphs.
LEAST_FULL = (10, 15)
CACHE_VARIABLE = "LYNX_TRT_CACHE"

# `tensorrt.so` refers to this function by a data relocation, so it must exist even though it is never called:
# TensorRT for RTX has no library of standard plugins, and we use none.
STUB_SOURCE = """\
#include <stdbool.h>
bool initLibNvInferPlugins(void* logger, const char* library_namespace);
bool initLibNvInferPlugins(void* logger, const char* library_namespace) {
    (void)logger;
    (void)library_namespace;
    return true;
}
"""
STUB_NAME = "libnvinfer_plugin.so.11"


@dataclass(frozen=True)
class Loaded:
    """A TensorRT that was imported.

    `module` has the API of `import tensorrt`; `flavor` is the product, `version` the version of its library (11.4.0
    or, for RTX, 1.7.1); `origin` says in words where it came from. `matched` is False where the bindings are of the
    other product than the library: the few methods whose places in the two differ must not be called then
    (`INetworkDefinition.add_plugin_v3` crashes, `Builder.build_serialized_network_to_stream` says True at once and
    writes nothing). `passed_over` says why full TensorRT was not taken, where it was tried first.
    """

    module: ModuleType
    flavor: Literal["full", "rtx"]
    version: str
    origin: str
    matched: bool
    passed_over: str | None = None


def load(flavor: Flavor = "auto") -> Loaded:
    """Import a TensorRT; the second call with the same flavor returns the same object.

    `auto` takes full TensorRT where there is a GPU and it works, else TensorRT for RTX. `full` and `rtx` insist.

    Raises TensorRTError (none is installed, or it doesn't start; the message names the pip command) and
    UsageError (an unknown flavor).
    """
    if flavor not in ("auto", "full", "rtx"):
        raise UsageError(f"unknown TensorRT {flavor!r}: choose auto, full or rtx")
    return _load(flavor)


@functools.cache
def _load(flavor: Flavor) -> Loaded:
    reasons: list[str] = []
    if flavor in ("auto", "full"):
        loaded = _full(reasons)
        if loaded:
            return loaded
        if flavor == "full":
            raise TensorRTError(
                f"full TensorRT does not work here: {reasons[-1]}. Install it with `{INSTALL_FULL}` on a machine with "
                "an NVIDIA GPU, or choose TensorRT for RTX (`rtx`), whose builder needs no GPU"
            )
    passed_over = reasons[0] if reasons else None
    return replace(_rtx_package(reasons) or _rtx_wheels(reasons), passed_over=passed_over)


def likely(flavor: Flavor) -> Literal["full", "rtx"] | None:
    """Which product `load` would try first, without loading it; None: none is installed."""
    found: Literal["full", "rtx"] | None = describe()["auto"] if flavor == "auto" else flavor
    return found


def unbuildable_by(loaded: Loaded, sms: Sequence[int]) -> str | None:
    """`gpu.unbuildable` of a TensorRT that is loaded, and why it was the one."""
    reason = unbuildable(loaded.flavor, sms)
    because = f" (full TensorRT was not taken here: {loaded.passed_over})" if loaded.passed_over else ""
    return f"{reason}{because}" if reason else None


def describe() -> dict[str, Any]:
    """What `load` would find, for a preflight, without loading a TensorRT.

    Keys: `gpus` (how many CUDA devices the driver reports), `full`, `rtx` (version or None each), `rtx_source`
    ("package", "wheels" or None), `auto` (the flavor `load("auto")` would try first, None without any), `missing`
    (wheels that the CPU builder lacks) and `compiler` (the C compiler or None).
    """
    gpus = count_gpus()
    full = _installed_version("tensorrt", "tensorrt") if _importable("tensorrt") else None
    missing = [wheel for wheel in (LIBRARIES_WHEEL, BINDINGS_WHEEL) if _wheel_version(wheel) is None]
    package = _importable("tensorrt_rtx")
    rtx = None
    if package:
        rtx = _installed_version("tensorrt_rtx", "tensorrt-rtx")
    elif not missing:
        rtx = _rtx_version(_wheel_folder(LIBRARIES_WHEEL, "onnxruntime_ep_nv_tensorrt_rtx"))
    return {
        "gpus": gpus,
        "full": full,
        "rtx": rtx,
        "rtx_source": "package" if package else None if missing else "wheels",
        "auto": "full" if gpus and full else "rtx" if rtx else None,
        "missing": missing,
        "compiler": shlex.join(find_compiler() or []) or None,
    }


def count_gpus() -> int:
    """How many CUDA devices the driver reports; 0 where there is no driver."""
    return len(compute_capabilities())


def find_compiler() -> list[str] | None:
    """The C compiler's command: $CC if it is set, else cc, gcc or clang; None where there is none."""
    configured = shlex.split(os.environ.get("CC", ""))
    for command in (configured, ["cc"], ["gcc"], ["clang"]):
        if command and (program := shutil.which(command[0])):
            return [program, *command[1:]]
    return None


def cache_root() -> Path:
    """Where lynx-trt keeps what it makes once for a machine: $LYNX_TRT_CACHE, else `lynx-trt` in the user's cache."""
    configured = os.environ.get(CACHE_VARIABLE)
    if configured:
        return Path(configured).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path is to be ignored.
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "lynx-trt"


def _full(reasons: list[str]) -> Loaded | None:
    """Full TensorRT, or None and the reason."""
    if not _importable("tensorrt"):
        reasons.append("no module named tensorrt")
        return None
    if not count_gpus():
        reasons.append("the CUDA driver reports no GPU")
        return None
    try:
        module = importlib.import_module("tensorrt")
        # Making a Builder is what fails where the driver is too old for the library.
        if not module.Builder(module.Logger(module.Logger.ERROR)):
            raise RuntimeError("it makes no Builder")
    except Exception as error:  # whatever its import does: libraries missing, a package that is only a downloader
        reasons.append(f"{type(error).__name__}: {_one_line(error)}")
        return None
    version = tuple(int(word) for word in str(module.__version__).split(".")[:2] if word.isdigit())
    if version < LEAST_FULL:
        least = ".".join(map(str, LEAST_FULL))
        reasons.append(
            f"TensorRT {module.__version__} doesn't know RMSNormalization, RotaryEmbedding and TensorScatter: "
            f'pip install "tensorrt>={least}"'
        )
        return None
    origin = f"the module tensorrt in {Path(str(module.__file__)).parent}"
    return Loaded(module, "full", str(module.__version__), origin, matched=True)


def _rtx_package(reasons: list[str]) -> Loaded | None:
    """TensorRT for RTX as NVIDIA packages it, or None and the reason."""
    if not _importable("tensorrt_rtx"):
        return None
    try:
        module = importlib.import_module("tensorrt_rtx")
    except Exception as error:
        reasons.append(f"tensorrt_rtx: {type(error).__name__}: {_one_line(error)}")
        return None
    origin = f"the module tensorrt_rtx in {Path(str(module.__file__)).parent}"
    return Loaded(module, "rtx", str(module.__version__), origin, matched=True)


def _rtx_wheels(reasons: list[str]) -> Loaded:
    """TensorRT for RTX from the two wheels of PyPI, through the private folder of links."""
    missing = [wheel for wheel in (LIBRARIES_WHEEL, BINDINGS_WHEEL) if _wheel_version(wheel) is None]
    if missing:
        because = f" ({'; '.join(reasons)})" if reasons else ""
        raise TensorRTError(
            f"no TensorRT that works on this machine{because}; to build without a GPU {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: {INSTALL_CPU}"
        )
    libraries = _wheel_folder(LIBRARIES_WHEEL, "onnxruntime_ep_nv_tensorrt_rtx")
    bindings = _wheel_folder(BINDINGS_WHEEL, "tensorrt_bindings")
    version = _rtx_version(libraries)
    folder = link_folder(_links(libraries, bindings), [_wheel_version(LIBRARIES_WHEEL), _wheel_version(BINDINGS_WHEEL)])
    try:
        module = _import_extension(folder / "tensorrt.so")
    except ImportError as error:
        raise TensorRTError(
            f"TensorRT for RTX {version} can't be loaded from {folder}: {_one_line(error)}. The wheels are for Linux "
            f"on x86-64 with Python 3.11 or later; reinstall them with {INSTALL_CPU}, or set {CACHE_VARIABLE} to a "
            "folder that is not mounted noexec"
        ) from error
    origin = f"the wheels {LIBRARIES_WHEEL} and {BINDINGS_WHEEL}, linked in {folder}"
    return Loaded(module, "rtx", version, origin, matched=False)


def _import_extension(path: Path) -> ModuleType:
    """Import `tensorrt.so`, once in a process."""
    # A name of our own: `import tensorrt` elsewhere must not find half a package. The last component has to be
    # "tensorrt", for it names the module's init function.
    name = "lynx_trt.tensorrt._native.tensorrt"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path, loader=ExtensionFileLoader(name, str(path)))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # The bindings' Python files add this, and code written for `import tensorrt` uses it: Logger.ERROR and so on.
        for severity, value in module.ILogger.Severity.__members__.items():
            setattr(module.Logger, severity, value)
        sys.modules[name] = module
    return sys.modules[name]


def _links(libraries: Path, bindings: Path) -> dict[str, Path]:
    """Name in the private folder -> file in a wheel."""
    library = _newest(libraries, "libtensorrt_rtx.so")
    return {
        "tensorrt.so": bindings / "tensorrt.so",
        "libnvinfer.so.11": library,
        "libtensorrt_rtx.so.1": library,
        # The parser opens this name when it meets a plugin node; without it the process aborts.
        "libtensorrt_rtx.so": library,
        "libnvonnxparser.so.11": _newest(libraries, "libtensorrt_onnxparser_rtx.so"),
    }


def _newest(folder: Path, stem: str) -> Path:
    files = sorted(folder.glob(f"{stem}.*"), key=lambda file: [int(p) for p in file.name.split(".") if p.isdigit()])
    if not files:
        raise TensorRTError(
            f"{stem}.* is not in {folder}: the wheel {LIBRARIES_WHEEL} is damaged or another version; "
            f"reinstall it with {INSTALL_CPU}"
        )
    return files[-1]


def _rtx_version(libraries: Path) -> str:
    return _newest(libraries, "libtensorrt_rtx.so").name.partition(".so.")[2]


def link_folder(links: dict[str, Path], versions: list[str | None]) -> Path:
    """The private folder with the given symbolic links (name -> file) and the stub library, made if need be.

    Its name depends on the versions and on the files' real paths, so two environments never share one. It is made
    aside and renamed, so a second process sees all of it or nothing, and made again if a link dangles.

    Raises TensorRTError: no C compiler, or no place to write.
    """
    key = "\n".join([*map(str, versions), *(f"{n} {p.resolve()}" for n, p in sorted(links.items())), STUB_SOURCE])
    folder = cache_root() / f"tensorrt-rtx-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    targets = {name: path.resolve() for name, path in links.items()}
    if _intact(folder, targets):
        return folder
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkdtemp makes it 0700: nobody else can plant a library that we would load.
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise TensorRTError(
            f"can't make {folder}, where links to TensorRT for RTX belong: {error.strerror}. "
            f"Set {CACHE_VARIABLE} to a folder you can write to"
        ) from error
    try:
        for name, target in targets.items():
            (aside / name).symlink_to(target)
        _compile_stub(aside / STUB_NAME)
        _move_into_place(aside, folder, targets)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _intact(folder: Path, targets: dict[str, Path]) -> bool:
    """Whether the folder is ours alone, and each link is there and leads to its file."""
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            return False
        return (folder / STUB_NAME).is_file() and all(
            target.is_file() and (folder / name).readlink() == target for name, target in targets.items()
        )
    except OSError:
        return False


def _move_into_place(aside: Path, folder: Path, targets: dict[str, Path]) -> None:
    """Rename `aside` to `folder`; another process may be doing the same, and either result will do."""
    for _ in range(10):
        try:
            aside.rename(folder)
            return
        except OSError as error:
            if _intact(folder, targets):
                return  # the other process was first
            if not folder.exists() and not folder.is_symlink():
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    continue  # it was in the way, and another process has just set it aside
                raise TensorRTError(
                    f"can't make {folder}: {error.strerror}. Set {CACHE_VARIABLE} to a folder you can write to"
                ) from error
        # What is there is broken (a link dangles since a reinstall, say): set it aside, then try again.
        broken = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            folder.rename(broken / "old")
        except FileNotFoundError:
            pass  # another process has done so
        except OSError as error:
            raise TensorRTError(f"{folder} is broken and can't be replaced: {error.strerror}. Remove it") from error
        finally:
            shutil.rmtree(broken, ignore_errors=True)
    raise TensorRTError(f"{folder} keeps changing while it is being made: another process writes there. Try again")


def _compile_stub(library: Path) -> None:
    """Compile the library of one function that `tensorrt.so` insists on."""
    compiler = find_compiler()
    if compiler is None:
        raise TensorRTError(
            "no C compiler found, and TensorRT for RTX from PyPI needs one once, for a stub library of one function: "
            "install gcc (`apt install gcc`, `dnf install gcc`) or clang, or set CC to a compiler"
        )
    command = [*compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    try:
        done = subprocess.run(command, input=STUB_SOURCE, capture_output=True, text=True, timeout=120)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TensorRTError(f"the C compiler does not run: {shlex.join(compiler)}: {_one_line(error)}") from error
    if done.returncode != 0:
        raise TensorRTError(
            f"the C compiler failed on a stub of one function (exit code {done.returncode}): {shlex.join(command)}: "
            f"{_one_line(done.stderr)}. Set CC to a working compiler"
        )


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # it is imported, and has no spec
        return True


def _wheel_version(wheel: str) -> str | None:
    try:
        return importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wheel_folder(wheel: str, package: str) -> Path:
    """The folder of a wheel's package, found without importing it (both run code on import)."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise TensorRTError(f"{wheel} is installed but its package {package} is not there: {INSTALL_CPU}")
    return Path(folders[0])


def _installed_version(module: str, wheel: str) -> str:
    """The version of an installed module without importing it; the vendor names its wheels in several ways."""
    names = importlib.metadata.packages_distributions().get(module, [wheel])
    return next((version for name in names if (version := _wheel_version(name))), "unknown")


def _one_line(text: object, limit: int = 400) -> str:
    return " ".join(str(text).split())[:limit]
