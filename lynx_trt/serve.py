"""`python -m lynx_trt.serve`: an artifact becomes a repository of Triton Inference Server, and is served."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lynx_trt.console import Progress, new_app, note, print_json, run, size
from lynx_trt.errors import ServingError, UsageError

if TYPE_CHECKING:
    from lynx_trt.artifact import Artifact
    from lynx_trt.serving.repository import Repository
    from lynx_trt.serving.settings import Settings

app = new_app()

CHECK_TO_GUARD = 50  # --check where its findings decide something: the guard looks every 64 of them


@app.command()
def main(
    artifact: Annotated[
        Path | None, typer.Argument(help="Artifact folder, as python -m lynx_trt.build writes it.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Repository folder [default: out/NAME-repository].")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the server [default: the model's].")] = None,
    slots: Annotated[int, typer.Option(help="Sequences that decode together, at most.")] = 16,
    queue: Annotated[int, typer.Option(help="Requests that may wait for a slot; more are refused at once.")] = 64,
    quality: Annotated[
        str, typer.Option(help="Of requests that ask for none: max, balanced, fast, or a fraction of the experts.")
    ] = "balanced",
    tpot: Annotated[
        float,
        typer.Option(help="Milliseconds of a token (TPOT) for which that quality is lowered under load; 0: never."),
    ] = 0.0,
    lowest: Annotated[str, typer.Option(help="The lowest quality that --tpot brings it to.")] = "fast",
    max_tokens: Annotated[int, typer.Option(help="New tokens of requests that don't say.")] = 128,
    deadline: Annotated[float, typer.Option(help="Seconds after which a request is ended, at most.")] = 300.0,
    backend: Annotated[
        Literal["auto", "onnxruntime", "tensorrt"],
        typer.Option(help="What runs it: the engine on a GPU, or the graph in ONNX Runtime; auto: whichever fits."),
    ] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of ONNX Runtime; 0: what serves best here.")] = 0,
    stream_interval: Annotated[
        float, typer.Option(help="Seconds between two pieces of a stream, at least; 0 sends every token by itself.")
    ] = 0.05,
    reuse: Annotated[
        int,
        typer.Option(help="Tokens that a prompt begins with as an earlier one, to take them from the cache; 0: never."),
    ] = 32,
    check: Annotated[
        int | None,
        typer.Option(
            help="Decode steps of which one is done with all experts too, to see what fewer cost; 0: never [default: "
            "500, with --max-kl 50]."
        ),
    ] = None,
    max_kl: Annotated[
        float,
        typer.Option(help="Nats a token that fewer experts may cost, by --check, or else some come back; 0: no limit."),
    ] = 0.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a repository that is there.")] = False,
    start: Annotated[bool, typer.Option("--start", help="Serve it on this machine.")] = False,
    docker: Annotated[bool, typer.Option("--docker", help="Print the command for the vendor's container.")] = False,
    image: Annotated[str | None, typer.Option(help="The container of --docker.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port of HTTP.", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port of gRPC.", min=1, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port of the Prometheus metrics.", min=1, max=65535)] = 8002,
    openai_port: Annotated[
        int | None, typer.Option(help="With --start: answer OpenAI's API too, on this port.", min=1, max=65535)
    ] = None,
    drain: Annotated[int, typer.Option(help="Seconds that requests in flight have after SIGTERM.", min=0)] = 30,
    set_quality: Annotated[
        str | None,
        typer.Option(help="Change the default quality of the repository --output, also while it is served; no more."),
    ] = None,
    set_tpot: Annotated[float | None, typer.Option(help="The same for --tpot.")] = None,
    set_max_kl: Annotated[float | None, typer.Option(help="The same for --max-kl.")] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Install the server for --start in the user's cache; no more.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Check the artifact's sums first.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON; no progress.")] = False,
) -> None:
    """Turn an artifact into a model repository of Triton Inference Server, and serve it (--start)."""
    from lynx_trt.machine import check_threads
    from lynx_trt.serving.repository import write_repository
    from lynx_trt.serving.server import IMAGE, Address
    from lynx_trt.serving.settings import Settings

    if prepare:
        _prepare(json_output)
        return
    changes = {"quality": set_quality, "tpot": set_tpot, "max_kl": set_max_kl}
    if any(value is not None for value in changes.values()):
        _set_dial(output, changes, json_output)
        return
    if openai_port is not None:
        _check_openai(start)
    if start:
        check_threads(threads)
    if artifact is None:
        raise UsageError("there is no artifact; name its folder, as python -m lynx_trt.build has written it")
    settings = Settings(
        slots=slots,
        queue=queue,
        quality=quality,
        tpot=tpot,
        lowest=lowest,
        max_tokens=max_tokens,
        deadline=deadline,
        backend=backend,
        threads=threads,
        stream_interval=stream_interval,
        reuse=reuse,
        check=check if check is not None else CHECK_TO_GUARD if max_kl else Settings.check,
        max_kl=max_kl,
    )
    opened = _opened(artifact, settings, verify, here=start, quiet=json_output)
    name = name or _name(opened)
    output = output or Path("out") / f"{name}-repository"
    address = Address(host, http_port, grpc_port, metrics_port, openai_port)
    repository = write_repository(opened, output, name=name, settings=settings, overwrite=overwrite)
    more = _more_requirements(opened, backend)
    command = _docker(repository, address, image or IMAGE, drain, more) if docker else None
    _tell(opened, repository, settings, command, json_output)
    if start:
        _start(repository, address, drain, more, json_output)


def _check_openai(start: bool) -> None:
    """Before anything is made. Raises UsageError, or ServingError: what it needs is missing."""
    import importlib.util

    if not start:
        raise UsageError("--openai-port is for --start; in front of another server run python -m lynx_trt.openai NAME")
    if importlib.util.find_spec("aiohttp") is None:
        raise ServingError('aiohttp is missing, which --openai-port needs: pip install "lynx-trt[serve]"')


def _opened(folder: Path, settings: Settings, verify: bool, *, here: bool, quiet: bool = True) -> Artifact:
    """The artifact, if it can be served at all: preflight first.

    Args:
        folder: the artifact's.
        settings: how it is to be served.
        verify: compare the files' sums.
        here: it is this machine that will serve it.
        quiet: no progress is shown.

    Raises:
        LynxError: it doesn't fit this machine, or a setting doesn't fit it.
    """
    from lynx_trt.artifact import TOKENIZER, Artifact, read
    from lynx_trt.budgets import Restriction
    from lynx_trt.machine import weights_problem
    from lynx_trt.preflight import engine_problems, preflight
    from lynx_trt.runtime.quality import Dial

    opened = read(folder)
    # The engine has its own check: where it doesn't fit, ONNX Runtime serves all the same.
    without_engine = Artifact(opened.folder, opened.manifest.model_copy(update={"engine": None}))
    with Progress(quiet=quiet) as progress:
        problems = preflight(without_engine, verify=verify, on_progress=progress.sums()).problems
    if TOKENIZER not in opened.manifest.files:
        problems.append(f"{folder} has no tokenizer, so it can't take text; build it with --tokenizer FOLDER")
    refused = _why_no_engine(opened, settings.backend, engine_problems(opened) if here else [])
    if refused and settings.backend == "tensorrt":
        problems.append(f"the engine of {folder} can't be served: {refused}")
    elif refused and here and (problem := weights_problem(opened.manifest.model)):
        problems.append(f"{folder} can't be served here: {problem}, and its engine can't be: {refused}")
    if problems:
        more = f" (and {len(problems) - 1} more: python -m lynx_trt.inspect {folder})" if len(problems) > 1 else ""
        raise ServingError(problems[0] + more)
    dial = Dial.of(opened.manifest)
    settings.check_model(dial, opened.manifest.model.rewinds)
    default = dial.restriction(settings.quality)
    if settings.tpot and Restriction.strictest([default, dial.restriction(settings.lowest)]) == default:
        raise UsageError(
            f"tpot is {settings.tpot:g} ms, but the quality {settings.lowest!r} is nowhere lower than "
            f"{settings.quality!r}, so there is nothing to lower for it; give a higher --quality or a lower --lowest"
        )
    if refused:
        _check_slots(opened, settings.slots, here=here)
    return opened


def _check_slots(artifact: Artifact, slots: int, *, here: bool) -> None:
    """Caches in this machine's memory, as ONNX Runtime has them; where it won't be this machine, that is only said.

    Raises:
        UsageError: they don't fit this machine, which is to serve them.
    """
    from lynx_trt.inspect import cache_bytes
    from lynx_trt.machine import slots_problem

    in_float32 = 1 if artifact.manifest.model.precision == "fp32" else 2  # as ONNX Runtime's backend keeps them
    problem = slots_problem(slots, in_float32 * cache_bytes(artifact.manifest))
    if problem and here:
        raise UsageError(f"{problem}; lower --slots")
    if problem:
        note(f"{problem}; serve the repository on a larger one, or lower --slots")


def _why_no_engine(artifact: Artifact, backend: str, problems: list[str]) -> str | None:
    """Why it won't be the engine that runs the model; None if it will."""
    if backend == "onnxruntime":
        return "--backend onnxruntime excludes it"
    if artifact.manifest.engine is None:
        return f"there is none: {artifact.manifest.engine_absent}"
    return problems[0] if problems else None


