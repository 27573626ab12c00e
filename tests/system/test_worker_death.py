"""`kill -9` on a worker in mid-stream: every client is told so, and a new worker answers without a hand."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.system.api_fixtures import (
    COMPLETIONS,
    LONG_ENOUGH,
    ON_BOTH,
    Answer,
    exactly,
    http,
    load,
    socket,
    stream,
    until,
    wait_until_idle,
)
from tests.system.deployments import DEMO_MODEL, PATIENCE_S, Site

STREAMS = 3


@pytest.fixture
def worker(site: Site) -> Iterator[dict[str, Any]]:
    """The site's worker; when the test is done with it, another one is waited for."""
    wait_until_idle(site.deployment)
    (worker,) = site.deployment.workers("ready", model=DEMO_MODEL)
    yield worker
    site.deployment.wait_for_worker("ready", without=[worker["id"]], model=DEMO_MODEL)


@ON_BOTH
async def test_clients_of_a_killed_worker_get_a_typed_error_and_a_new_worker_answers(
    site: Site, worker: dict[str, Any]
) -> None:
    async with http(site.base_url) as client, socket(site.base_url) as page:
        whole = asyncio.create_task(client.post(COMPLETIONS, json=exactly(LONG_ENOUGH)))
        begun = [asyncio.Event() for _ in range(STREAMS)]
        streams = [asyncio.create_task(stream(client, exactly(LONG_ENOUGH), on_text=text.set)) for text in begun]
        await page.chat("a", exactly(LONG_ENOUGH))
        await page.until("delta")
        await asyncio.gather(*(text.wait() for text in begun))
        await until(lambda: load(site.deployment)["running"] == STREAMS + 2, "all of them to run")
        os.kill(worker["pid"], signal.SIGKILL)

        assert_lost_in_a_stream(await asyncio.gather(*streams))
        assert_lost(await whole)
        error = await page.until("error", "a")
        assert (error["error"]["code"], error["error"]["type"]) == ("worker_lost", "server_error")
        assert page.kinds("a") == ["accepted", "delta", "error"]

        await until(lambda: answers(client), "an answer")
        await page.chat("b", exactly(1))
        await page.until("finished", "b")
    (successor,) = site.deployment.workers("ready", model=DEMO_MODEL)
    assert successor["id"] != worker["id"]


def assert_lost_in_a_stream(answers: list[Answer]) -> None:
    for answer in answers:
        assert answer.texts[0], "the stream had begun"
        assert answer.error is not None
        assert (answer.error["code"], answer.error["type"], answer.error["param"]) == (
            "worker_lost",
            "server_error",
            None,
        )
        assert not answer.done
        assert answer.reasons == {}, "no choice claims to have ended"


def assert_lost(response: httpx.Response) -> None:
    assert (response.status_code, response.headers["Content-Type"]) == (502, "application/json")
    assert response.json()["error"]["code"] == "worker_lost"
    assert int(response.headers["Retry-After"]) > 0


async def answers(client: httpx.AsyncClient) -> bool:
    """Return whether a request is answered; one that is not is refused properly meanwhile."""
    response = await client.post(COMPLETIONS, json=exactly(1), timeout=PATIENCE_S)
    if response.status_code == 200:
        return True
    assert response.status_code in (502, 503), response.text
    assert response.json()["error"]["code"] in ("worker_lost", "model_not_ready")
    assert int(response.headers["Retry-After"]) > 0
    return False
