"""Text in, tokens out, and back: the artifact's tokenizer, and pieces of text that are never half a character."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lynx_trt.errors import ArtifactError, GenerationError


class Tokenizer:
    """`tokenizer.json` of an artifact, read by Hugging Face's tokenizers (no transformers, no torch)."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            ArtifactError: the file is missing or can't be read.
        """
        import tokenizers

        if not path.is_file():
            raise ArtifactError(f"{path} is missing: the checkpoint had no tokenizer; build with --tokenizer FOLDER")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            # Some files have these set, from whatever they were trained for: a prompt would lose its end in silence.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        except Exception as error:
            raise ArtifactError(f"{path} can't be read as a tokenizer: {error}") from None
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {number: token.content for number, token in added.items() if token.special}
        # Bytes outnumber characters in a byte-level vocabulary, so this is a bound for both.
        self.longest = max(map(len, self.vocabulary()), default=1)

    def vocabulary(self) -> dict[str, int]:
        """Tokens, as the vocabulary spells them, and their ids."""
        return dict(self._tokenizer.get_vocab())

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, with whatever the tokenizer puts before and after a text if `special`.

        Raises:
            GenerationError: it holds bytes that were no UTF-8, as an argument of a command can.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise GenerationError(f"the text {text[:32]!r} is no valid UTF-8; give it in that encoding") from None
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def stream(self, shown: Iterable[str] = ()) -> Stream:
        """A decoder for one sequence; special tokens are left out, but for those `shown`."""
        wanted = set(shown)
        return Stream(self, frozenset(number for number, text in self._special.items() if text not in wanted))

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class Stream:
    """Text of a growing sequence, piece by piece; a character that spans tokens comes when it is whole."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._hidden = tokenizer._tokenizer, hidden
        self._decoder = DecodeStream(skip_special_tokens=False)

    def push(self, token: int) -> str:
        """The new text, which may be empty."""
        if token in self._hidden:
            return ""
        return self._decoder.step(self._tokenizer, token) or ""
