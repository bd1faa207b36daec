"""From files of text or chats to sequences: tokens that decode together, and how many bytes of text they stand for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lynx_trt.calibration.intervals import Array
from lynx_trt.errors import GenerationError, UsageError
from lynx_trt.runtime.chat import ChatTemplate, check_messages

if TYPE_CHECKING:
    import tokenizers

# Files that a text is named after; of more, only how many.
NAMED = 4


@dataclass(frozen=True)
class Sequences:
    """N sequences of L tokens; `nbytes` [N,L] are the UTF-8 bytes that each token adds to the text."""

    ids: Array
    nbytes: Array

    def __len__(self) -> int:
        """N."""
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Sequences:
        """Some of the sequences."""
        return Sequences(self.ids[rows], self.nbytes[rows])


@dataclass(frozen=True)
class Text:
    """What was read: the texts, and a name, size and sum to recognise them by.

    A text is one string of a file, or the rendered chats of one, which have their special tokens in them.
    """

    texts: tuple[str | tuple[str, ...], ...]
    name: str

    def strings(self) -> Iterator[tuple[str, bool]]:
        """Each string, and whether it is of a chat."""
        for text in self.texts:
            yield from ((text, False),) if isinstance(text, str) else ((chat, True) for chat in text)

    @property
    def nbytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(len(string.encode()) for string, _ in self.strings())

    @property
    def sha256(self) -> str:
        """Hex digest of all texts, in order."""
        digest = hashlib.sha256()
        for string, _ in self.strings():
            encoded = string.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What to recognise it by, for JSON."""
        return {"name": self.name, "bytes": self.nbytes, "sha256": self.sha256}


def read_text(paths: Sequence[Path], option: str = "--text", artifact: Path | None = None) -> Text:
    """Read UTF-8 files, given with `option`: plain text, or .jsonl, a chat a line for the template of `artifact`.

    Raises:
        UsageError: a file is missing, empty, not UTF-8, the same as another, or has a line that is no chat; the message
            names it.
        ArtifactError: there are chats, and the template can't be read.
    """
    texts: dict[str | tuple[str, ...], Path] = {}
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; give each of its text files with {option}")
        if not path.is_file():
            raise UsageError(f"no such text file: {path}; give plain text in UTF-8 with {option}")
        try:
            string = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; "
                "convert it first (iconv -t UTF-8), or give plain text"
            ) from None
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror or error}") from None
        if not string.strip():
            raise UsageError(f"{path} is empty; give text of the kind that the model will be used on")
        text = _chats(path, string, artifact) if path.suffix == ".jsonl" else string
        if text in texts:
            raise UsageError(
                f"{path} is the same text as {texts[text]}, and what was chosen on it would be checked on it; "
                f"give each text once with {option}"
            )
        texts[text] = path
    names = [path.name for path in paths]
    named = ", ".join(names if len(names) <= NAMED else [*names[: NAMED - 1], f"and {len(names) - NAMED + 1} others"])
    return Text(tuple(texts), named)


def _chats(path: Path, lines: str, artifact: Path | None) -> tuple[str, ...]:
    """Each line's messages as the model was trained on them."""
    template = ChatTemplate.find(artifact) if artifact else None
    if template is None:
        raise UsageError(
            f"{path} is a file of chats, and the artifact has no chat template for them; give plain text (.txt)"
        )
    chats = []
    # Not splitlines, which also splits at characters that a text in JSON may have.
    for number, line in enumerate(lines.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            messages = check_messages(found.get("messages") if isinstance(found, dict) else found)
            chats.append(template.render(messages, answer=False))
        except (GenerationError, ValueError, RecursionError) as error:
            raise UsageError(f'line {number} of {path} is no chat: {error}; a line is {{"messages": [...]}}') from None
    return tuple(chats)


def cut(
    text: Text,
    tokenizer: tokenizers.Tokenizer,
    *,
    separator: int | None,
    count: int,
    length: int,
    seed: int,
    more: int = 0,
    what: str = "the text",
) -> Sequences:
    """Draw `count` sequences of `length` tokens from `text`, in an order that the seed decides; up to `more` if any.

    All texts are one row of tokens, `separator` before each, cut at every `length`-th token; which pieces are taken
    is drawn without replacement, so none is seen twice.

    Raises:
        UsageError: the text has not that many sequences; the message calls it `what`.
    """
    pieces = list(_tokens(text, tokenizer, separator))
    ids = np.concatenate([ids for ids, _ in pieces])
    nbytes = np.concatenate([sizes for _, sizes in pieces])
    available = len(ids) // length
    if available < count:
        raise UsageError(
            f"{what} is too short: it has {len(ids)} tokens, which make {available} sequences of {length}, and "
            f"{count} are needed; give more text, or lower --sequences or --length"
        )
    rows = np.random.default_rng(seed).permutation(available)[: count + more]
    whole = available * length
    return Sequences(ids[:whole].reshape(-1, length)[rows], nbytes[:whole].reshape(-1, length)[rows])


def split(
    text: Text,
    validation: Text | None,
    tokenizer: tokenizers.Tokenizer,
    *,
    separator: int | None,
    half: int,
    length: int,
    seed: int,
    more: int,
) -> dict[str, Sequences]:
    """The parts of a search: `choose` and `check` (held out) with `half` sequences each, and `more` of neither.

    Held out are sequences of `validation`; without it, others of `text`. `more` are up to `more` * `half` of `text`.

    Raises:
        UsageError: a text has not that many sequences.
    """

    def draw(source: Text, count: int, more: int = 0, what: str = "the text") -> Sequences:
        return cut(source, tokenizer, separator=separator, count=count, length=length, seed=seed, more=more, what=what)

    own = draw(text, half if validation else 2 * half, more * half)
    if validation is None:
        return {"choose": own[:half], "check": own[half : 2 * half], "more": own[2 * half :]}
    check = draw(validation, half, what="the validation text")
    return {"choose": own[:half], "check": check, "more": own[half:]}


def _tokens(text: Text, tokenizer: tokenizers.Tokenizer, separator: int | None) -> Iterator[tuple[Array, Array]]:
    for string, chat in text.strings():
        encoding = tokenizer.encode(string, add_special_tokens=not chat)
        ids = np.array(encoding.ids, dtype=np.int64)
        sizes = _added_bytes(string, np.array([end for _, end in encoding.offsets], dtype=np.int64))
        if separator is not None and (len(ids) == 0 or ids[0] != separator):
            ids, sizes = np.concatenate([[separator], ids]), np.concatenate([[0], sizes])
        yield ids, sizes


def _added_bytes(string: str, ends: Array) -> Array:
    """Bytes that each token adds, from where it ends in `string`; tokens inside of one character add them once."""
    points = np.frombuffer(string.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    total = np.concatenate([[0], np.cumsum(sizes)])
    reached = np.maximum.accumulate(total[ends]) if len(ends) else np.zeros(0, np.int64)
    return np.diff(reached, prepend=0)
