"""`python -m lynx_trt.generate`: prompts in, text out, by TensorRT or ONNX Runtime; all prompts decode as one batch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lynx_trt.console import Progress, new_app, note, print_json, run, size
from lynx_trt.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from rich.live import Live

    from lynx_trt.artifact import Artifact, Manifest
    from lynx_trt.budgets import Restriction
    from lynx_trt.runtime.answers import Form, Splitter
    from lynx_trt.runtime.decode import Generated, Statistics
    from lynx_trt.runtime.open import Name
    from lynx_trt.runtime.sampling import Sampling
    from lynx_trt.selection import Selection


def selection_of(manifest: Manifest) -> Selection:
    """The selection that the artifact's graph computes."""
    from lynx_trt.selection import Selection

    return Selection(**manifest.selection.parameters)  # type: ignore[arg-type]


def restriction_for(manifest: Manifest, budget: str | None, floor: float | None = None) -> Restriction:
    """The artifact's own restriction, with what `--budget` and `--floor` say in its place.

    Raises:
        UsageError: one of them is out of its range.
    """
    from lynx_trt import budgets as dial

    chosen = manifest.selection.restriction
    for name, value in (("--budget", budget), ("--floor", floor)):
        if value is not None and manifest.selection.preset == "off":
            raise UsageError(
                f"{name} {value} means nothing for an artifact built with --preset off, which uses all experts; "
                "leave it out, or build with another preset"
            )
    if budget is not None:
        chosen = dial.parse_budget(budget, [layer.experts for layer in manifest.model.moe_layers])
    chosen = dial.with_floor(chosen, floor)
    dial.check_leaves_experts(chosen, selection_of(manifest), manifest.model.moe_layers[0].experts_per_token)
    return chosen


def generate_text(
    artifact: Artifact,
    prompts: Sequence[str],
    *,
    budget: str | None = None,
    floor: float | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    chat: bool = False,
    system: str | None = None,
    chat_options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    backend: Name = "auto",
    on_text: Any = None,
    on_thought: Any = None,
) -> tuple[list[Generated], Statistics]:
    """Continue `prompts` as one batch, on the engine or in ONNX Runtime (`runtime.open`).

    With `chat` each is a user's message, behind the message `system` if there is one, and what comes is the answer:
    text without the model's thoughts, which are the sequences' `thoughts` and go to `on_thought` as they come.

    Raises:
        LynxError: the artifact, a prompt or a setting doesn't fit; the message says which.
    """
    from lynx_trt.artifact import TOKENIZER
    from lynx_trt.runtime.answers import PLAIN, joined
    from lynx_trt.runtime.decode import generate
    from lynx_trt.runtime.open import limits_of, open_backend
    from lynx_trt.runtime.sampling import Sampling
    from lynx_trt.runtime.text import Tokenizer

    restriction = restriction_for(artifact.manifest, budget, floor)
    tokenizer = Tokenizer(artifact.path(TOKENIZER))
    if not prompts:
        raise UsageError("there is no prompt; pass --prompt TEXT, once for each sequence of the batch")
    form = PLAIN
    if chat:
        form, prompts = _as_chat(artifact, prompts, system, chat_options)
        on_text = _apart([form.splitter(prompt) for prompt in prompts], on_text, on_thought)
    sequences, statistics = generate(
        open_backend(artifact, len(prompts), threads=threads, name=backend),
        tokenizer,
        limits_of(artifact.manifest),
        prompts,
        restriction=restriction,
        max_new_tokens=max_new_tokens,
        sampling=sampling or Sampling(),
        stop=stop,
        special=not chat,
        shown=form.markers,
        on_text=on_text,
    )
    for prompt, sequence in zip(prompts, sequences, strict=True) if chat else ():
        splitter = form.splitter(prompt)
        parts = [*splitter.feed(sequence.text), *splitter.end()]
        sequence.text, sequence.thoughts = joined(parts, "text"), joined(parts, "thought")
    return sequences, statistics


