"""Runs a Python program that ends when the process that started it ends, in whichever way.

    python -m project.tether manage.py runworkers
    python -m project.tether -m daphne project.asgi:application

The program's standard input must be a pipe that its parent holds open and never writes to: the kernel closes it even
when the parent is killed, on every system alike. `project.demo` starts its children through this.
"""

import os
import runpy
import signal
import sys
import threading
import time

GRACE_S = 5.0
"""Time between the polite signal and the end."""


def end_with_parent() -> None:
    """Wait for the end of standard input, then stop this process; politely at first."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the program that the arguments name, in this process."""
    threading.Thread(target=end_with_parent, name="tether", daemon=True).start()
    sys.path.insert(0, os.getcwd())
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
