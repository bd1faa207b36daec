"""The dial file: what an operator changes while a model is served."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lynx_trt.errors import UsageError
from lynx_trt.serving.settings import Settings

DIAL = "dial.json"


@dataclass(frozen=True)
class DialSetting:
    """What the file says.

    Attributes:
        quality: of requests that ask for none.
        tpot: milliseconds of a token after a request's first, at most, for which that quality may be lowered; 0: none.
        max_kl: nats a token that fewer experts may cost on the traffic, or else they come back; 0: as it comes.
    """

    quality: str
    tpot: float = 0.0
    max_kl: float = 0.0

    @classmethod
    def of(cls, settings: Settings) -> DialSetting:
        """What a repository begins with."""
        return cls(settings.quality, settings.tpot, settings.max_kl)

    @classmethod
    def read(cls, text: str, settings: Settings) -> DialSetting:
        """The file's text; what it doesn't say is as in `settings`.

        Raises:
            UsageError: it is no such file.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"it is no JSON: {error}") from None
        values = asdict(cls.of(settings))
        if not isinstance(found, dict) or not found.keys() <= values.keys():
            raise UsageError(f"it has to be a JSON object with {', '.join(values)}, and nothing else")
        for name, value in found.items():
            kinds = str | int | float if name == "quality" else int | float
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise UsageError(f"its {name} is {json.dumps(value)[:64]}, which is none")
            try:
                values[name] = str(value) if name == "quality" else float(value)
            except OverflowError:
                raise UsageError(f"its {name} is a number of {len(str(value))} digits") from None
        setting = cls(**values)
        setting.within(settings)
        return setting

    def within(self, settings: Settings) -> Settings:
        """The settings with this in their place.

        Raises:
            UsageError: a value is out of its range.
        """
        return replace(settings, **asdict(self))

    def in_words(self) -> str:
        """For a person."""
        target = f", lowered under load for a TPOT of {self.tpot:g} ms" if self.tpot else ""
        limit = f", raised where it costs more than {self.max_kl:g} nats a token" if self.max_kl else ""
        return f"{self.quality}{target}{limit}"

    def write(self, path: Path) -> None:
        """In place and not renamed: a file mounted into a container keeps its inode."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