def _apart(splitters: Sequence[Splitter], on_text: Any, on_thought: Any) -> Any:
    """What takes pieces of answers and passes on their parts; white space at an answer's end may stay behind."""
    to = {"text": on_text, "thought": on_thought}

    def take(row: int, piece: str) -> None:
        for part in splitters[row].feed(piece):
            if (show := to.get(part.kind)) is not None:
                show(row, part.text)

    return take


def _as_chat(
    artifact: Artifact, prompts: Sequence[str], system: str | None, options: Mapping[str, Any] | None
) -> tuple[Form, list[str]]:
    """The form of the model's answers, and prompts in its template."""
    from lynx_trt.runtime.chat import ChatTemplate

    template = ChatTemplate.find(artifact.folder)
    if template is None:
        raise ArtifactError(
            f"{artifact.folder} has no chat template: its checkpoint had none, or it was built by an older version; "
            "leave --chat out, or build it again"
        )
    before = [] if system is None else [{"role": "system", "content": system}]
    asked = [template.render([*before, {"role": "user", "content": prompt}], options) for prompt in prompts]
    return template.form, asked


def expert_bytes_a_token(manifest: Manifest, statistics: Statistics) -> float:
    """Bytes of expert weights that one decoded token costs: those of the active experts, shared by the batch's tokens.

    NaN if there was no decode step.
    """
    if not statistics.decode_steps:
        return float("nan")
    layers = zip(manifest.model.moe_layers, statistics.active, strict=True)
    step = sum(layer.expert_bytes * active for layer, active in layers)
    return step * statistics.decode_steps / statistics.decode_tokens


app = new_app()


