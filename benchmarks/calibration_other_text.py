"""Does a promise hold on other text than it was calibrated on? On the shipped model, four kinds of text.

For each kind and each promise floors are searched for as the command does, on one half of 64 sequences of that kind;
then used on the other half of every kind. The model was trained on none of these files. The kinds:

    library     code: modules of the standard library
    reference   English: the language reference, as `pydoc_data/topics.py` has it (five sixths of the text that the
                command and the other calibration benchmarks use for the shipped model)
    tests       code of another kind: the standard library's own tests
    C headers   another language: `Python.h` and what it includes

    python benchmarks/calibration_other_text.py --journal out/other-text
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from calibration_common import LENGTH, PROMPT, measured, parts, record, shipped
from calibration_promises import TARGETS, silent

from lynx_trt.calibration.journal import Journal
from lynx_trt.calibration.study import Parts, run_study
from lynx_trt.calibration.text import Text
from lynx_trt.models.train import corpus
from lynx_trt.selection import DEFAULT_PRESET, PRESETS

COUNT, SEED = 64, 0
# Enough for the two halves and other batches; the tests are 17 MB.
BYTES = 1_500_000


def kinds() -> dict[str, Text]:
    """The texts by kind."""
    held_out = corpus()[1]
    reference = max(held_out, key=len)
    tests = Path(sysconfig.get_path("stdlib")) / "test"
    headers = Path(sysconfig.get_path("include"))
    return {
        "library": Text(tuple(text for text in held_out if text is not reference), "library"),
        "reference": Text((reference,), "reference"),
        "tests": Text(tuple(_read(sorted(tests.glob("test_*.py")))), "tests"),
        "C headers": Text(tuple(_read(sorted(headers.rglob("*.h")))), "C headers"),
    }


def _read(paths: Iterable[Path]) -> Iterable[str]:
    total = 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        total += len(text)
        if total > BYTES:
            return
        yield text


def rows_of(kind: str, halves: dict[str, Parts], target: str) -> list[dict[str, Any]]:
    """One search on `kind`, and what was found on the held-out half of every kind."""
    promise = TARGETS[target]
    study = run_study(halves[kind], PRESETS[DEFAULT_PRESET], promise, silent, compare=False)
    if study.chosen is None:
        return [{"target": target, "chosen_on": kind, "says": study.nearest()}]
    rows = []
    for other, there in halves.items():
        free, item = there.check.measure([there.check.meter.unrestricted(), study.chosen.setting])
        (check,) = promise.checks(item, 1)
        rows.append(
            {
                "target": target,
                "chosen_on": kind,
                "checked_on": other,
                "limit": check.limit,
                "value": check.value,
                "kept": check.kept,
                "active": item.active.mean,
                "natural": free.active.mean,
                "bits_a_byte": free.bits_a_byte,
                **study.chosen.setting.restriction.to_dict(),
            }
        )
    return rows


def main(
    batch: Annotated[int, typer.Option(help="Sequences that decode together.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = LENGTH,
    journal: Annotated[Path | None, typer.Option(help="Folder to go on in after an interruption.")] = None,
    write: Annotated[bool, typer.Option(help="Record the results; otherwise only print them.")] = True,
) -> None:
    """Search on every kind of text, and check on every kind."""
    probed, texts = shipped(), kinds()
    missing = [name for name, text in texts.items() if not text.texts]
    if missing:
        raise SystemExit(f"this Python comes without its {', '.join(missing)}; install them, or use another Python")
    identity = {
        "texts": {name: text.sha256 for name, text in texts.items()},
        "batch": batch,
        "length": length,
        "prompt": PROMPT,
    }
    log = Journal(journal, identity, resume=True) if journal else None
    halves = {
        name: measured(parts(probed, COUNT, SEED, length, text), batch, log, f"{name}, ")
        for name, text in texts.items()
    }
    rows: list[dict[str, Any]] = []
    for kind in texts:
        for target in TARGETS:
            for row in rows_of(kind, halves, target):
                typer.echo(row)
                rows.append(row)
    if write:
        typer.echo(record("calibration_other_text", rows))


if __name__ == "__main__":
    typer.run(main)
