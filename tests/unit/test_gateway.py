"""The stages of a request's way, each alone, and their order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import pytest
from pytest_django import Settings

from inference.protocol import Accepted, Delta, Failed, Finished, GenerationRequest, RequestEvent, Usage
from mlx_serving.errors import ModelNotFound, ModelNotReady, Overloaded, WorkerLost
from mlx_serving.fleet.registry import ModelView, WorkerView
from mlx_serving.gateway import Call, Gateway, gateway
from mlx_serving.gateway.admission import Admission
from mlx_serving.gateway.routing import Routing, choose


def _call(client: str = "c", model: str = "m") -> Call:
    return Call(GenerationRequest(request_id="r", model=model, prompt="x"), client, 60)


def _worker(name: str, *, state: str = "ready", running: int = 0, waiting: int = 0) -> WorkerView:
    return WorkerView(name, "m", f"unix:/nowhere/{name}", state, running, waiting, {})


async def _answer(_call: Call) -> AsyncGenerator[RequestEvent, None]:
    yield Accepted("r", 1, "w")
    yield Finished("r", 0, Usage(1, 0))


async def _all(events: AsyncGenerator[RequestEvent, None]) -> list[RequestEvent]:
    async with aclosing(events):
        return [event async for event in events]


class FixedRegistry:
    """A registry whose content the test sets."""

    def __init__(self, *workers: WorkerView, wanted: bool = True) -> None:
        self.view = ModelView("m", wanted, 0, None, workers)

    async def models(self) -> Mapping[str, ModelView]:
        return {"m": self.view}


class FixedAnswer:
    """A last stage that gives these events."""

    def __init__(self, *events: RequestEvent) -> None:
        self.events = events

    async def stream(self, _call: Call, _proceed: Any) -> AsyncGenerator[RequestEvent, None]:
        for event in self.events:
            yield event


@pytest.fixture
def limits(settings: Settings) -> None:
    settings.MLX_SERVING = {"MAX_INFLIGHT": 3, "MAX_INFLIGHT_PER_CLIENT": 2, "RETRY_AFTER_S": 7}


def _routing(registry: Any) -> Routing:
    return Routing(registry)


@pytest.mark.usefixtures("limits")
async def test_admission_refuses_beyond_a_clients_limit_and_counts_down_again() -> None:
    admission = Admission()
    open_streams = [admission.stream(_call("a"), _answer) for _ in range(2)]
    for stream in open_streams:
        await anext(stream)

    with pytest.raises(Overloaded) as caught:
        await anext(admission.stream(_call("a"), _answer))
    assert caught.value.retry_after_s == 7
    await _all(admission.stream(_call("b"), _answer))
    for stream in open_streams:
        await stream.aclose()

    assert admission.total == 0
    assert len(await _all(admission.stream(_call("a"), _answer))) == 2


@pytest.mark.usefixtures("limits")
async def test_admission_refuses_beyond_the_total() -> None:
    admission = Admission()
    open_streams = [admission.stream(_call(name), _answer) for name in "abc"]
    for stream in open_streams:
        await anext(stream)

    with pytest.raises(Overloaded):
        await anext(admission.stream(_call("d"), _answer))

    for stream in open_streams:
        await stream.aclose()


def test_least_busy_ready_worker_is_chosen() -> None:
    workers = [_worker("a", running=3), _worker("b", running=1, waiting=1), _worker("c", state="loading")]

    assert choose(workers, {}) is workers[1]
    # What this process sent within the last second is not in the workers' own numbers yet.
    assert choose(workers, {"b": 5}) is workers[0]
    assert choose(workers[2:], {}) is None


async def test_routing_names_the_worker_and_forgets_the_request_afterwards() -> None:
    routing = _routing(FixedRegistry(_worker("a")))
    call = _call()
    await _all(routing.stream(call, _answer))

    assert call.worker is not None
    assert call.notes == {"X-MLX-Worker": "a"}
    assert not routing._outstanding


@pytest.mark.parametrize(
    ("registry", "words"),
    [
        (FixedRegistry(), "no worker runs"),
        (FixedRegistry(_worker("a", state="loading")), "loading"),
        (FixedRegistry(wanted=False), "switched off"),
    ],
)
async def test_model_without_a_ready_worker_is_unavailable(registry: FixedRegistry, words: str) -> None:
    with pytest.raises(ModelNotReady, match=words) as caught:
        await _all(_routing(registry).stream(_call(), _answer))

    assert caught.value.retry_after_s is not None


async def test_unknown_model_is_not_found() -> None:
    with pytest.raises(ModelNotFound) as caught:
        await _all(_routing(FixedRegistry()).stream(_call(model="other"), _answer))

    assert (caught.value.status, caught.value.param) == (404, "model")


@pytest.mark.django_db(transaction=True)
async def test_worker_that_cannot_be_reached_is_a_typed_error() -> None:
    link = gateway._stages[-1]
    call = _call()
    call.worker = _worker("gone")

    with pytest.raises(WorkerLost):
        await _all(link.stream(call, _answer))


@pytest.mark.django_db(transaction=True)
async def test_failure_event_becomes_the_error_of_its_code() -> None:
    events = FixedAnswer(Accepted("r", 1, "w"), Failed("r", "overloaded", "busy", retryable=True))

    with pytest.raises(Overloaded, match="busy") as caught:
        await _all(Gateway([events]).stream(_call()))

    assert caught.value.retry_after_s is not None


@pytest.mark.django_db(transaction=True)
async def test_closing_the_stream_closes_every_stage() -> None:
    closed: list[str] = []

    class Noting:
        def __init__(self, name: str) -> None:
            self.name = name

        async def stream(self, call: Call, proceed: Any) -> AsyncGenerator[RequestEvent, None]:
            try:
                async with aclosing(proceed(call)) as events:
                    async for event in events:
                        yield event
            finally:
                closed.append(self.name)

    class Endless:
        async def stream(self, _call: Call, _proceed: Any) -> AsyncGenerator[RequestEvent, None]:
            try:
                while True:
                    yield Delta("r", 0, 0, "x", (1,))
                    await asyncio.sleep(0)
            finally:
                closed.append("end")

    events = Gateway([Noting("first"), Noting("second"), Endless()]).stream(_call())
    await anext(events)
    await events.aclose()

    assert closed == ["end", "second", "first"]


def test_stages_stand_in_the_order_of_a_requests_way() -> None:
    assert [type(stage).__name__ for stage in gateway._stages] == ["Admission", "Routing", "Link"]
