"""What an operator decides about a served model; it travels in the parameters of the model's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from lynx_trt.errors import UsageError
from lynx_trt.runtime.quality import Dial

BACKENDS = ("auto", "onnxruntime", "tensorrt")
LEAST: dict[str, float] = {
    "threads": 0,
    "reuse": 0,
    "stream_interval": 0.0,
    "deadline": 0.001,
    "tpot": 0.0,
    "check": 0,
    "max_kl": 0.0,
}
# Far beyond what any machine serves, so that a slip of the hand is no repository; tokens are i32 in requests.
MOST: dict[str, float] = {
    "slots": 65536,
    "queue": 10**6,
    "max_tokens": 2**31 - 1,
    "deadline": 10**7,
    "threads": 1024,
    "chunk": 2**20,
    "prefill_tokens": 2**24,
    "stream_interval": 3600,
    "reuse": 2**31 - 1,
    "tpot": 3.6e6,
    "check": 10**9,
    "max_kl": 1000.0,
}


@dataclass(frozen=True)
class Settings:
    """Settings of one served model.

    Attributes:
        slots: sequences that decode together, at most.
        queue: requests that may wait for a slot.
        quality: of requests that ask for none, until the dial file says otherwise.
        max_tokens: new tokens of requests that don't say.
        deadline: seconds after which a request is ended, at most.
        backend: what runs the model: tensorrt (the engine), onnxruntime, or auto (whichever fits).
        threads: CPU threads of ONNX Runtime; 0 is all cores, and all but one in steps that can't be cut into pieces.
        chunk: tokens of one prompt in one prefill step.
        prefill_tokens: tokens of one prefill step, padding included.
        stream_interval: seconds between two pieces of one stream, at least; tokens in between come as one piece.
        reuse: tokens that a prompt has to begin with as another in a slot does to take them from there; 0: none ever.
        tpot: milliseconds of a token after a request's first, at most; while they take longer, requests that ask for no
            quality get a lower one. 0: no such target; the dial file may have another.
        lowest: the lowest quality that they get for it.
        check: decode steps with fewer experts of which one is done with all of them too, to see what that costs in
            quality; 0: none.
        max_kl: nats a token that fewer experts may cost by that, or else some come back; 0: as it comes.

    Raises UsageError if a value is out of its range.
    """

    slots: int = 16
    queue: int = 64
    quality: str = "balanced"
    max_tokens: int = 128
    deadline: float = 300.0
    backend: str = "auto"
    threads: int = 0
    chunk: int = 128
    prefill_tokens: int = 256
    stream_interval: float = 0.05
    reuse: int = 32
    tpot: float = 0.0
    lowest: str = "fast"
    check: int = 500
    max_kl: float = 0.0

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(f"the backend is {self.backend!r}; it must be one of {', '.join(BACKENDS)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                continue
            least, most = LEAST.get(field.name, 1), MOST[field.name]
            if not math.isfinite(value) or not least <= value <= most:
                name = field.name.replace("_", "-")
                bound = f"{most:.10g} or less" if value > most else f"{least} or more"
                raise UsageError(f"{name} is {value}; it must be {bound}")
        if self.max_kl and not self.check:
            raise UsageError(
                f"max-kl is {self.max_kl:g}, and check is 0, so nothing would find what fewer experts cost"
            )

    def check_model(self, dial: Dial, rewinds: int) -> None:
        """Refuse a quality that a model's dial doesn't have, or targets that it can't be served with.

        Raises:
            UsageError: it is no quality, or the model has no dial, or (`rewinds` is 0) states.
        """
        dial.check_default(self.quality)
        dial.check_quality(self.lowest)
        if self.max_kl and not rewinds:
            raise UsageError(
                f"max-kl is {self.max_kl:g}, but layers of this model keep a state, which can't be taken back, so no "
                "step can be done again with all experts; leave it out"
            )
        for name, value in (("tpot", self.tpot), ("max-kl", self.max_kl)):
            if value and dial.fixed:
                raise UsageError(
                    f"{name} is {value:g}, but an artifact built with --preset off uses all experts, so there is "
                    "nothing to turn for it; leave it out, or build with another preset"
                )

    def parameters(self) -> dict[str, str]:
        """As the model's configuration holds them."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Settings:
        """From the model's configuration; names that are not ours are left alone."""
        kinds = {"int": int, "float": float, "str": str}
        given = {f.name: kinds[str(f.type)](parameters[f.name]) for f in fields(cls) if f.name in parameters}
        return cls(**given)
