"""The worker's I/O side: streams, credit, slow readers, draining, with a stand-in for the engine thread only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from inference.loading import LoadedModel
from inference.protocol import (
    INITIAL_CREDIT,
    PROTOCOL_VERSION,
    Accepted,
    Command,
    CommandFrame,
    Credit,
    Delta,
    Drain,
    Event,
    EventFrame,
    Failed,
    Finished,
    FrameReader,
    GenerationRequest,
    Hello,
    Load,
    Ping,
    SamplingParams,
    Status,
    Submit,
    Usage,
    WorkerConfig,
    encode_frame,
)
from inference.running import PreparedRequest
from inference.server import WorkerServer


class EngineDouble:
    """Records what the server asks of the engine; the test plays the engine's events itself."""

    def __init__(self) -> None:
        self.submitted: list[PreparedRequest] = []
        self.cancelled: list[str] = []

    def submit(self, prepared: PreparedRequest) -> None:
        self.submitted.append(prepared)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


class Client:
    """A peer that speaks the protocol by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.frames = FrameReader(reader, EventFrame)
        self.writer = writer
        self.events: list[Event] = []

    def send(self, *commands: Command) -> None:
        self.writer.write(encode_frame(CommandFrame(list(commands))))

    async def next(self, kind: type) -> Any:
        while True:
            for at, event in enumerate(self.events):
                if isinstance(event, kind):
                    return self.events.pop(at)
            frame = await asyncio.wait_for(self.frames.read(), 5)
            assert frame is not None, "the worker closed the connection"
            self.events.extend(frame.events)

    async def all_deltas(self) -> list[Delta]:
        await self.next(Finished)
        return [event for event in self.events if isinstance(event, Delta)]


class World:
    """A server with one client."""

    def __init__(self, server: WorkerServer, engine: EngineDouble, path: Path, exited: asyncio.Event) -> None:
        self.server = server
        self.engine = engine
        self.path = path
        self.exited = exited
        self.clients: list[Client] = []

    async def connect(self, version: int = PROTOCOL_VERSION) -> Client:
        client = Client(*await asyncio.open_unix_connection(str(self.path)))
        self.clients.append(client)
        client.send(Hello(version, "test"))
        return client

    async def greet(self) -> Client:
        client = await self.connect()
        await client.next(Status)
        return client

    async def close(self) -> None:
        for client in self.clients:
            client.writer.close()
            with contextlib.suppress(ConnectionError):
                await client.writer.wait_closed()
        while self.server._peers:
            await asyncio.sleep(0.005)

    async def submit(self, client: Client, name: str = "r", credit: int = INITIAL_CREDIT) -> None:
        before = len(self.engine.submitted)
        request = GenerationRequest(request_id=name, model="tiny", prompt="hello", sampling=SamplingParams())
        client.send(Submit(request, credit))
        while len(self.engine.submitted) == before:
            await asyncio.sleep(0.005)
        self.play(Accepted(name, 2, "w"))

    def play(self, *events: Event) -> None:
        self.server.on_step(list(events), Load())

    def play_tokens(self, count: int, name: str = "r", *, start: int = 0, text: str = "x") -> None:
        for seq in range(start, start + count):
            self.play(Delta(name, seq, 0, text, (seq,)))


@pytest.fixture
async def world(tiny: LoadedModel, runtime_dir: Path) -> AsyncIterator[World]:
    path = runtime_dir / "w.sock"
    config = WorkerConfig(
        worker_id="w", model="tiny", source="", socket_path=str(path), max_rows=2, max_waiting=2,
        max_stream_buffer_bytes=1000,
    )  # fmt: skip
    exited = asyncio.Event()
    server = WorkerServer(config, exited.set)
    engine = EngineDouble()
    world = World(server, engine, path, exited)
    listening = await server.start()
    # EngineDouble has the two methods of the engine that the server calls.
    server.set_ready(tiny, engine)  # type: ignore[arg-type]  # a stand-in
    yield world
    await world.close()
    listening.close()
    await listening.wait_closed()


async def test_socket_is_private(world: World) -> None:
    assert world.path.stat().st_mode & 0o077 == 0


async def test_peer_of_another_version_is_refused(world: World) -> None:
    client = await world.connect(PROTOCOL_VERSION + 1)

    assert await client.frames.read() is None


async def test_reader_that_keeps_up_gets_every_delta_as_it_was(world: World) -> None:
    client = await world.greet()
    await world.submit(client)
    world.play_tokens(10)
    world.play(Finished("r", 10, Usage(2, 10)))

    assert [delta.token_ids for delta in await client.all_deltas()] == [(seq,) for seq in range(10)]


async def test_without_credit_deltas_are_merged_and_none_is_lost(world: World) -> None:
    client = await world.greet()
    await world.submit(client, credit=3)
    world.play_tokens(10)
    world.play(Finished("r", 10, Usage(2, 10)))
    await client.next(Accepted)
    for _ in range(3):
        await client.next(Delta)
    client.send(Ping())
    await client.next(Status)
    assert client.events == []

    client.send(Credit("r", 3))
    (merged,) = await client.all_deltas()

    assert (merged.text, merged.token_ids, merged.seq) == ("x" * 7, tuple(range(3, 10)), 9)


async def test_merging_keeps_the_choices_apart(world: World) -> None:
    client = await world.greet()
    await world.submit(client, credit=0)
    for seq in range(6):
        world.play(Delta("r", seq, seq % 2, "ab"[seq % 2], (seq,)))
    world.play(Finished("r", 6, Usage(2, 6)))
    client.send(Credit("r", 10))

    assert {(delta.index, delta.text) for delta in await client.all_deltas()} == {(0, "aaa"), (1, "bbb")}


async def test_reader_that_never_reads_fails_alone(world: World) -> None:
    slow, fast = await world.greet(), await world.greet()
    await world.submit(slow, "slow", credit=1)
    await world.submit(fast, "fast")
    world.play_tokens(40, "slow", text="y" * 50)
    world.play_tokens(40, "fast")
    world.play(Finished("fast", 40, Usage(2, 40)))

    failed = await slow.next(Failed)
    assert (failed.code, failed.retryable) == ("slow_reader", False)
    assert len(await fast.all_deltas()) == 40
    assert world.engine.cancelled == ["slow"]


async def test_peer_that_vanishes_cancels_its_requests_and_no_others(world: World) -> None:
    gone, stays = await world.greet(), await world.greet()
    await world.submit(gone, "gone")
    await world.submit(stays, "stays")
    gone.writer.transport.abort()
    while not world.engine.cancelled:
        await asyncio.sleep(0.005)
    world.play_tokens(1, "gone")
    world.play(Finished("stays", 0, Usage(2, 0)))

    assert await stays.next(Finished)
    assert world.engine.cancelled == ["gone"]


async def test_too_many_requests_are_refused_at_once(world: World) -> None:
    client = await world.greet()
    for at in range(4):
        await world.submit(client, f"r{at}")
    client.send(Submit(GenerationRequest(request_id="more", model="tiny", prompt="x")))

    failed = await client.next(Failed)
    assert (failed.request_id, failed.code, failed.retryable) == ("more", "overloaded", True)


async def test_bad_prompt_is_refused_by_field(world: World) -> None:
    client = await world.greet()
    failures = {}
    for name, fields in {
        "empty": {"prompt": ""},
        "long": {"prompt": "word " * 5000},
        "output": {"prompt": "x", "max_tokens": 10_000},
        "ids": {"prompt": (1, 99_999)},
        "stop": {"prompt": "x", "stop_token_ids": (-1,)},
        "bias": {"prompt": "x", "sampling": SamplingParams(logit_bias={10**6: 1.0})},
        "tools": {"messages": ({"role": "user", "content": "x"},), "tools": ({"type": "function"},)},
    }.items():
        client.send(Submit(GenerationRequest(request_id=name, model="tiny", **fields)))
        failed = await client.next(Failed)
        failures[failed.request_id] = (failed.code, failed.param)

    assert failures == {
        "empty": ("invalid_request", "prompt"),
        "long": ("context_length_exceeded", "prompt"),
        "output": ("context_length_exceeded", "max_tokens"),
        "ids": ("invalid_request", "prompt"),
        "stop": ("invalid_request", "stop_token_ids"),
        "bias": ("invalid_request", "logit_bias"),
        "tools": ("invalid_request", "tools"),
    }


async def test_drain_finishes_what_runs_and_refuses_what_is_new(world: World) -> None:
    client = await world.greet()
    await world.submit(client)
    client.send(Drain(30))
    assert (await client.next(Status)).state == "draining"
    client.send(Submit(GenerationRequest(request_id="new", model="tiny", prompt="x")))
    assert (await client.next(Failed)).code == "worker_draining"
    assert not world.exited.is_set()

    world.play_tokens(2)
    world.play(Finished("r", 2, Usage(2, 2)))

    assert len(await client.all_deltas()) == 2
    await asyncio.wait_for(world.exited.wait(), 5)


async def test_drain_fails_what_runs_past_the_deadline(world: World) -> None:
    client = await world.greet()
    await world.submit(client)
    client.send(Drain(0.05))

    failed = await client.next(Failed)
    assert (failed.request_id, failed.code, failed.retryable) == ("r", "worker_draining", True)
    await asyncio.wait_for(world.exited.wait(), 5)


async def test_garbage_closes_that_connection_only(world: World) -> None:
    bad, good = await world.greet(), await world.greet()
    bad.writer.write(b"\xff\xff\xff\xff nonsense")
    assert await bad.frames.read() is None

    good.send(Ping())
    assert (await good.next(Status)).state == "ready"
