"""The virtual environment in which the server's Python backend runs the model, and the server's own wheel.

Made once for a Python and a set of versions, in the user's cache. It is apart from the caller's own environment because
the Python backend of the server in the wheel predates NumPy 2: with NumPy 2 every output arrives with size 0. The
backend finds it through PATH, so no path of this machine has to be written into a repository.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lynx_trt.artifact import EngineRecord
from lynx_trt.errors import ServingError
from lynx_trt.partials import partial
from lynx_trt.tensorrt.loader import RTX_WHEELS, cache_root

SERVER_WHEEL = "nvidia-pytriton==0.7.0"
CUDA_BINDINGS = "cuda-python>=12.8"
# The first that this package runs on, and the last that has a NumPy before 2; the wheel has a stub for 3.13 too.
PYTHONS = ((3, 11), (3, 12))
MARKER = ".ready"
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Environment:
    """A prepared environment, and the server in it if it has one."""

    folder: Path

    @property
    def programs(self) -> Path:
        """The folder to put first on PATH."""
        return self.folder / "bin"

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    @property
    def server(self) -> Path:
        """The server of the wheel."""
        return self.packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"

    @property
    def backends(self) -> Path:
        """The server's backends."""
        return self.packages / "pytriton" / "tritonserver" / "backends"

    @property
    def libraries(self) -> Path:
        """Libraries that came with the wheel."""
        return self.packages / "nvidia_pytriton.libs"


def requirements() -> list[str]:
    """What the model needs, at the versions of this environment where it has them, so that both compute the same."""
    names = {
        "jinja2": ">=3.1",
        "llguidance": ">=1.3",
        "onnx": ">=1.22",
        "onnxruntime": ">=1.32",
        "tokenizers": ">=0.21",
        "pydantic": ">=2.7",
    }
    return ["numpy>=1.26,<2", *(f"{name}{_pin(name, least)}" for name, least in names.items())]


def engine_requirements(engine: EngineRecord) -> list[str]:
    """What runs an engine from Python: the TensorRT that built it, and CUDA's bindings."""
    if engine.flavor == "full":
        return [f"tensorrt=={engine.tensorrt}", CUDA_BINDINGS]
    return [*(f"{wheel}{_pin(wheel, '')}" for wheel in RTX_WHEELS), CUDA_BINDINGS]


def _pin(name: str, least: str) -> str:
    try:
        return f"=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return least


def environment(*, server: bool, more: Sequence[str] = ()) -> Environment:
    """Where the environment is or will be; nothing is made."""
    wanted = [*requirements(), *more, *([SERVER_WHEEL] if server else [])]
    digest = hashlib.sha256("\n".join([sys.version, sys.base_prefix, *wanted]).encode()).hexdigest()[:12]
    return Environment(cache_root() / f"serving-{sys.version_info.major}.{sys.version_info.minor}-{digest}")


def is_ready(found: Environment) -> bool:
    """Whether it was made, to its end."""
    return (found.folder / MARKER).is_file()


def prepare(*, server: bool, phase: Callable[[str], Callable[[float], None]], more: Sequence[str] = ()) -> Environment:
    """Make the environment, if it isn't there yet.

    Args:
        server: with the server's wheel.
        phase: begins a phase of the progress, as lynx_trt.console.Progress does.
        more: requirements beside the usual ones.

    Raises:
        ServingError: it can't be made; the message says what failed and what to do.
    """
    found = environment(server=server, more=more)
    if is_ready(found):
        return found
    if server:
        _check_python()
    try:
        with partial(found.folder) as aside:
            _make(aside, [*requirements(), *more], server=server, phase=phase)
            if not is_ready(found):  # another process may have been faster
                shutil.rmtree(found.folder, ignore_errors=True)
                aside.rename(found.folder)
    except OSError as error:
        raise ServingError(f"can't make the server's environment {found.folder}: {error.strerror or error}") from error
    return found


def _make(folder: Path, wanted: list[str], *, server: bool, phase: Callable[[str], Callable[[float], None]]) -> None:
    update = phase("Environment for the server (once)")
    _run([sys.executable, "-m", "venv", str(folder)], "making a virtual environment")
    update(1.0)
    update = phase("Installing " + ", ".join(map(_name, wanted)))
    # What has no wheel for this Python would be compiled, for minutes or in vain. TensorRT is no wheel on PyPI.
    wheels = ",".join(_name(each) for each in requirements())
    _pip(folder, ["--only-binary", wheels, *wanted])
    update(1.0)
    if server:
        update = phase(f"Installing {SERVER_WHEEL} (55 MB)")
        # Without what it asks for: that is for its own Python API, which nothing here uses.
        _pip(folder, ["--no-deps", SERVER_WHEEL])
        _place_stub(Environment(folder))
        update(1.0)
    _run(
        [str(folder / "bin" / "python"), "-c", "import jinja2, onnx, onnxruntime, tokenizers, pydantic"],
        "its own check",
    )
    (folder / MARKER).touch()


def _name(requirement: str) -> str:
    return re.split(r"[<>=]", requirement)[0]


def libpython() -> Path | None:
    """The folder of this Python's shared library, which the backend's stub links; None if it has none."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    places = [sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LIBPL"), f"{sys.base_prefix}/lib"]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    places += [f"/usr/lib/{multiarch}"] if multiarch else []
    return next((Path(place) for place in places if place and (Path(place) / name).exists()), None)


def _check_python() -> None:
    version = sys.version_info[:2]
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ServingError(
            f"{SERVER_WHEEL} is for Linux on x86-64, and this is {platform.system()} on {platform.machine()}; "
            "use the vendor's container (--docker)"
        )
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        raise ServingError(
            f"{SERVER_WHEEL} runs models with Python 3.{PYTHONS[0][1]} to 3.{PYTHONS[1][1]}, and this is "
            f"{version[0]}.{version[1]}; use one of these, or the vendor's container (--docker)"
        )
    if libpython() is None:
        raise ServingError(
            f"this Python has no shared library (libpython{version[0]}.{version[1]}.so.1.0), which the server's Python "
            "backend links; install it (on Debian and Ubuntu libpython3-dev), use a Python built with --enable-shared, "
            "or use the vendor's container (--docker)"
        )


def _place_stub(made: Environment) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = made.server.parent.parent / "python_backend_stubs" / version / STUB
    target = made.backends / "python" / STUB
    shutil.copyfile(stub, target)
    target.chmod(0o755)
    made.server.chmod(0o755)


def _pip(folder: Path, arguments: list[str]) -> None:
    base = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*base, *arguments], f"pip install {' '.join(arguments)}")


def _run(command: list[str], what: str) -> None:
    # Nothing of the caller's environment may leak in: a PYTHONPATH would be looked at first.
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)  # noqa: S603
    if result.returncode:
        lines = [line for line in (result.stderr or result.stdout).strip().splitlines() if line.strip()]
        last = lines[-1].removeprefix("ERROR: ") if lines else f"it ended with {result.returncode}"
        raise ServingError(f"the server's environment can't be made: {what} failed: {last}")
