"""A worker without a model, for what a real one does only when something is badly wrong. Its source says how it acts.

ready       loads, answers, drains
hang        never listens
deaf        gets ready, then answers nothing
stubborn    gets ready, then ignores drain commands and signals
crash       prints something and exits with 1
fail        reports a failed load, then does not exit
chatty      gets ready and prints a line that is much too long
quit        gets ready, then exits with 0 although nobody asked
"""

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec

from inference.protocol import (
    CommandFrame,
    Drain,
    EventFrame,
    FrameReader,
    Hello,
    Load,
    Ping,
    Status,
    WorkerConfig,
    WorkerState,
    encode_frame,
)

LOAD = Load(running=1, waiting=2, kv_bytes=3, memory_bytes=4)


class FakeWorker:
    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.state: WorkerState = "failed" if config.source == "fail" else "loading"
        self.done = asyncio.Event()

    async def serve(self) -> None:
        server = await asyncio.start_unix_server(self.talk, self.config.socket_path)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.on_sigterm)
        async with server:
            await self.done.wait()

    def on_sigterm(self) -> None:
        if self.config.source != "stubborn":
            self.done.set()

    def status(self) -> Status:
        error = "it is broken" if self.state == "failed" else ""
        return Status(self.config.worker_id, self.state, LOAD, error=error)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader(reader, CommandFrame)
        while (frame := await frames.read()) is not None:
            for command in frame.commands:
                match command:
                    case Hello():
                        self.say(writer)
                        if self.state == "loading":
                            self.state = "ready"
                            self.say(writer)
                            if self.config.source == "quit":
                                self.done.set()
                    case Ping() if self.config.source != "deaf":
                        self.say(writer)
                    case Drain() if self.config.source != "stubborn":
                        self.state = "draining"
                        self.say(writer)
                        self.done.set()
        writer.close()

    def say(self, writer: asyncio.StreamWriter) -> None:
        writer.write(encode_frame(EventFrame([self.status()], LOAD)))


def end_with_supervisor() -> None:
    while os.read(0, 4096):
        pass
    os._exit(4)


def main() -> None:
    # Unbuffered: a thread that holds a buffer's lock at the end of the process aborts it.
    config = msgspec.json.decode(os.read(0, 65536), type=WorkerConfig)
    threading.Thread(target=end_with_supervisor, daemon=True).start()
    Path(config.socket_path).unlink(missing_ok=True)
    if config.source == "crash":
        print("something went wrong", flush=True)
        sys.exit(1)
    if config.source == "hang":
        time.sleep(3600)
    if config.source == "chatty":
        print("y" * 100_000, flush=True)
    asyncio.run(FakeWorker(config).serve())


if __name__ == "__main__":
    main()
