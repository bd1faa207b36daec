"""The options of a calibration, and what can be wrong with them before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lynx_trt.console import note
from lynx_trt.errors import UsageError

if TYPE_CHECKING:
    from lynx_trt.artifact import Artifact
    from lynx_trt.budgets import Restriction
    from lynx_trt.calibration.promise import Promise
    from lynx_trt.calibration.text import Text
    from lynx_trt.selection import Selection

Hardware = Literal["h100", "h200", "a100", "l40s", "b200"]
Device = Literal["auto", "cpu", "cuda"]
DialName = Literal["floors", "budgets"]

RESULT = "calibration.json"
PAGE = "report.html"
JOURNAL = "calibration.partial.jsonl"
DEFAULT_LENGTH = 512
DEFAULT_MAX_KL = 0.01
# Fewer sequences in a part say too little about how much sequences differ.
FEWEST = 4


@dataclass(frozen=True)
class CalibrateOptions:
    """Everything that decides what is measured. Lengths are in tokens, perplexity increase 0.01 is 1%."""

    artifact: Path
    checkpoint: Path | None = None
    text: tuple[Path, ...] = ()
    validation_text: tuple[Path, ...] = ()  # to check the promise on; none: the half of `text` that is held out
    output: Path | None = None
    batch: str = "16"
    sequences: int = 64
    length: int | None = None
    prompt_length: int = 64
    max_kl: float | None = None
    max_perplexity_increase: float | None = None
    min_agreement: float | None = None
    dial: DialName | None = None  # None: floors, where the selection guarantees a token an expert
    budget: str | None = None
    floor: float | None = None
    hardware: str = "h100"
    bandwidth: float | None = None
    layer_overhead: float | None = None  # microseconds
    search_parameters: bool = False
    compare: bool = True
    write: bool = True
    seed: int = 0
    device: Device = "auto"
    threads: int | None = None
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False


def output_folder(options: CalibrateOptions, *, finished: bool = False) -> Path:
    """The folder to write to; with `finished` it is only named, and may hold the outcome.

    Raises:
        UsageError: it holds something that must not be replaced.
    """
    artifact = options.artifact
    if artifact.name in ("", ".."):  # the folder that one is in, or the one above
        artifact = artifact.resolve()
    folder = options.output or artifact.with_name(f"{artifact.name}-calibration")
    if finished:
        return folder
    if options.resume and options.overwrite:
        raise UsageError("--resume goes on with what is there and --overwrite replaces it; give one of them")
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise UsageError(f"{folder} exists and is not a folder; choose another --output")
    done, interrupted = (folder / RESULT).is_file(), (folder / JOURNAL).is_file()
    if any(folder.iterdir()) and not done and not interrupted:
        raise UsageError(f"{folder} exists and is no calibration, so it is not touched; choose another --output")
    if done and not interrupted and not options.overwrite:
        raise UsageError(f"{folder} holds a calibration; choose another --output, or pass --overwrite to replace it")
    return folder


def batch_sizes(options: CalibrateOptions) -> list[int]:
    """Every B, the smallest first.

    Raises:
        UsageError: the list can't be read, or there are fewer sequences than two batches.
    """
    try:
        sizes = sorted({int(part) for part in options.batch.split(",")})
    except ValueError:
        raise UsageError(
            f"--batch is {options.batch!r}; write sizes with commas between them, such as 4,16,64"
        ) from None
    if sizes[0] < 1:
        raise UsageError(f"--batch has {sizes[0]}; a batch has 1 sequence or more")
    if options.sequences < 2 * FEWEST:
        raise UsageError(f"--sequences is {options.sequences}; it must be {2 * FEWEST} or more")
    if options.sequences // 2 < sizes[-1]:
        raise UsageError(
            f"--batch {sizes[-1]} needs {2 * sizes[-1]} sequences, half of them to choose on and half to "
            f"check the choice; --sequences is {options.sequences}"
        )
    return sizes


def only_measures(options: CalibrateOptions) -> bool:
    """Whether budgets or floors are given, so that nothing is searched for."""
    return options.budget is not None or options.floor is not None


def dial_name(options: CalibrateOptions, *, guaranteed: int) -> DialName:
    """The dial to search with; `guaranteed` is k0, the experts that every token is guaranteed.

    Raises:
        UsageError: floors, where a token may be left without any expert.
    """
    if options.dial == "floors" and not guaranteed:
        raise UsageError(
            "--dial floors can leave a token without any expert, since the artifact's preset guarantees none; "
            "use --dial budgets, or a preset that guarantees experts (lynx, oea)"
        )
    return options.dial or ("floors" if guaranteed else "budgets")


def given_restriction(options: CalibrateOptions, experts: Sequence[int]) -> Restriction | None:
    """What --budget and --floor say, as for build; None where neither is given.

    Raises:
        UsageError: they don't fit the model.
    """
    from lynx_trt.budgets import Restriction, parse_budget, with_floor

    if not only_measures(options):
        return None
    # Without a budget as many as have the votes.
    chosen = Restriction(tuple(experts)) if options.budget is None else parse_budget(options.budget, experts)
    return with_floor(chosen, options.floor)


def note_other_parameters(options: CalibrateOptions, selection: Selection) -> None:
    """Say so where the file of --budget was found with other parameters than `selection`, the artifact's."""
    from lynx_trt.budgets import selection_in

    brought = selection_in(options.budget) if options.budget is not None else None
    if brought not in (None, selection):
        note(
            f"{options.budget} was found with other parameters of the selection than the artifact has, and these are "
            "what is measured; build the artifact with it to have those"
        )


