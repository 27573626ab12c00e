"""What else the machine does while something is measured. A busy neighbour makes a number worthless; this shows it."""

from __future__ import annotations

import os
import time

import psutil

WINDOW_S = 0.5


def cpu_s_of(process: psutil.Process) -> float:
    """Return the CPU seconds that a process has used; 0 when it has gone."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


class Watch:
    """Measures, from its making on, the CPU that processes outside this benchmark use."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._all = self._busy_s()
        self._own = self._own_s()

    def others(self) -> float:
        """Return the share of the whole machine that others have used so far, 0 to 1."""
        wall_s = (time.perf_counter() - self._started) * (os.cpu_count() or 1)
        used = (self._busy_s() - self._all) - (self._own_s() - self._own)
        return min(max(used / wall_s, 0.0), 1.0) if wall_s else 0.0

    @staticmethod
    def _busy_s() -> float:
        times = psutil.cpu_times()
        # Guest time is part of user time on Linux; idle and waiting for a disk are not work.
        return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal")))

    @staticmethod
    def _own_s() -> float:
        own = psutil.Process()
        return cpu_s_of(own) + sum(cpu_s_of(child) for child in own.children(recursive=True))


def wait_until_quiet(limit: float, timeout_s: float) -> bool:
    """Wait until others use less than `limit` of the machine, at most so long; return whether they do."""
    deadline = time.monotonic() + timeout_s
    while True:
        watch = Watch()
        time.sleep(WINDOW_S)
        if watch.others() < limit:
            return True
        if time.monotonic() > deadline:
            return False
