"""The tokenizer on its way from a checkpoint's folder into an artifact: looked at first, then copied or converted."""

from __future__ import annotations

from pathlib import Path

from lynx_trt.console import note
from lynx_trt.errors import ArtifactError, CheckpointError, first_line

# What a tokenizer may consist of; tokenizer.json is what decoding reads, the rest is for other tools.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def check_tokenizer(source: Path) -> None:
    """Open the tokenizer in the folder `source`, before the long work; a folder may have none.

    Raises:
        CheckpointError: no such folder, or its tokenizer.json is damaged.
    """
    from lynx_trt.artifact import TOKENIZER
    from lynx_trt.runtime.text import Tokenizer

    if not source.is_dir():
        raise CheckpointError(f"no such tokenizer folder: {source}")
    if not (source / TOKENIZER).is_file():
        return
    try:
        Tokenizer(source / TOKENIZER)
    except ArtifactError as error:
        raise CheckpointError(f"{error}; copy it again, or name another folder with --tokenizer") from None


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer in the folder `source` into `folder`; if there is none, a note says what that means."""
    if not (source / "tokenizer.json").is_file() and any(source.glob("tokenizer*.model")):
        _convert_tokenizer(source, folder)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    if not (folder / "tokenizer.json").is_file():
        note(f"{source} holds no tokenizer, so the artifact can't take text; build with --tokenizer FOLDER to add one")


def _convert_tokenizer(source: Path, folder: Path) -> None:
    """A SentencePiece model becomes tokenizer.json, by transformers' own converter."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)
    except Exception as error:
        note(f"the tokenizer in {source} can't be converted: {first_line(error)}")
