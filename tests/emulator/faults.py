"""What a kernel does wrong."""

from __future__ import annotations


class FaultError(Exception):
    """Something that is an error of CUDA or undefined on a GPU; says what, and in which line of a kernel."""


class UnsupportedError(NotImplementedError):
    """An instruction that the emulator doesn't know."""
