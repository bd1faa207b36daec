"""The dial file: what an operator changes while a model is served."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lynx_trt.errors import UsageError
from lynx_trt.serving.settings import MOST, Settings

NAME = "dial.json"


@dataclass(frozen=True)
class DialSetting:
    """What the file says.

    Attributes:
        quality: of requests that ask for none.
        tpot: milliseconds of a token after a request's first, at most, for which that quality may be lowered; 0: none.
    """

    quality: str
    tpot: float = 0.0

    @classmethod
    def of(cls, settings: Settings) -> DialSetting:
        """What a repository begins with."""
        return cls(settings.quality, settings.tpot)

    @classmethod
    def read(cls, text: str, settings: Settings) -> DialSetting:
        """The file's text; what it doesn't say is as in `settings`.

        Raises:
            UsageError: it is no such file.
        """
        try:
            values = json.loads(text)
            setting = cls(str(values.get("quality", settings.quality)), float(values.get("tpot", settings.tpot)))
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"it is no JSON object with a quality and a tpot: {error}") from None
        if not 0 <= setting.tpot <= MOST["tpot"]:  # NaN is not either
            raise UsageError(f"the tpot is {setting.tpot}; it must be from 0 (no target) to {MOST['tpot']:.10g} ms")
        return setting

    def write(self, path: Path) -> None:
        """In place and not renamed: a file mounted into a container keeps its inode."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
