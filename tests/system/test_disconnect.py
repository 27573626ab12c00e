"""Clients that vanish in the middle: their rows leave the batch within two steps, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import socket as sockets
import struct
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import pytest

from tests.system.api_fixtures import (
    COMPLETIONS,
    LONG_ENOUGH,
    ON_BOTH,
    ask,
    exactly,
    http,
    load,
    metric,
    socket,
    stream,
    until,
    wait_until_idle,
)
from tests.system.deployments import Site

CANCEL_STEPS = 2
"""Decode steps that a row may stay in the batch after its client has gone."""

FIRST_TEXT = b'"delta":{"content":'
DOWNLOAD = """
import sys, urllib.request
with urllib.request.urlopen(sys.argv[1], sys.argv[2].encode()) as response:
    for line in response:
        print(line.decode(), end="", flush=True)
"""

Vanish = Callable[[], None]


async def post(
    base_url: str, body: dict[str, object], exits: AsyncExitStack
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request over a connection that is reset, not closed, when its transport is aborted."""
    parts = urlsplit(base_url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    exits.callback(writer.close)
    raw = writer.get_extra_info("socket")
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    return reader, writer


async def a_reset_stream(site: Site, exits: AsyncExitStack) -> Vanish:
    reader, writer = await post(site.base_url, exactly(LONG_ENOUGH, stream=True), exits)
    await reader.readuntil(FIRST_TEXT)
    return writer.transport.abort


async def a_killed_process(site: Site, exits: AsyncExitStack) -> Vanish:
    body = json.dumps(exactly(LONG_ENOUGH, stream=True))
    arguments = ["-c", DOWNLOAD, site.base_url + COMPLETIONS, body]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    exits.push_async_callback(process.communicate)
    assert process.stdout is not None
    await process.stdout.readuntil(FIRST_TEXT)
    return process.kill


async def one_that_waits_for_a_whole_answer(site: Site, exits: AsyncExitStack) -> Vanish:
    running = load(site.deployment)["running"]
    _, writer = await post(site.base_url, exactly(LONG_ENOUGH), exits)
    await until(lambda: load(site.deployment)["running"] > running, "the request to run")
    return writer.transport.abort


async def a_closed_page(site: Site, exits: AsyncExitStack) -> Vanish:
    page = await exits.enter_async_context(socket(site.base_url))
    await page.chat("a", exactly(LONG_ENOUGH))
    await page.until("delta")
    return page.connection.transport.abort


CLIENTS: tuple[Callable[[Site, AsyncExitStack], Awaitable[Vanish]], ...] = (
    a_reset_stream,
    a_killed_process,
    one_that_waits_for_a_whole_answer,
    a_closed_page,
)


@ON_BOTH
@pytest.mark.parametrize("client", CLIENTS)
async def test_the_row_of_a_client_that_has_gone_is_free_within_two_steps(
    site: Site, client: Callable[[Site, AsyncExitStack], Awaitable[Vanish]]
) -> None:
    cancelled = wait_until_idle(site.deployment)["cancelled_total"]
    outcomes = metric(site.base_url, "mlx_requests_total", outcome="cancelled")
    async with AsyncExitStack() as exits:
        vanish = await client(site, exits)
        await until(lambda: load(site.deployment)["running"] == 1, "the row to be seen")
        vanish()
        await until(lambda: load(site.deployment)["cancelled_total"] == cancelled + 1, "the cancellation")
        after = wait_until_idle(site.deployment)
    assert after["cancelled_total"] == cancelled + 1
    assert after["cancel_steps_max"] <= CANCEL_STEPS
    assert metric(site.base_url, "mlx_worker_cancel_steps_max") == after["cancel_steps_max"]
    assert metric(site.base_url, "mlx_worker_cancelled_total") == after["cancelled_total"]
    assert metric(site.base_url, "mlx_requests_total", outcome="cancelled") == outcomes + 1
    assert metric(site.base_url, "mlx_requests_inflight") == 0


@ON_BOTH
async def test_others_go_on_undisturbed(site: Site) -> None:
    cancelled = wait_until_idle(site.deployment)["cancelled_total"]
    async with http(site.base_url) as client, AsyncExitStack() as exits:
        alone = await ask(client, exactly(120))
        leaving = [await start(site, exits) for start in CLIENTS]

        def leave() -> None:
            while leaving:
                leaving.pop()()

        # All of them go when the other has only begun.
        answer = await stream(client, exactly(120), on_text=leave)
        await until(lambda: load(site.deployment)["cancelled_total"] == cancelled + len(CLIENTS), "all cancellations")
    assert dict(answer.texts) == dict(alone.texts)
    assert answer.usage == alone.usage
    assert answer.done
    assert wait_until_idle(site.deployment)["cancel_steps_max"] <= CANCEL_STEPS
