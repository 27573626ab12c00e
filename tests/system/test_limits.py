"""Too much at once: refused at the door with a time to come again, and one slow reader is nobody else's problem."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket as sockets
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.system.api_fixtures import (
    COMPLETIONS,
    LONG_ENOUGH,
    ON_BOTH,
    Answer,
    ask,
    exactly,
    load,
    logged_in,
    metric,
    stream,
    until,
    wait_until_idle,
)
from tests.system.api_fixtures import (
    http as connect,
)
from tests.system.deployments import DEMO_MODEL, PATIENCE_S, TINY_MODEL, Deployment, Site, serve

PER_CLIENT, IN_TOTAL, RETRY_AFTER_S = 2, 3, 7


@pytest.fixture(scope="module")
def small_site(demo_deployment: Deployment) -> Iterator[str]:
    """The address of a server that takes few requests at once."""
    environ = {
        "MLX_SERVING_MAX_INFLIGHT_PER_CLIENT": str(PER_CLIENT),
        "MLX_SERVING_MAX_INFLIGHT": str(IN_TOTAL),
        "MLX_SERVING_RETRY_AFTER_S": str(RETRY_AFTER_S),
    }
    with serve(demo_deployment, "uvicorn", **environ) as (base_url, _):
        yield base_url


async def occupy(exits: AsyncExitStack, client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
    """Start a stream that runs until the stack is left, or until the response is closed."""
    response = await exits.enter_async_context(client.stream("POST", COMPLETIONS, json={**body, "stream": True}))
    assert response.status_code == 200
    return response


def refused(response: httpx.Response, retry_after_s: int) -> None:
    assert (response.status_code, response.headers["Content-Type"]) == (429, "application/json"), response.text
    assert response.headers["Retry-After"] == str(retry_after_s)
    error = response.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("overloaded", "rate_limit_error", None)


async def test_requests_in_flight_are_limited_by_client_and_in_total(
    small_site: str, demo_deployment: Deployment
) -> None:
    with logged_in(small_site, demo_deployment) as session:
        cookies, token = dict(session.cookies), session.cookies["csrftoken"]
    endless = exactly(LONG_ENOUGH)
    async with (
        connect(small_site) as anonymous,
        connect(small_site, cookies=cookies, headers={"X-CSRFToken": token}) as user,
        AsyncExitStack() as exits,
    ):
        for _ in range(PER_CLIENT):
            first = await occupy(exits, anonymous, endless)
        for stream_too in (False, True):
            refused(await anonymous.post(COMPLETIONS, json=exactly(1, stream=stream_too)), RETRY_AFTER_S)

        # Another client has a share of its own, until the server as a whole is full.
        await occupy(exits, user, endless)
        response = await user.post(COMPLETIONS, json=exactly(1))
        refused(response, RETRY_AFTER_S)
        assert str(IN_TOTAL) in response.json()["error"]["message"]
        assert metric(small_site, "mlx_requests_inflight") == IN_TOTAL

        # What ends makes room.
        await first.aclose()
        await until(lambda: metric(small_site, "mlx_requests_inflight") == IN_TOTAL - 1, "the place to be free")
        assert (await anonymous.post(COMPLETIONS, json=exactly(1))).status_code == 200
        assert (await user.post(COMPLETIONS, json=exactly(1))).status_code == 200
    await until(lambda: metric(small_site, "mlx_requests_inflight") == 0, "all places to be free")
    assert metric(small_site, "mlx_requests_total", outcome="overloaded") == 3


async def test_the_openai_client_sees_a_rate_limit(small_site: str) -> None:
    async with (
        connect(small_site) as client,
        AsyncExitStack() as exits,
        openai.AsyncOpenAI(base_url=f"{small_site}/v1", api_key="unused", max_retries=0) as other,
    ):
        for _ in range(PER_CLIENT):
            await occupy(exits, client, exactly(LONG_ENOUGH))
        with pytest.raises(openai.RateLimitError) as raised:
            await other.chat.completions.create(model=DEMO_MODEL, messages=[{"role": "user", "content": "Hi"}])
        assert raised.value.code == "overloaded"
        assert raised.value.response.headers["Retry-After"] == str(RETRY_AFTER_S)


async def test_a_full_queue_of_a_worker_is_said_at_once(deployment: Deployment, tiny_model: Path) -> None:
    deployment.add_model(TINY_MODEL, tiny_model)
    deployment.supervise(MLX_SERVING_MAX_ROWS="1", MLX_SERVING_MAX_WAITING="1")
    deployment.wait_for_worker("ready")
    endless = {**exactly(4000), "model": TINY_MODEL}
    short = {**exactly(1), "model": TINY_MODEL}
    with serve(deployment, "uvicorn") as (base_url, _):
        async with connect(base_url) as client, AsyncExitStack() as exits:
            running = await occupy(exits, client, endless)
            await occupy(exits, client, endless)
            for stream_too in (False, True):
                refused(await client.post(COMPLETIONS, json={**short, "stream": stream_too}), 1)
            await running.aclose()

            async def accepted() -> bool:
                async with client.stream("POST", COMPLETIONS, json={**short, "stream": True}) as response:
                    assert response.status_code in (200, 429)
                    return response.status_code == 200

            await until(accepted, "room in the queue")


@ON_BOTH
async def test_a_reader_that_stalls_disturbs_nobody_and_loses_nothing(site: Site) -> None:
    wait_until_idle(site.deployment)
    much, little = exactly(80, n=6), exactly(40, "What is 17 + 25?")
    async with connect(site.base_url) as client:
        alone, usual = await ask(client, much), await ask(client, little)
        stalled = stalled_reader(site.base_url, much)
        await until(lambda: load(site.deployment)["running"] == 6, "the rows of the slow reader")
        assert dict((await stream(client, little)).texts) == dict(usual.texts)
        await until(lambda: load(site.deployment)["running"] == 0, "the worker to have finished")
        answer = await asyncio.to_thread(read_to_the_end, stalled)
    assert dict(answer.texts) == dict(alone.texts)
    assert answer.usage == alone.usage
    assert answer.done


def stalled_reader(base_url: str, body: dict[str, Any]) -> sockets.socket:
    """Ask for a stream and read nothing of it, with as little room in the kernel as it gives."""
    parts = urlsplit(base_url)
    reader = sockets.socket()
    reader.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 1024)
    reader.settimeout(PATIENCE_S)
    reader.connect((parts.hostname, parts.port))
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {len(data)}\r\n\r\n"
    reader.sendall(head.encode() + data)
    return reader


def read_to_the_end(reader: sockets.socket) -> Answer:
    """Read what a stalled reader has left unread."""
    with reader, contextlib.closing(http.client.HTTPResponse(reader)) as response:
        response.begin()
        assert response.status == 200
        text = response.read().decode()
    answer = Answer()
    for line in text.splitlines():
        answer.add(line)
    return answer
