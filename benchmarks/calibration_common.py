"""What the calibration benchmarks share: the shipped model under measurement, and how results are recorded."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import tokenizers
import torch

from lynx_trt.build import shipped_model
from lynx_trt.calibration import source
from lynx_trt.calibration.company import MORE
from lynx_trt.calibration.cost import CostModel, cost_model
from lynx_trt.calibration.journal import Journal, Measured
from lynx_trt.calibration.measure import Measurement, Meter
from lynx_trt.calibration.model import Probed
from lynx_trt.calibration.options import shipped_text
from lynx_trt.calibration.study import Parts
from lynx_trt.calibration.text import Text, split
from lynx_trt.export.checkpoint import open_checkpoint

RESULTS = Path(__file__).parent / "results"
LENGTH, PROMPT = 512, 64


def shipped() -> Probed:
    """The shipped model, hooked into."""
    return source.load(open_checkpoint(shipped_model()), device="cpu", dtype=torch.float32)


def costs(probed: Probed, hardware: str = "h100") -> CostModel:
    """Its costs in fp16."""
    sizes = [2 * layer.expert_parameters for layer in probed.layers]
    other = 2 * probed.model.num_parameters() - sum(n * s for n, s in zip(probed.experts, sizes, strict=True))
    return cost_model(hardware, sizes, other)


def parts(probed: Probed, count: int, seed: int, length: int = LENGTH, text: Text | None = None) -> dict[str, Meter]:
    """Meters for the part of a text that choices are made on (`choose`), the one held out (`check`), and for `more`.

    The text is what the shipped model was not trained on, unless another is given.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(shipped_model() / "tokenizer.json"))
    drawn = split(
        text or shipped_text(), None, tokenizer, separator=0, half=count // 2, length=length, seed=seed, more=MORE
    )
    cost = costs(probed)
    return {name: Meter(probed, part, prompt=PROMPT, cost=cost, seed=seed) for name, part in drawn.items()}


def measured(meters: dict[str, Meter], batch: int, log: Journal | None, label: str = "") -> Parts:
    """What `parts` gives, to be measured at one batch size; `label` tells texts apart in the journal."""
    return Parts(*(Measured(meters[part], batch, f"{label}{part}", log) for part in ("choose", "check", "more")))


def brief(item: Measurement) -> dict[str, Any]:
    """A measurement without its numbers by sequence, rounded."""
    values = {name: value for name, value in item.to_dict().items() if not name.endswith("_by_sequence")}
    rounded: dict[str, Any] = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.5g}"))
    return rounded


def _commit() -> str | None:
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - whichever git is there
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return head.stdout.strip() or None


COMMIT = _commit()  # of the code that runs, whatever is committed in the meantime


def environment() -> dict[str, Any]:
    """Commit, versions and hardware."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": COMMIT,
        "python": platform.python_version(),
        **{name: version(name) for name in ("lynx-trt", "torch", "transformers")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def record(name: str, rows: Sequence[dict[str, Any]] | dict[str, Any]) -> Path:
    """Write one benchmark's results."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "results": rows}, indent=1) + "\n")
    return path