@app.command()
def main(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder, as python -m lynx_trt.build writes it.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; repeat it for a batch.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="The quality dial: experts a MoE layer may load in a decode step (number, fraction or file)."
        ),
    ] = None,
    floor: Annotated[
        float | None, typer.Option(help="Votes for each voting token that an expert needs to be loaded, such as 0.01.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write for each prompt, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more random.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0: no limit.")] = 0,
    min_p: Annotated[
        float, typer.Option(help="Draw no token of less than this share of the likeliest's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Divides the logits of tokens in prompt and answer; 1: none.")
    ] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken from the logits of tokens that the answer has.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Taken from them as often as the answer has them.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws; each prompt has its own generator.", min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End a sequence before this text; repeatable.")] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Each prompt is a message to a chat model: its own template is put around it."),
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the message of the system before it.")] = None,
    chat_options: Annotated[
        str | None,
        typer.Option(help="With --chat: what the template takes beside, as JSON ('{\"enable_thinking\": false}')."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads [default: all cores].", min=1)] = None,
    backend: Annotated[
        Literal["auto", "onnxruntime", "tensorrt"],
        typer.Option(help="What runs it: the engine on a GPU, or the graph in ONNX Runtime; auto: whichever fits."),
    ] = "auto",
    verify: Annotated[bool, typer.Option(help="Check the artifact's sums first.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print texts and statistics as JSON.")] = False,
) -> None:
    """Generate text from an artifact: with its engine on a GPU, or with ONNX Runtime on the CPU."""
    from lynx_trt.artifact import open_artifact
    from lynx_trt.machine import check_threads
    from lynx_trt.runtime.chat import FILE as CHAT_TEMPLATE
    from lynx_trt.runtime.chat import parse_options
    from lynx_trt.runtime.sampling import Sampling

    check_threads(threads)
    if any(not text for text in stop or []):
        raise UsageError("--stop is empty; an empty text would end every sequence at once")
    for name, value in (("--system", system), ("--chat-options", chat_options)):
        if value is not None and not chat:
            raise UsageError(f"{name} is for chat models' templates; add --chat, or leave it out")
    options = None if chat_options is None else parse_options(chat_options)
    prompts = prompt or []
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    with Progress(quiet=json_output) as progress:
        opened = open_artifact(artifact, verify=verify, on_progress=progress.sums())
    if not chat and not json_output and (opened.folder / CHAT_TEMPLATE).is_file():
        note("the model has a chat template, which --chat puts around each prompt; this continues prompts as they are")
    with _Screen([""] * len(prompts) if chat else prompts, quiet=json_output) as screen:
        sequences, statistics = generate_text(
            opened,
            prompts,
            budget=budget,
            floor=floor,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop or (),
            chat=chat,
            system=system,
            chat_options=options,
            threads=threads,
            backend=backend,
            on_text=screen.show,
            on_thought=screen.show_thought,
        )
    if json_output:
        print_json(_report(opened.manifest, prompts, sequences, statistics))
        return
    for number, sequence in enumerate(sequences, 1):
        if sequence.thoughts and not sequence.text:
            note(f"answer {number} ended within its thoughts; raise --max-new-tokens")
    typer.echo(_statistics_line(opened.manifest, statistics), err=True)


class _Screen:
    """Text as it comes: one sequence as a plain stream; several redrawn side by side on a terminal, then printed."""

    def __init__(self, prompts: list[str], *, quiet: bool) -> None:
        self._texts = list(prompts)
        self._quiet = quiet
        self._started = self._thought = False
        self._live: Live | None = None

    def __enter__(self) -> _Screen:
        if not self._quiet and len(self._texts) > 1 and sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(transient=True, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live:
            self._live.stop()
        if self._quiet or kind is not None:
            return
        if len(self._texts) == 1:
            typer.echo("" if self._started else self._texts[0])
            return
        for number, text in enumerate(self._texts, 1):
            typer.secho(f"--- {number} ---", dim=True)
            typer.echo(text)

    def show_thought(self, row: int, piece: str) -> None:
        """Add a piece of a model's thoughts, dim and on a terminal alone: they are no part of the answer."""
        if not self._quiet and len(self._texts) == 1 and sys.stdout.isatty():
            typer.secho(piece, dim=True, nl=False)
            self._thought = True

    def show(self, row: int, piece: str) -> None:
        """Add a piece of text to its sequence."""
        if not self._quiet and len(self._texts) == 1:
            if self._thought:
                sys.stdout.write("\n\n")
                self._thought = False
            sys.stdout.write(piece if self._started else self._texts[0] + piece)
            sys.stdout.flush()
        self._texts[row] += piece
        self._started = True
        if self._live:
            from rich.console import Group
            from rich.rule import Rule
            from rich.text import Text

            parts = [part for text in self._texts for part in (Rule(style="dim"), Text(_last_lines(text)))]
            self._live.update(Group(*parts))


def _last_lines(text: str, lines: int = 6) -> str:
    """The end of a text, so that several fit on a screen."""
    return "\n".join(text.splitlines()[-lines:])


def _statistics_line(manifest: Manifest, statistics: Statistics) -> str:
    prefill = statistics.prompt_tokens / max(statistics.prefill_seconds, 1e-9)
    parts = [f"prefill {statistics.prompt_tokens} tokens, {prefill:.0f} tokens/s"]
    if statistics.decode_steps:
        decode = statistics.decode_tokens / max(statistics.decode_seconds, 1e-9)
        experts = manifest.model.moe_layers[0].experts
        parts.append(f"decode {statistics.decode_tokens} tokens, {decode:.0f} tokens/s")
        parts.append(f"{statistics.mean_active:.1f} of {experts} experts active a layer")
        parts.append(f"{size(expert_bytes_a_token(manifest, statistics))} of expert weights a token")
    return "; ".join(parts)


def _report(
    manifest: Manifest, prompts: list[str], sequences: list[Generated], statistics: Statistics
) -> dict[str, Any]:
    return {
        "sequences": [
            {
                "prompt": text,
                "text": sequence.text,
                "thoughts": sequence.thoughts,
                "tokens": sequence.tokens,
                "finish": sequence.finish,
            }
            for text, sequence in zip(prompts, sequences, strict=True)
        ],
        "statistics": {
            "prompt_tokens": statistics.prompt_tokens,
            "prefill_seconds": statistics.prefill_seconds,
            "decode_tokens": statistics.decode_tokens,
            "decode_seconds": statistics.decode_seconds,
            "decode_steps": statistics.decode_steps,
            "active_experts": list(statistics.active),
            "expert_bytes_a_token": expert_bytes_a_token(manifest, statistics) if statistics.decode_steps else None,
        },
    }


if __name__ == "__main__":
    run(app)
