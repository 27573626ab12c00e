"""Every feature flag, switched in the database while requests run: the plain path is taken, and says the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mlx_serving.conf import Settings
from mlx_serving.flags import FLAGS, KILL_SWITCH
from tests.system.api_fixtures import (
    ON_DAPHNE,
    Answer,
    ask,
    exactly,
    http,
    load,
    metric,
    metrics,
    stream,
    until,
    wait_until_idle,
)
from tests.system.deployments import DEMO_MODEL, POLL_S, TINY_MODEL, Deployment, Site, serve

pytestmark = ON_DAPHNE

SEEN_WITHIN_S = 2.0
"""How old a value may be that a process goes by."""

REQUESTS = 3
DEFAULT_MAX_ROWS = Settings().MAX_ROWS
TESTED = {KILL_SWITCH, "connection_pool", "optimized_streaming", "prefix_cache", "adaptive_batching"}
FEATURES = sorted(set(FLAGS) - {KILL_SWITCH})


def set_flag(deployment: Deployment, name: str, *, enabled: bool | None) -> None:
    """Change a flag in the database, as the admin does; None leaves it to the settings and the default."""
    deployment.execute(
        "INSERT INTO mlx_serving_featureflag (name, enabled, updated_at) VALUES (?, ?, datetime('now'))"
        " ON CONFLICT (name) DO UPDATE SET enabled = excluded.enabled, updated_at = excluded.updated_at",
        name,
        enabled,
    )


@pytest.fixture(autouse=True)
def unset_flags(demo_deployment: Deployment) -> Iterator[None]:
    """Leave the flags as they were found."""
    yield
    demo_deployment.execute("DELETE FROM mlx_serving_featureflag")


def in_force(base_url: str) -> dict[str, bool]:
    """Return the flags that /metrics shows."""
    return {name: bool(metric(base_url, "mlx_feature_flag", flag=name)) for name in FLAGS}


async def switch(site: Site, **values: bool) -> dict[str, bool]:
    """Set flags, wait until the site shows them, and check that no look that began too late showed the old ones."""
    for name, enabled in values.items():
        set_flag(site.deployment, name, enabled=enabled)
    changed = time.monotonic()
    while True:
        looked = time.monotonic()
        found = await asyncio.to_thread(in_force, site.base_url)
        if values.items() <= found.items() or (values.get(KILL_SWITCH) and found[KILL_SWITCH]):
            return found
        assert looked - changed < SEEN_WITHIN_S, f"{values} are not in force: {found}"
        await asyncio.sleep(POLL_S)


def links_opened(base_url: str) -> float:
    return metric(base_url, "mlx_links_opened_total", model=DEMO_MODEL)


def requests_sent(base_url: str, *, pooled: bool) -> float:
    return metric(base_url, "mlx_link_requests_total", model=DEMO_MODEL, pooled="yes" if pooled else "no")


async def say(base_url: str) -> Answer:
    async with http(base_url) as client:
        return await ask(client, exactly(8))


@contextlib.asynccontextmanager
async def running(site: Site) -> AsyncIterator[asyncio.Task[Answer]]:
    """A stream that runs meanwhile, and says what it always says."""
    async with http(site.base_url) as client:
        alone = await ask(client, exactly(100))
        begun = asyncio.Event()
        task = asyncio.create_task(stream(client, exactly(100), on_text=begun.set))
        await begun.wait()
        yield task
        answer = await task
    assert answer.text == alone.text
    assert answer.usage == alone.usage


def test_every_flag_that_the_site_has_is_tested_here(site: Site) -> None:
    shown = {dict(labels)["flag"] for name, labels in metrics(site.base_url) if name == "mlx_feature_flag"}
    assert shown == TESTED


@pytest.mark.parametrize("name", FLAGS)
async def test_a_change_is_seen_within_two_seconds(site: Site, name: str) -> None:
    for enabled in (not FLAGS[name].default, FLAGS[name].default):
        assert (await switch(site, **{name: enabled}))[name] is enabled


async def test_connection_pool_off_opens_a_link_for_each_request(site: Site) -> None:
    await switch(site, connection_pool=True)
    usual = await say(site.base_url)
    async with running(site):
        opened, pooled = links_opened(site.base_url), requests_sent(site.base_url, pooled=True)
        for _ in range(REQUESTS):
            assert await say(site.base_url) == usual
        assert links_opened(site.base_url) == opened, "the open one is shared"
        assert requests_sent(site.base_url, pooled=True) == pooled + REQUESTS

        await switch(site, connection_pool=False)
        alone = requests_sent(site.base_url, pooled=False)
        for _ in range(REQUESTS):
            assert await say(site.base_url) == usual
        assert links_opened(site.base_url) == opened + REQUESTS
        assert requests_sent(site.base_url, pooled=False) == alone + REQUESTS

    await switch(site, connection_pool=True)
    assert await say(site.base_url) == usual
    assert links_opened(site.base_url) == opened + REQUESTS, "the shared one is still open"


async def stalled_stream(site: Site) -> Answer:
    """Return a stream for which the web process stood still until the worker had made all of its tokens."""
    # Few enough that the worker sends all of them without waiting for its reader.
    body = exactly(60)
    wait_until_idle(site.deployment)

    def stop() -> None:
        os.kill(site.server.pid, signal.SIGSTOP)

    async with http(site.base_url) as client:
        before = load(site.deployment)["generated_tokens_total"]
        begun = asyncio.Event()

        def stop_once() -> None:
            if not begun.is_set():
                begun.set()
                stop()

        task = asyncio.create_task(stream(client, body, on_text=stop_once))
        try:
            await begun.wait()
            await until(
                lambda: load(site.deployment)["generated_tokens_total"] >= before + body["max_tokens"], "all tokens"
            )
        finally:
            os.kill(site.server.pid, signal.SIGCONT)
        return await task


def merged(base_url: str) -> float:
    return metric(base_url, "mlx_stream_merged_deltas_total", model=DEMO_MODEL)


async def test_optimized_streaming_off_writes_each_delta_as_its_own_chunk(site: Site) -> None:
    await switch(site, optimized_streaming=False)
    before = merged(site.base_url)
    written = metric(site.base_url, "mlx_stream_chunks_total", transport="sse")
    plain = await stalled_stream(site)
    assert merged(site.base_url) == before, "nothing is merged"
    assert metric(site.base_url, "mlx_stream_chunks_total", transport="sse") - written >= plain.chunks

    await switch(site, optimized_streaming=True)
    optimized = await stalled_stream(site)
    assert merged(site.base_url) > before
    assert optimized.chunks < plain.chunks
    assert optimized.text == plain.text
    assert optimized.usage == plain.usage


def prefix_hits(base_url: str) -> float:
    return metric(base_url, "mlx_cache_hits_total", layer="prefix")


async def test_prefix_cache_off_computes_every_prompt_from_its_first_token(site: Site) -> None:
    await switch(site, prefix_cache=True)
    usual, hits = await say(site.base_url), prefix_hits(site.base_url)

    async def hit() -> bool:
        assert (await say(site.base_url)).text == usual.text
        return prefix_hits(site.base_url) > hits

    await until(hit, "a prompt to begin with a known prefix")
    await switch(site, prefix_cache=False)
    await until(lambda: metric(site.base_url, "mlx_worker_prefix_bytes") == 0, "the worker to forget its prefixes")
    plain = await say(site.base_url)
    assert (plain, plain.cached_tokens) == (usual, 0)
    assert metric(site.base_url, "mlx_worker_prefix_bytes") == 0


async def test_adaptive_batching_off_fixes_the_row_limit(
    deployment: Deployment, tiny_model: Path, server_kind: str
) -> None:
    deployment.add_model(TINY_MODEL, tiny_model)
    # No step is that fast, so that the limit falls as soon as rows run.
    deployment.supervise(MLX_SERVING_TARGET_ITL_MS="0.001")
    deployment.wait_for_worker("ready")
    with serve(deployment, server_kind) as (base_url, _):

        async def say_all() -> list[str]:
            async with http(base_url) as client:
                bodies = [exactly(40, f"{at}", model=TINY_MODEL) for at in range(6)]
                return [answer.text for answer in await asyncio.gather(*(ask(client, body) for body in bodies))]

        def row_limit() -> float:
            return metric(base_url, "mlx_worker_row_limit")

        usual = await say_all()
        await until(lambda: 0 < row_limit() < 6, "the limit to fall")
        set_flag(deployment, "adaptive_batching", enabled=False)
        await until(lambda: row_limit() == DEFAULT_MAX_ROWS, "the limit to be fixed")
        assert await say_all() == usual
        assert row_limit() == DEFAULT_MAX_ROWS


async def test_the_kill_switch_turns_every_feature_off_at_once(site: Site) -> None:
    await switch(site, **dict.fromkeys(FEATURES, True))
    usual = await say(site.base_url)
    async with running(site):
        found = await switch(site, **{KILL_SWITCH: True})
        assert found == {name: name == KILL_SWITCH for name in FLAGS}
        alone, opened = requests_sent(site.base_url, pooled=False), links_opened(site.base_url)
        assert await say(site.base_url) == usual
        assert requests_sent(site.base_url, pooled=False) == alone + 1
        assert links_opened(site.base_url) == opened + 1
    found = await switch(site, **{KILL_SWITCH: False, "connection_pool": True})
    assert found == {name: name != KILL_SWITCH for name in FLAGS}
    pooled = requests_sent(site.base_url, pooled=True)
    assert await say(site.base_url) == usual
    assert requests_sent(site.base_url, pooled=True) == pooled + 1


async def test_the_environment_wins_over_the_database(site: Site) -> None:
    for name in FEATURES:
        set_flag(site.deployment, name, enabled=True)
    usual = await say(site.base_url)
    with serve(site.deployment, "daphne", MLX_CONNECTION_POOL_ENABLED="false") as (base_url, _):
        assert in_force(base_url) == {**dict.fromkeys(FEATURES, True), KILL_SWITCH: False, "connection_pool": False}
        assert await say(base_url) == usual
        assert requests_sent(base_url, pooled=False) == 1
        assert requests_sent(base_url, pooled=True) == 0
        # The site's other processes, which lack the variable, go by the database.
        assert (await switch(site, connection_pool=True))["connection_pool"]
