"""Starting Triton Inference Server: which one, with which flags, on a laptop or in the vendor's container."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lynx_trt.errors import ServingError, UsageError
from lynx_trt.serving import watchdog
from lynx_trt.serving.environment import Environment, libpython, prepare, requirements
from lynx_trt.serving.repository import Repository

IMAGE = "nvcr.io/nvidia/tritonserver:25.09-py3"
# HTTP bodies that say they are forms (curl's default) are parsed on the stack: 4 MB of them kill a server with the
# usual 8 MB (triton-inference-server/server issue 5840). With 1 GB 300 MB were seen to pass. It is virtual memory.
STACK_BYTES = 1 << 30
# These can load models, open shared memory, or name files to write to. They answer only to a random key.
RESTRICTED = "model-repository,shared-memory,trace,logging"
SHM_PREFIX = "lynx_trt_"


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str = "127.0.0.1"
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    openai: int | None = None  # where a process beside it answers OpenAI's API


@dataclass(frozen=True)
class Command:
    """A server's command line and its environment."""

    arguments: list[str]
    variables: dict[str, str]


def flags(repository: str, model: str, address: Address, *, drain: int) -> list[str]:
    """The server's flags.

    Args:
        repository: the repository's path as the server sees it.
        model: what to load; others in the repository are left alone.
        address: where to listen.
        drain: seconds that requests in flight have after SIGTERM.
    """
    key = secrets.token_hex(16)
    return [
        f"--model-repository={repository}",
        "--model-control-mode=explicit",
        f"--load-model={model}",
        f"--http-address={address.host}",
        f"--grpc-address={address.host}",
        f"--metrics-address={address.host}",
        f"--http-port={address.http}",
        f"--grpc-port={address.grpc}",
        f"--metrics-port={address.metrics}",
        f"--http-restricted-api={RESTRICTED}:lynx-operator={key}",
        f"--grpc-restricted-protocol={RESTRICTED}:lynx-operator={key}",
        f"--exit-timeout-secs={drain}",
    ]


def local_command(
    repository: Repository,
    address: Address,
    *,
    drain: int,
    phase: Callable[[str], Callable[[float], None]],
    more: Sequence[str] = (),
) -> Command:
    """The command for a server on this machine: `tritonserver` on the PATH, else the wheel's, installed if need be.

    `more` are requirements of the model beside the usual ones.

    Raises:
        ServingError: there is none and none can be made, or a port is taken.
    """
    _check_ports(address)
    found = shutil.which("tritonserver")
    made = prepare(server=found is None, phase=phase, more=more)
    arguments = [found or str(made.server)]
    arguments += flags(str(repository.folder.absolute()), repository.name, address, drain=drain)
    _remove_stale_memory()
    arguments.append(f"--backend-config=python,shm-region-prefix-name={SHM_PREFIX}{os.getpid()}_")
    if found is None:
        arguments.append(f"--backend-directory={made.backends}")
    return Command(arguments, _variables(made, wheel=found is None))


def _variables(made: Environment, *, wheel: bool) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # The Python backend starts the first python3 of the PATH.
    variables["PATH"] = f"{made.programs}{os.pathsep}{variables.get('PATH', os.defpath)}"
    variables["TOKENIZERS_PARALLELISM"] = "false"
    variables[watchdog.VARIABLE] = "1"  # whoever supervises this server can start it again; it can't by itself
    if wheel:
        folders = [str(made.libraries), str(libpython() or ""), variables.get("LD_LIBRARY_PATH", "")]
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    return variables


def start(command: Command, beside: Sequence[str] = ()) -> None:
    """Become the server; signals to this process are then the server's own. Doesn't return.

    `beside` is the command of a process that is started with it, and has to see to it that it ends with it.
    """
    if beside:
        subprocess.Popen(beside, stdin=subprocess.DEVNULL)  # noqa: S603
    limit, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
    os.execve(command.arguments[0], command.arguments, command.variables)  # noqa: S606


def openai_command(repository: Repository, address: Address, *, drain: int) -> list[str]:
    """What answers OpenAI's API in front of the server that this process becomes."""
    host = "127.0.0.1" if address.host in ("0.0.0.0", "::") else address.host  # noqa: S104  (to connect to, not to bind)
    there = f"[{host}]" if ":" in host else host
    options = {
        "--server": f"{there}:{address.http}",
        "--host": address.host,
        "--port": str(address.openai),
        "--drain": str(drain),
        "--parent": str(os.getpid()),
    }
    words = [word for pair in options.items() for word in pair]
    return [sys.executable, "-m", "lynx_trt.openai", repository.name, *words]


def docker_command(
    repository: Repository,
    address: Address,
    *,
    image: str,
    gpu: bool,
    drain: int,
    more: Sequence[str] = (),
) -> str:
    """The command for the vendor's container, to be printed; `more` as in `local_command`."""
    inside = Address("0.0.0.0", 8000, 8001, 8002)  # noqa: S104  (inside the container; published below on `host`)
    needs = " ".join(shlex.quote(name) for name in (*requirements(), *more))
    server = shlex.join(["tritonserver", *flags("/models", repository.name, inside, drain=drain)])
    ports = zip((address.http, address.grpc, address.metrics), (8000, 8001, 8002), strict=True)
    parts = [
        "docker run --rm --init",
        *(["--gpus all"] if gpu else []),
        f"-e {watchdog.VARIABLE}=1 --shm-size=1g --ulimit memlock=-1 --ulimit stack={STACK_BYTES}",
        " ".join(f"-p {address.host}:{outside}:{port}" for outside, port in ports),
        f"-v {shlex.quote(str(repository.folder.absolute()))}:/models:ro",
        image,
        f"bash -c {shlex.quote(f'pip install --quiet {needs} && exec {server}')}",
    ]
    return " \\\n  ".join(parts)


def _check_ports(address: Address) -> None:
    ports = {"--http-port": address.http, "--grpc-port": address.grpc, "--metrics-port": address.metrics}
    if address.openai is not None:
        ports["--openai-port"] = address.openai
    if len(set(ports.values())) < len(ports):
        raise UsageError(f"the ports {', '.join(map(str, ports.values()))} are not {len(ports)}; choose others")
    for option, port in ports.items():
        check_port(address.host, port, option)


def check_port(host: str, port: int, option: str) -> None:
    """Raises ServingError: nobody can listen there; `option` is what chooses another port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"can't listen on {host}:{port}: {error.strerror}; choose another port ({option}) or end what listens "
                "there"
            ) from None


def _remove_stale_memory() -> None:
    """Shared memory of servers that were killed; the process id in its name says whose it was."""
    for region in Path("/dev/shm").glob(f"{SHM_PREFIX}*"):  # noqa: S108  (where the Python backend keeps it)
        pid = region.name.removeprefix(SHM_PREFIX).split("_")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):
                region.unlink()
