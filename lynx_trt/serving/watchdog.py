"""A small process beside the model's: it sees to it that server and model go together.

A model's process that waits for an answer from a server that was killed waits for ever, with the interpreter's lock
held, so it can't look after itself. And a server whose model's process has died answers every request with an error
but goes on to call itself ready. Started as a file of its own, with nothing but Python's library:

    python -I watchdog.py SERVER_PID MODEL_PID end-server|leave-server

It ends by itself when the model's process does, and is ended by it when that unloads as it should.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

VARIABLE = "LYNX_TRT_SERVER_ENDS_WITH_MODEL"
GRACE_SECONDS = 3.0  # the model's process usually notices by itself


def start() -> subprocess.Popen[bytes]:
    """Watch this process and its parent, the server; to be ended with `terminate` at a proper end."""
    end = "end-server" if os.environ.get(VARIABLE) == "1" else "leave-server"
    command = [sys.executable or "python3", "-I", __file__, str(os.getppid()), str(os.getpid()), end]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # noqa: S603


def watch(server: int, model: int, *, end_server: bool, seconds: float = 1.0) -> str:
    """Wait until one of the two is gone, and do what is to be done; what that was."""
    while True:
        model_lives, server_lives = os.getppid() == model, _lives(server)
        if not model_lives:
            break
        if not server_lives:
            time.sleep(GRACE_SECONDS)
            if os.getppid() != model:
                return "both had ended"
            _signal(model, signal.SIGKILL)
            return "ended the model's process, whose server is gone"
        time.sleep(seconds)
    # A server that is going down has its models' processes end before itself; one that was killed is gone at once.
    time.sleep(GRACE_SECONDS)
    if not end_server or not _lives(server):
        return "nothing to do"
    _signal(server, signal.SIGTERM)
    return "ended the server, whose model's process has died"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


if __name__ == "__main__":
    outcome = watch(int(sys.argv[1]), int(sys.argv[2]), end_server=sys.argv[3] == "end-server")
    print(f"lynx: watchdog: {outcome}", file=sys.stderr, flush=True)  # noqa: T201