def _more_requirements(artifact: Artifact, backend: str) -> list[str]:
    """What the model's process needs to run the engine, where this machine can run it."""
    from lynx_trt.preflight import engine_problems
    from lynx_trt.serving.environment import engine_requirements

    engine = artifact.manifest.engine
    if engine is None or _why_no_engine(artifact, backend, engine_problems(artifact)):
        return []
    return engine_requirements(engine)


def _name(artifact: Artifact) -> str:
    """A name for the server out of the model's."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", artifact.manifest.model.name).strip("-._") or "lynx"


def _docker(repository: Repository, address: Any, image: str, drain: int, more: list[str]) -> str:
    from lynx_trt.serving.server import docker_command
    from lynx_trt.tensorrt.gpu import compute_capabilities

    gpu = bool(compute_capabilities())
    return docker_command(repository, address, image=image, gpu=gpu, drain=drain, more=more)


def _tell(
    artifact: Artifact,
    repository: Repository,
    settings: Settings,
    docker: str | None,
    json_output: bool,
) -> None:
    from lynx_trt.inspect import cache_bytes

    caches = cache_bytes(artifact.manifest) * settings.slots
    if json_output:
        print_json(
            {
                "repository": str(repository.folder),
                "model": repository.name,
                "cache_bytes": caches,
                "docker": docker,
            }
        )
        return
    verb = "is as it should be" if repository.reused else "is written"
    typer.echo(f"Repository: {repository.folder} {verb}; {settings.slots} slots with {size(caches)} of cache")
    if docker:
        typer.echo(docker)


def _start(repository: Repository, address: Any, drain: int, more: list[str], json_output: bool) -> None:
    from lynx_trt.serving.server import local_command, openai_command, start

    with Progress(quiet=json_output) as progress:
        command = local_command(repository, address, drain=drain, phase=progress.phase, more=more)
    if not json_output:
        url = f"http://{address.host}:{address.http}/v2/models/{repository.name}/generate"
        typer.echo(f"Serving at {url}; when it is ready:")
        typer.echo(f"""  curl {url} -d '{{"text_input": "def add(a, b):", "max_tokens": 32}}'""")
        if address.openai is not None:
            typer.echo(f"OpenAI's API at http://{address.host}:{address.openai}/v1 for {repository.name}")
    start(command, openai_command(repository, address, drain=drain) if address.openai is not None else ())


def _set_dial(output: Path | None, changes: dict[str, Any], json_output: bool) -> None:
    from dataclasses import asdict

    from lynx_trt.serving.repository import set_dial

    if output is None:
        option = next(name for name, value in changes.items() if value is not None).replace("_", "-")
        raise UsageError(f"--set-{option} changes a repository; name it with --output")
    setting = set_dial(output, **changes)
    if json_output:
        print_json({"repository": str(output), **asdict(setting)})
        return
    words = setting.in_words()
    typer.echo(f"The default quality of {output} is {words}; a running server takes it within two seconds")


def _prepare(json_output: bool) -> None:
    from lynx_trt.serving.environment import prepare

    with Progress(quiet=json_output) as progress:
        made = prepare(server=True, phase=progress.phase)
    if json_output:
        print_json({"environment": str(made.folder), "server": str(made.server)})
    else:
        typer.echo(f"The server is ready: {made.server}")


if __name__ == "__main__":
    run(app)