def promised(options: CalibrateOptions) -> Promise | None:
    """What is promised; None where budgets and floors are only measured.

    Raises:
        UsageError: a limit is out of its range.
    """
    from lynx_trt.calibration.promise import Promise

    limits = (options.max_kl, options.max_perplexity_increase, options.min_agreement)
    if all(limit is None for limit in limits):
        return None if only_measures(options) else Promise(max_kl=DEFAULT_MAX_KL)
    return Promise(*limits)


def sequence_length(options: CalibrateOptions, artifact: Artifact) -> int:
    """L, the tokens of a sequence.

    Raises:
        UsageError: it doesn't fit the artifact, or the prompt.
    """
    longest = artifact.manifest.model.max_length
    length = min(DEFAULT_LENGTH, longest) if options.length is None else options.length
    if length > longest:
        raise UsageError(f"--length is {length}, but the artifact takes {longest} tokens at most")
    if options.prompt_length < 1:
        raise UsageError(f"--prompt-length is {options.prompt_length}; it must be 1 or more")
    if length < options.prompt_length + 2:
        ways = [f"--prompt-length {length - 2} or less"] if length >= 3 else []
        if options.prompt_length + 2 <= longest:
            ways.append(f"--length {options.prompt_length + 2} or more")
        raise UsageError(
            f"sequences of {length} tokens leave nothing to decode after --prompt-length {options.prompt_length}; "
            f"give {', or '.join(ways) or 'an artifact with a larger --max-length'}"
        )
    return length


def checkpoint_folder(options: CalibrateOptions, artifact: Artifact) -> Path:
    """The checkpoint that was named, or the shipped one for an artifact of it.

    Raises:
        UsageError: none was named.
    """
    from lynx_trt.build import SHIPPED, shipped_model

    if options.checkpoint is not None:
        return options.checkpoint
    if artifact.manifest.model.name == SHIPPED:
        return shipped_model()
    raise UsageError(
        f"{options.artifact} was built from {artifact.manifest.model.name!r}: "
        "give the folder of that checkpoint with --checkpoint"
    )


def text_of(options: CalibrateOptions, artifact: Artifact) -> Text:
    """The text that was named, or the shipped model's validation text.

    Raises:
        UsageError: none was named, or a file can't be used.
    """
    from lynx_trt.build import SHIPPED
    from lynx_trt.calibration.text import read_text

    if options.text:
        return read_text(options.text, artifact=artifact.folder)
    if artifact.manifest.model.name != SHIPPED:
        raise UsageError("no text: give UTF-8 files of the kind that the model will be used on with --text")
    return shipped_text()


def shipped_text() -> Text:
    """What lynx-tiny was not trained on: modules of the standard library, and its language reference (5/6 of it)."""
    from lynx_trt.calibration.text import Text
    from lynx_trt.models.train import corpus

    return Text(tuple(corpus()[1]), "files of the Python library that lynx-tiny was not trained on")


def validation_of(options: CalibrateOptions, artifact: Artifact, text: Text) -> Text | None:
    """The text to check the promise on; None: the half of `text` that is held out.

    Raises:
        UsageError: it is no other text than `text`, can't be used, or there is nothing to check.
    """
    from lynx_trt.calibration.text import read_text

    if not options.validation_text:
        return None
    if only_measures(options):
        raise UsageError(
            "--validation-text checks what a search chose, and with --budget or --floor nothing is searched for; "
            "give the text to measure on with --text"
        )
    validation = read_text(options.validation_text, "--validation-text", artifact.folder)
    shared = set(validation.texts) & set(text.texts)
    if shared:
        path = options.validation_text[validation.texts.index(shared.pop())]
        raise UsageError(
            f"{path} is part of the text to choose on, so it can't show whether the promise holds on other text; "
            "give other text with --validation-text"
        )
    return validation
