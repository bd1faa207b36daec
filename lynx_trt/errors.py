"""The exceptions a user can meet. Every message says what failed, the value received and the way out.

    LynxError
    ├── UsageError            the options contradict each other, or one is out of its range
    ├── CheckpointError       the checkpoint can't be read, or is not what its config says
    ├── UnsupportedModelError the model is readable, but is nothing we can rewrite; the reason is named
    ├── ExportError           our own rewrite did not come out right (blocks missing, numbers that differ)
    ├── TensorRTError         TensorRT is missing, or refused to parse or build
    ├── ArtifactError         an artifact is missing, damaged, or does not fit this machine
    ├── GenerationError       a prompt or a request does not fit the artifact
    ├── BusyError             as many requests wait as may
    ├── ServingError          the server, its environment or its repository is missing or does not fit
    └── CalibrationError      no budgets keep the promise that was asked for

Commands print the message alone and exit with 1 (2 for UsageError); anything else is a defect of ours
and keeps its traceback.
"""

from __future__ import annotations


class LynxError(Exception):
    """What went wrong, in a sentence made for a user."""

    exit_code = 1


class UsageError(LynxError):
    """An option is out of its range, or two contradict each other."""

    exit_code = 2


class CheckpointError(LynxError):
    """The checkpoint can't be read, or its weights are not what its config says."""


class UnsupportedModelError(LynxError):
    """The model is readable, but holds nothing that this version can rewrite."""


class ExportError(LynxError):
    """The rewrite did not come out right: blocks missing, or numbers that differ."""


class TensorRTError(LynxError):
    """TensorRT is missing, or refused to parse or build."""


class ArtifactError(LynxError):
    """An artifact is missing, damaged, or does not fit this machine."""


class GenerationError(LynxError):
    """A prompt or a request does not fit the artifact."""


class BusyError(LynxError):
    """As many requests wait as may; the same request may be taken later."""


class ServingError(LynxError):
    """The server, its environment or its repository is missing, or does not fit."""


class CalibrationError(LynxError):
    """No budgets keep the promise that was asked for, or held-out text shows that those chosen don't."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says that has something in it; of one that says nothing, its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
