"""One child process: how it is started, why it ended, what it said last."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

# A rank computes on one core; thread pools of several ranks on one host would only fight each other.
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_COMPUTE_KINDS = ("prefill", "decode")
_ROOT = Path(__file__).resolve().parents[2]
_NUM_LAST_BYTES = 4096

_FileAction = tuple[int, int, str, int, int] | tuple[int, int, int]


def start(words: Sequence[str], kind: str, log: Path | None) -> tuple[int, int]:
    """(pid, pidfd) of a new process in a session of its own, which appends to ``log`` (None: writes where we write).

    Raises OSError when it cannot be started.
    """
    file_actions: list[_FileAction] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        file_actions.append((os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
        file_actions.append((os.POSIX_SPAWN_DUP2, 1, 2))
    pid = os.posix_spawn(
        words[0],
        list(words),
        _environment(kind),
        file_actions=file_actions,
        setsid=True,
        setsigmask=[],
        setsigdef=[signal.SIGINT, signal.SIGPIPE],
    )
    # It cannot be gone: only its parent could have reaped it.
    return pid, os.pidfd_open(pid)


def stop_myself_for(seconds: float) -> None:
    """SIGSTOP of this process; a helper continues it. Returns when it has."""
    words = ["/bin/sh", "-c", f"sleep {seconds:.3f}; kill -CONT {os.getpid()}"]
    helper = os.posix_spawn(words[0], words, dict(os.environ))
    os.kill(os.getpid(), signal.SIGSTOP)
    os.waitpid(helper, 0)


def _environment(kind: str) -> dict[str, str]:
    """The agent's own; imports come from this tree, not from a folder ``common`` that lies where the user stands."""
    environment = dict(os.environ)
    if kind in _COMPUTE_KINDS:
        environment = {**dict.fromkeys(_ONE_THREAD, "1"), **environment}
    environment["PYTHONSAFEPATH"] = "1"
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *(path for path in paths if path not in ("", str(_ROOT)))])
    return environment


def reap(pidfd: int) -> str:
    """Why the process ended. One taken over from another life of the agent has another parent, who is told: "gone"."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return "gone"
    if result is None:
        return "gone"
    if result.si_code == os.CLD_EXITED:
        return f"exit {result.si_status}"
    try:
        return f"signal {signal.Signals(result.si_status).name.removeprefix('SIG')}"
    except ValueError:
        return f"signal {result.si_status}"  # a real-time signal has no name


def last_words(log: Path, start: int) -> str:
    """The last line that the process wrote behind byte ``start``, without what stands before "error:"."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _NUM_LAST_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last.partition(" error: ")[2] or last
