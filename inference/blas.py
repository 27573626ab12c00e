"""Which BLAS the worker's float32 matrix products use on Linux CPU, and how it gets a fast one.

The CPU build of mlx brings the reference BLAS, which is a tenth as fast as OpenBLAS and gains nothing from batching
(benchmarks/README.md). `prepare_process` runs before mlx is imported and starts the process again with OpenBLAS
preloaded where one is installed; nothing here imports mlx.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

_REEXEC_MARK = "MLX_SERVING_BLAS_PRELOADED"

# Debian and Fedora names; the pthread build first, because mlx calls BLAS from threads of its own.
_OPENBLAS_PATTERNS = (
    "/usr/lib/*/openblas-pthread/libopenblas.so.0",
    "/usr/lib/*/openblas-openmp/libopenblas.so.0",
    "/usr/lib/*/libopenblas.so.0",
    "/usr/lib64/libopenblasp.so.0",
    "/usr/lib64/libopenblas.so.0",
    "/usr/local/lib/libopenblas.so.0",
)

# OpenBLAS falls back to these kernels on processors that it does not know; they use none of the wide vector units.
_FALLBACK_CORES = frozenset({"prescott", "core2", "nehalem", "generic", "barcelona", "unknown"})


def find_openblas() -> str | None:
    """Return the path of an installed OpenBLAS, or None."""
    for pattern in _OPENBLAS_PATTERNS:
        root, _, rest = pattern.partition("/*/")
        found = sorted(Path(root).glob(f"*/{rest}")) if rest else [Path(pattern)]
        for path in found:
            if path.exists():
                return str(path)
    return None


def openblas_core_type(core: str, cpu_flags: frozenset[str]) -> str | None:
    """Return the kernel set to ask of OpenBLAS, or None to leave its own choice.

    Args:
        core: what `openblas_get_corename` says it would use.
        cpu_flags: the processor's features as in /proc/cpuinfo.
    """
    if core.lower() not in _FALLBACK_CORES:
        return None
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= cpu_flags:
        return "SkylakeX"
    if {"avx2", "fma"} <= cpu_flags:
        return "Haswell"
    return None


def _cpu_flags() -> frozenset[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        return frozenset()
    return frozenset()


def _corename(library: str) -> str:
    try:
        corename = ctypes.CDLL(library).openblas_get_corename
    except (OSError, AttributeError):
        return ""
    corename.restype = ctypes.c_char_p
    return (corename() or b"").decode("ascii", "replace")


def preload_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """Return the environment to start again with so that mlx's matrix products go through OpenBLAS.

    None when there is nothing to gain: not Linux, a GPU back end, no OpenBLAS, or done already.
    """
    if sys.platform != "linux" or _REEXEC_MARK in environ or _has_cuda_build():
        return None
    library = find_openblas()
    if library is None or "libopenblas" in environ.get("LD_PRELOAD", ""):
        return None
    changed = dict(environ)
    changed[_REEXEC_MARK] = "1"
    changed["LD_PRELOAD"] = f"{library}:{environ['LD_PRELOAD']}" if environ.get("LD_PRELOAD") else library
    if "OPENBLAS_CORETYPE" not in environ and (core := openblas_core_type(_corename(library), _cpu_flags())):
        changed["OPENBLAS_CORETYPE"] = core
    return changed


def _has_cuda_build() -> bool:
    for name in ("mlx-cuda-13", "mlx-cuda-12", "mlx-cuda"):
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        return True
    return False


def prepare_process() -> None:
    """Replace this process by one that has OpenBLAS preloaded, where that makes float32 products fast.

    Must run before mlx is imported and before anything has been read from standard input. The process id stays.
    """
    environment = preload_environment(os.environ)
    if environment is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def blas_name() -> str:
    """Return the BLAS that mlx uses on Linux CPU, as the process's memory map shows it once mlx is loaded."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return "unknown"
    for line in mapped.splitlines():
        if "libopenblas" in line:
            path = line.split()[-1]
            return f"OpenBLAS ({_corename(path) or 'unknown core'}, {path})"
    return "reference BLAS (slow: install OpenBLAS, Debian package libopenblas0-pthread)"
