"""Files and folders that are written aside: a folder is locked meanwhile, and removed by the next one if left behind.

The lock is flock's, which the kernel drops with the process that holds it, however that ended, and which containers on
one machine share; process ids they don't. Another machine's locks can't be seen on every file system, so a folder's
name tells of which boot of which machine it is, and only those of this one are removed.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lynx_trt.console import note

# An empty folder that is younger may have been made just now and not be locked yet.
SECONDS_TO_LOCK = 60


@contextmanager
def partial(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, removed at the end unless it has become something else.

    What killed processes have left there is removed first, with a line for each.

    Raises:
        OSError: it can't be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _tell(*remove_dead(target))
    folder = target.with_name(f"{_prefix(target)}{_boot() or 'unknown'}-{secrets.token_hex(4)}")
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks: nobody will remove it, and somebody will be told
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_dead(target: Path) -> tuple[list[Path], list[Path]]:
    """Remove what killed processes have left beside `target`; what is being written here stays.

    Returns the folders that were removed, and those of which nobody here can tell whether they are being written.
    """
    removed, unsure = [], []
    for folder in sorted(target.parent.glob("*.partial-*")):
        if not folder.name.startswith(_prefix(target)) or folder.is_symlink() or not folder.is_dir():
            continue
        dead = _is_dead(folder, folder.name.removeprefix(_prefix(target)))
        if dead:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
        elif dead is None:
            unsure.append(folder)
    return removed, unsure


def write_file(path: Path, data: bytes) -> None:
    """Write a file aside and rename it, so that at `path` there is never half of one.

    Raises:
        OSError: it can't be written; what was there stays.
    """
    aside = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with aside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _tell(removed: list[Path], unsure: list[Path]) -> None:
    for folder in removed:
        note(f"removed {folder}, which a process that was killed had left behind")
    for folder in unsure:
        note(f"{folder} was left behind, or a process on another machine is writing it; if none is, remove it")


def _is_dead(folder: Path, suffix: str) -> bool | None:
    """Whether no process writes the folder any more; None: that can't be known here."""
    boot = _boot()
    if boot is None or suffix.rpartition("-")[0] != boot:
        return None
    try:
        if time.time() - folder.stat().st_mtime < SECONDS_TO_LOCK and not any(folder.iterdir()):
            return False
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # it was finished just now
        return False
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    else:
        return True
    finally:
        os.close(lock)


def _prefix(target: Path) -> str:
    return f"{target.name}.partial-"


def _boot() -> str | None:
    """A name for this boot of this machine, None where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:13].replace("-", "")
    except OSError:
        return None
