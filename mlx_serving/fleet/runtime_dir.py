"""The private folder of the worker sockets, and the lock that lets one supervisor at a time use it.

Who may enter the folder may talk to the workers without a key, so it belongs to this user and to nobody else.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from types import TracebackType

MAX_SOCKET_PATH_BYTES = 103
"""The shortest limit of the supported systems: 104 bytes on macOS, the terminating zero among them."""

_LOCK_NAME = "supervisor.lock"
_LONGEST_WORKER_ID = 11


class RuntimeDirError(Exception):
    """The folder cannot be used; the message says why and what to do."""


class AlreadyRunning(RuntimeDirError):
    """Another supervisor holds the folder."""


def socket_path(folder: Path, worker_id: str) -> Path:
    """Return where a worker listens."""
    return folder / f"{worker_id}.sock"


def problem(folder: Path) -> str:
    """Return what is wrong with the folder as it is now, or an empty string. One that does not exist is fine."""
    length = len(os.fsencode(socket_path(folder, "w" * _LONGEST_WORKER_ID)))
    if not folder.is_absolute():
        return f"{folder} is not an absolute path"
    if length > MAX_SOCKET_PATH_BYTES:
        return f"socket paths in {folder} would have {length} bytes, more than {MAX_SOCKET_PATH_BYTES}"
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is not a folder"
    if found.st_uid != os.getuid():
        return f"{folder} belongs to another user (uid {found.st_uid})"
    if found.st_mode & 0o077:
        return f"{folder} can be entered by others (mode {stat.S_IMODE(found.st_mode):04o}, wanted 0700)"
    return ""


def prepare(folder: Path) -> None:
    """Make the folder if it is missing, with mode 0700.

    Raises:
        RuntimeDirError: it cannot be made, or is not private to this user.
    """
    if not (found := problem(folder)):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RuntimeDirError(f"cannot make {folder}: {error.strerror}") from error
        # Once more: another user may have been faster, and a umask cannot be trusted.
        found = problem(folder)
    if found:
        raise RuntimeDirError(found)


def remove_sockets(folder: Path) -> None:
    """Remove the sockets that earlier workers left behind. Call it with the lock held and no worker started."""
    for path in folder.glob("*.sock"):
        path.unlink(missing_ok=True)


class SupervisorLock:
    """Held while a supervisor uses the folder; the system drops it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _LOCK_NAME
        self._fd = -1

    def __enter__(self) -> SupervisorLock:
        """Take the lock.

        Raises:
            AlreadyRunning: another process has it.
        """
        # File descriptors of Python are not inheritable: a worker that outlives its supervisor does not hold the lock.
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(fd, 32).decode("ascii", "replace").strip()
            os.close(fd)
            raise AlreadyRunning(
                f"another supervisor (process {owner or 'unknown'}) runs with the folder {self._path.parent}; "
                "stop it, or give this one a RUNTIME_DIR of its own"
            ) from error
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode("ascii"))
        self._fd = fd
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock. The file stays: removing it would let two processes lock two files of one name."""
        os.close(self._fd)
        self._fd = -1
