"""What all commands share: interruptions, and outputs that can't be written. With real processes and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lynx_trt.console import json_text

COMMAND = """
import sys, time
from lynx_trt.console import new_app, run
app = new_app()

@app.command()
def main(text: str = "x" * 10, wait: bool = False) -> None:
    if wait:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    print(text)

run(app)
"""


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    """The command line of a small command that prints a text."""
    path = tmp_path / "command.py"
    path.write_text(COMMAND)
    return [sys.executable, str(path)]


def test_an_interruption_is_said(script: list[str]) -> None:
    process = subprocess.Popen([*script, "--wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "error: interrupted; nothing was left behind\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_said(script: list[str], unbuffered: str) -> None:
    """Where Python notices it in the write, and where only when it flushes at its end."""
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            script,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert result.returncode == 1
    assert result.stderr == (
        "error: the output can't be written: No space left on device; free some space, or send it elsewhere\n"
    )


def test_a_reader_that_went_away_is_no_error(script: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(script, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_letters_that_the_terminal_has_not(script: list[str]) -> None:
    result = subprocess.run(
        [*script, "--text", "dëf 模"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"d?f ?\n", b"")


def test_wrong_usage_is_typer_s_to_say(script: list[str]) -> None:
    result = subprocess.run([*script, "--nothing"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "No such option: --nothing" in result.stderr


def test_json_has_no_numbers_that_json_has_not() -> None:
    """A perplexity of NaN is null: readers other than Python's refuse the word."""
    value = {"perplexity": float("nan"), "times": [1.5, float("-inf")], "pair": (1, None), "name": "nan"}
    text = json_text(value)
    assert json.loads(text) == {"perplexity": None, "times": [1.5, None], "pair": [1, None], "name": "nan"}
    assert "NaN" not in text
    assert "Infinity" not in text
