"""Why the worker looks for OpenBLAS and uses float32 on Linux CPU: `python -m benchmarks.blas`.

Times matrix products of the shapes that a small model has, `rows` activations by a square weight matrix, in the number
formats that models come in; once with the BLAS that mlx brings and once with OpenBLAS preloaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import msgspec

from inference.blas import blas_name, preload_environment

from . import environment, table

ROOT = Path(__file__).resolve().parent.parent
SIZE = 1024
ROWS = (1, 8, 32, 256)
FORMATS = ("float32", "bfloat16", "4-bit")
_TRIAL_S = 0.1


class Products(msgspec.Struct):
    """GFLOPS by format and rows, as `float32/8`, and the BLAS that made them."""

    blas: str
    gflops: dict[str, float]


def seconds_per_call(call: Callable[[], object], trials: int) -> float:
    """Return the median time of a call, in seconds, over trials that each last long enough to be timed."""
    call()
    started = time.perf_counter()
    call()
    count = max(1, round(_TRIAL_S / max(time.perf_counter() - started, 1e-6)))
    times = []
    for _ in range(trials):
        started = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - started) / count)
    return median(times)


def measure(trials: int) -> Products:
    """Time the products in this process, whose BLAS is what it is."""
    import mlx.core as mx

    mx.random.seed(0)
    weights = mx.random.normal((SIZE, SIZE))
    quantised = mx.quantize(weights, group_size=64, bits=4)
    half = weights.astype(mx.bfloat16)
    mx.eval(weights, half, *quantised)
    gflops = {}
    for rows in ROWS:
        x = mx.random.normal((rows, SIZE))
        x_half = x.astype(mx.bfloat16)
        mx.eval(x, x_half)
        products: dict[str, Callable[[], object]] = {
            "float32": partial(mx.matmul, x, weights.T),
            "bfloat16": partial(mx.matmul, x_half, half.T),
            "4-bit": partial(mx.quantized_matmul, x, *quantised, group_size=64, bits=4),
        }
        for name, product in products.items():
            seconds = seconds_per_call(partial(_evaluate, product), trials)
            gflops[f"{name}/{rows}"] = 2 * rows * SIZE * SIZE / seconds / 1e9
    return Products(blas_name(), gflops)


def _evaluate(product: Callable[[], object]) -> None:
    import mlx.core as mx

    mx.eval(product())


def in_child(environ: dict[str, str], trials: int) -> Products:
    """Measure in a fresh process with this environment."""
    command = [sys.executable, "-m", "benchmarks.blas", "--child", "--trials", str(trials)]
    done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, check=True)
    return msgspec.json.decode(done.stdout, type=Products)


def main() -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blas", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.stdout.buffer.write(msgspec.json.encode(measure(options.trials)))
        return
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    results = [in_child(plain, options.trials)]
    preloaded = preload_environment(plain)
    if preloaded is not None:
        results.append(in_child(preloaded, options.trials))
    else:
        print("There is no OpenBLAS here that could be preloaded.\n")
    head = ["BLAS", "format", *(f"{rows} rows" for rows in ROWS)]
    lines = [
        [result.blas.partition(",")[0].partition(":")[0], name]
        + [table.number(result.gflops[f"{name}/{rows}"]) for rows in ROWS]
        for result in results
        for name in FORMATS
    ]
    print(f"GFLOPS, {SIZE} x {SIZE} weights, {environment.cpu_name()}, {os.cpu_count()} cores\n")
    print(table.render(head, lines))


if __name__ == "__main__":
    main()
