"""Many streams at once through a real server: each says exactly what it says alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.system.api_fixtures import ON_BOTH, Answer, ask, exactly, http, stream
from tests.system.deployments import Site

STREAMS = 32

QUESTIONS = (
    "Write a long guide to operating mlx-serving",
    "What is 17 + 25?",
    "Repeat after me: café 😀 世界 🚀",
    "Reverse the words: river stone apple",
    "How do I start the workers?",
)


def body(at: int) -> dict[str, Any]:
    """Return the request of a stream: no two have the same prompt, few the same length of prompt or output."""
    filler = " ".join(f"note{at + word}" for word in range((at * 7) % 40))
    return exactly(3 + (at * 11) % 29, f"{QUESTIONS[at % len(QUESTIONS)]} ({at}) {filler}")


@pytest.fixture(scope="module")
def alone() -> dict[int, Answer]:
    """What each request says when nothing else runs; filled by the first test that needs it."""
    return {}


@ON_BOTH
async def test_concurrent_streams_say_what_each_says_alone(site: Site, alone: dict[int, Answer]) -> None:
    async with http(site.base_url) as client:
        for at in range(STREAMS):
            if at not in alone:
                alone[at] = await ask(client, body(at))
        together = await asyncio.gather(*(stream(client, body(at)) for at in range(STREAMS)))
    for at, answer in enumerate(together):
        assert answer.error is None
        assert answer.done
        assert dict(answer.texts) == dict(alone[at].texts)
        assert answer.reasons == alone[at].reasons == {0: "length"}
        assert answer.usage == alone[at].usage
        assert answer.usage["completion_tokens"] == body(at)["max_tokens"]
    assert len({answer.text for answer in together}) > STREAMS // 2, "the texts differ, so they could be mixed up"
