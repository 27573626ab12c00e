"""The worker process: `python -m inference.worker`, started by the supervisor.

The first line on standard input is its configuration as JSON; the stream then stays open, and its end means that the
supervisor has gone. The main thread loads the model and runs the engine; the I/O thread runs the server. Exit codes:
0 after a drain, 3 when the model cannot be loaded, 4 when the supervisor has gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, NoReturn

import msgspec

from .blas import prepare_process
from .protocol import Configure, Event, Load, WorkerConfig

if TYPE_CHECKING:
    from .engine import Emit, Engine
    from .loading import LoadedModel

logger = logging.getLogger(__name__)

EXIT_LOAD_FAILED = 3
EXIT_ORPHANED = 4
DEFAULT_DRAIN_S = 30.0


def _read_config() -> WorkerConfig:
    # Unbuffered and to the byte: what follows the line is not ours to swallow.
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise SystemExit("no configuration on standard input")
        line += byte
    return msgspec.json.decode(bytes(line), type=WorkerConfig)


def _watch_supervisor() -> None:
    while os.read(0, 4096):
        pass
    # Nobody is left to drain for, and the engine may be deep inside a kernel.
    os._exit(EXIT_ORPHANED)


class _IoThread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="io", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run a function on the loop, soon."""
        self.loop.call_soon_threadsafe(function, *args)

    def stop(self) -> None:
        """End the loop and wait for its thread."""
        self.call(self.loop.stop)
        self._thread.join(timeout=5)


def build_engine(config: WorkerConfig, loaded: LoadedModel, emit: Emit) -> Engine:
    """Return an engine for a model that has just been loaded, set up for this device and by what the model can do.

    Args:
        config: the worker's configuration.
        loaded: the model; its `info` is completed by what the self-check finds.
        emit: called by the engine once per step.
    """
    from .engine import Engine, EngineOptions
    from .hardware import device_defaults
    from .loading import kv_budget_bytes
    from .scheduler import Limits
    from .selfcheck import Verdict, check

    wide = config.max_rows > 1
    verdict = check(loaded) if config.self_check and wide else Verdict(batches=wide, pads=True)
    max_rows = config.max_rows if verdict.batches else 1
    loaded.info = msgspec.structs.replace(loaded.info, batched=verdict.batches, max_rows=max_rows)
    device = device_defaults()
    limits = Limits(
        max_rows=max_rows,
        max_waiting=config.max_waiting,
        kv_budget_bytes=kv_budget_bytes(config),
        kv_bytes_per_token=loaded.info.kv_bytes_per_token,
        prefill_tokens_per_step=config.prefill_tokens_per_step or device.prefill_tokens_per_step,
        pads_prompts=verdict.pads,
    )
    options = EngineOptions(
        limits,
        prefix_cache_bytes=config.prefix_cache_bytes or limits.kv_budget_bytes // 2,
        target_itl_ms=config.target_itl_ms,
        runs_ahead=device.runs_ahead,
        features=Configure(config.prefix_cache, config.adaptive_batching),
    )
    logger.info(
        "%s is loaded on %s%s: %s, %d rows, KV budget %d MiB",
        config.model,
        loaded.info.device,
        f", BLAS: {loaded.info.blas}" if loaded.info.blas else "",
        loaded.info.dtype,
        max_rows,
        limits.kv_budget_bytes >> 20,
    )
    return Engine(loaded, options, emit, config.worker_id)


def main() -> int:
    """Run the worker until it is drained; return the exit code."""
    prepare_process()
    config = _read_config()
    logging.basicConfig(level=config.log_level, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    threading.Thread(target=_watch_supervisor, name="supervisor-watch", daemon=True).start()

    # mlx takes seconds to import; the supervisor learns from the socket's absence that the process is starting.
    from .loading import LoadError, load
    from .server import WorkerServer

    io = _IoThread()
    drained = threading.Event()
    stop_engine: list[Callable[[], None]] = [drained.set]

    def on_exit() -> None:
        drained.set()
        stop_engine[-1]()

    async def build() -> WorkerServer:
        server = WorkerServer(config, on_exit)
        await server.start()
        return server

    server = asyncio.run_coroutine_threadsafe(build(), io.loop).result()

    def on_signal(_signum: int, _frame: object) -> None:
        io.call(server.begin_drain, DEFAULT_DRAIN_S)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    try:
        loaded = load(config, lambda fraction: io.call(server.set_progress, fraction))
    except LoadError as error:
        logger.error("%s", error)
        failure: Future[None] = asyncio.run_coroutine_threadsafe(server.fail(str(error)), io.loop)
        failure.result()
        return EXIT_LOAD_FAILED

    def emit(events: list[Event], load_now: Load) -> None:
        io.call(server.on_step, events, load_now)

    engine = build_engine(config, loaded, emit)
    stop_engine.append(engine.stop)
    io.call(server.set_ready, loaded, engine)
    if not drained.is_set():
        engine.run()
    io.stop()
    return 0


def run() -> NoReturn:
    """Run `main` and end the process without waiting for threads that may be blocked in a read."""
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
