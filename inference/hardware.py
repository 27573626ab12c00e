"""What machine this is: the one place that tells Metal, CUDA and CPU apart.

Called by the worker once mlx is imported, to say what it runs on and to choose defaults that depend on the device.
What has to happen before that import is in `blas.py`.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class DeviceDefaults:
    """Choices that depend on the device.

    Attributes:
        float32_only: float32 is the only fast number format.
        prefill_tokens_per_step: prompt tokens computed between two decode steps.
        runs_ahead: the device computes while the host goes on, so that the next step is worth starting before the
            last one has been read. On a CPU mlx's `async_eval` returns only when little is left to compute.
    """

    float32_only: bool
    prefill_tokens_per_step: int
    runs_ahead: bool


def device_kind() -> str:
    """Return `Metal`, `CUDA` or `CPU`."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def device_name() -> str:
    """Return the device with the name of its chip."""
    kind = device_kind()
    name = mx.device_info().get("device_name", platform.machine())
    return f"{kind} ({name}, {os.cpu_count()} cores)" if kind == "CPU" else f"{kind} ({name})"


def memory_limit_bytes() -> int:
    """Return how much memory a worker may plan with: the device's, or 80 % of the host's on a CPU."""
    info = {} if device_kind() == "CPU" else mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if info.get(key):
            return int(info[key])
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.8)


def device_defaults() -> DeviceDefaults:
    """Return the choices that depend on the device (measured; see benchmarks/README.md)."""
    if device_kind() == "CPU":
        return DeviceDefaults(float32_only=True, prefill_tokens_per_step=256, runs_ahead=False)
    return DeviceDefaults(float32_only=False, prefill_tokens_per_step=2048, runs_ahead=True)
