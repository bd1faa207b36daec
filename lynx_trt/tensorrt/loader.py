"""The one place that imports TensorRT: which one this machine has, and where it came from.

Two products, tried in this order by `load("auto")`:

1. full TensorRT, the module `tensorrt`. Its Builder needs a GPU, so it is only tried where there is one.
2. TensorRT for RTX, which builds without a GPU: the module `tensorrt_rtx` of NVIDIA's packages, or that of its two
   wheels on PyPI, `tensorrt_rtx_bindings` (`pip install "lynx-trt[cpu]"`).

Both have one API. Importing this module costs nothing; `load` costs about 0.4 s.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Literal

from lynx_trt.errors import TensorRTError, UsageError
from lynx_trt.tensorrt.gpu import compute_capabilities, unbuildable

Flavor = Literal["auto", "full", "rtx"]

RTX_WHEELS = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs")
RTX_MODULES = ("tensorrt_rtx", "tensorrt_rtx_bindings")
PARSER_OPENS = "libtensorrt_rtx.so"
INSTALL_CPU = 'pip install "lynx-trt[cpu]"'
INSTALL_FULL = "pip install tensorrt"
# The first whose ONNX parser knows all operators of our graphs.
LEAST_FULL = (10, 15)
CACHE_VARIABLE = "LYNX_TRT_CACHE"


@dataclass(frozen=True)
class Loaded:
    """A TensorRT that was imported.

    `module` has the API of `import tensorrt`; `flavor` is the product, `version` its own (11.4.0.106 or, for RTX,
    1.7.1.116); `origin` says in words where it came from. `passed_over` says why full TensorRT was not taken, where it
    was tried first.
    """

    module: ModuleType
    flavor: Literal["full", "rtx"]
    version: str
    origin: str
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
    return replace(_rtx(reasons), passed_over=passed_over)


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

    Keys: `gpus` (how many CUDA devices the driver reports), `full`, `rtx` (version or None each), `auto` (the flavor
    `load("auto")` would try first, None without any).
    """
    gpus = count_gpus()
    full = _installed_version("tensorrt", "tensorrt") if _importable("tensorrt") else None
    module = _rtx_module()
    rtx = _installed_version(module, RTX_WHEELS[0]) if module else None
    return {"gpus": gpus, "full": full, "rtx": rtx, "auto": "full" if gpus and full else "rtx" if rtx else None}


@contextmanager
def parser_environment() -> Iterator[dict[str, str]]:
    """Environment of a process that reads a graph, for as long as it runs.

    The parser of TensorRT for RTX opens its library by a name that the wheel doesn't have when it meets a plugin node,
    and ends the process if it can't: seen with 1.7.1. So there is a folder with a link of that name meanwhile.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    places = list(spec.submodule_search_locations or ()) if spec else []
    libraries = [file for place in places for file in sorted(Path(place).glob(f"{PARSER_OPENS}.*"))]
    with TemporaryDirectory(prefix="lynx-tensorrt-") as folder:
        for library in libraries[-1:]:
            (Path(folder) / PARSER_OPENS).symlink_to(library)
        before = os.environ.get("LD_LIBRARY_PATH")
        yield {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [folder, before]))}


def count_gpus() -> int:
    """How many CUDA devices the driver reports; 0 where there is no driver."""
    return len(compute_capabilities())


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
        loaded = _started("tensorrt", "full")
    except Exception as error:  # whatever its import does: libraries missing, a package that is only a downloader
        reasons.append(f"{type(error).__name__}: {_one_line(error)}")
        return None
    version = tuple(int(word) for word in loaded.version.split(".")[:2] if word.isdigit())
    if version < LEAST_FULL:
        least = ".".join(map(str, LEAST_FULL))
        reasons.append(
            f"TensorRT {loaded.version} doesn't know RMSNormalization, RotaryEmbedding and TensorScatter: "
            f'pip install "tensorrt>={least}"'
        )
        return None
    return loaded


def _rtx_module() -> str | None:
    """The name of the installed module of TensorRT for RTX."""
    return next((name for name in RTX_MODULES if _importable(name)), None)


def _rtx(reasons: list[str]) -> Loaded:
    """TensorRT for RTX, or a TensorRTError with the reasons why nothing was taken before it."""
    name = _rtx_module()
    if name is None:
        because = f" ({'; '.join(reasons)})" if reasons else ""
        raise TensorRTError(
            f"no TensorRT that works on this machine{because}; the one that builds without a GPU is not installed: "
            f"{INSTALL_CPU}"
        )
    try:
        return _started(name, "rtx")
    except Exception as error:  # whatever its import does: no wheel with its libraries, or another version
        raise TensorRTError(
            f"TensorRT for RTX can't be loaded: {type(error).__name__}: {_one_line(error)}; install it again, for "
            f"Linux on x86-64: {INSTALL_CPU}"
        ) from error


def _started(name: str, flavor: Literal["full", "rtx"]) -> Loaded:
    """Import a product's module. Raises whatever its import raises, or what making a Builder does."""
    module = importlib.import_module(name)
    # That is what fails where the driver is too old for the library.
    if not module.Builder(module.Logger(module.Logger.ERROR)):
        raise RuntimeError("it makes no Builder")
    return Loaded(module, flavor, str(module.__version__), f"the module {name} in {Path(str(module.__file__)).parent}")


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


def _installed_version(module: str, wheel: str) -> str:
    """The version of an installed module without importing it; the vendor names its wheels in several ways."""
    names = importlib.metadata.packages_distributions().get(module, [wheel])
    return next((version for name in names if (version := _wheel_version(name))), "unknown")


def _one_line(text: object, limit: int = 400) -> str:
    return " ".join(str(text).split())[:limit]
