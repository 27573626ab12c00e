"""The WebSocket: requests that share a socket, cancelling, what is refused, and who may connect."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from inference.demo_model.questions import CHECKS
from tests.system.api_fixtures import (
    LONG_ENOUGH,
    ON_BOTH,
    ON_DAPHNE,
    ask,
    chat,
    exactly,
    http,
    load,
    logged_in,
    socket,
    split_usage,
    until,
    wait_until_idle,
)
from tests.system.deployments import Deployment, Site, serve

LIMIT = 2


@pytest.fixture(scope="module")
def closed_site(demo_deployment: Deployment) -> Iterator[str]:
    """The address of a server that is closed to anonymous clients and takes two requests of a socket at once."""
    environ = {"MLX_SERVING_ALLOW_ANONYMOUS": "false", "MLX_SERVING_MAX_REQUESTS_PER_SOCKET": str(LIMIT)}
    with serve(demo_deployment, "daphne", **environ) as (base_url, _):
        yield base_url


@pytest.fixture(scope="module")
def cookie(demo_deployment: Deployment, closed_site: str) -> str:
    """The session of a logged-in user, as a header."""
    with logged_in(closed_site, demo_deployment) as client:
        return f"sessionid={client.cookies['sessionid']}"


# --- several requests on one socket -----------------------------------------------------------------------------------


@ON_BOTH
async def test_requests_on_one_socket_are_interleaved_and_not_mixed_up(site: Site) -> None:
    bodies = {f"request {at}": exactly(30, f"What is {at} + 25?") for at in range(4)}
    async with http(site.base_url) as client:
        alone = {name: await ask(client, body) for name, body in bodies.items()}
    async with socket(site.base_url) as page:
        for name, body in bodies.items():
            await page.chat(name, body)
        await page.all_of(bodies)
    for name in bodies:
        assert page.kinds(name) == ["accepted", "delta", "finished"]
        assert page.text(name) == alone[name].text
        frames = [frame for frame in page.seen if frame["id"] == name]
        accepted, *deltas, finished = frames
        assert accepted["prompt_tokens"] == finished["usage"]["prompt_tokens"]
        assert split_usage(finished["usage"])[0] == alone[name].usage
        assert [delta["finish_reason"] for delta in deltas if delta["finish_reason"]] == ["length"]
        numbers = [delta["seq"] for delta in deltas]
        assert numbers == sorted(set(numbers))
    owners = [frame["id"] for frame in page.seen if frame["type"] == "delta"]
    turns = len(list(itertools.groupby(owners)))
    assert turns > 2 * len(bodies), "they came in turns, not one after the other"


@ON_DAPHNE
async def test_choices_and_tool_calls_come_as_deltas(site: Site) -> None:
    tools = next(check for check in CHECKS if check.mode == "tools")
    async with socket(site.base_url) as page:
        await page.chat("choices", exactly(5, n=2))
        await page.chat("tools", chat(messages=list(tools.messages), tools=list(tools.tools)))
        await page.all_of(["choices", "tools"])
    deltas = [frame for frame in page.seen if frame["type"] == "delta"]
    ends = {(frame["id"], frame["index"]): frame["finish_reason"] for frame in deltas if frame["finish_reason"]}
    assert ends == {("choices", 0): "length", ("choices", 1): "length", ("tools", 0): "tool_calls"}
    calls = [call["function"] for frame in deltas for call in frame.get("tool_calls", ())]
    got = [{"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls]
    assert got == json.loads(tools.expected)
    assert page.text("tools") == ""


# --- cancelling -------------------------------------------------------------------------------------------------------


@ON_BOTH
async def test_cancelling_one_request_leaves_the_others(site: Site) -> None:
    cancelled = wait_until_idle(site.deployment)["cancelled_total"]
    async with http(site.base_url) as client:
        alone = await ask(client, exactly(60))
    async with socket(site.base_url) as page:
        await page.chat("endless", exactly(LONG_ENOUGH, "What is 17 + 25?"))
        await page.chat("other", exactly(60))
        await page.until("delta", "other")
        await page.cancel("endless")
        await page.until("cancelled", "endless")
        at_cancel = len(page.seen)
        await page.until("finished", "other")
        assert page.text("other") == alone.text
        assert {frame["id"] for frame in page.seen[at_cancel:]} == {"other"}, "nothing comes after the cancellation"
        after = await until(
            lambda: (now := load(site.deployment))["cancelled_total"] == cancelled + 1 and now, "the cancellation"
        )
        assert after["cancel_steps_max"] <= 2
        await page.chat("endless", exactly(1))
        await page.until("finished", "endless")


@ON_DAPHNE
async def test_a_request_can_be_cancelled_before_it_has_begun(site: Site) -> None:
    async with socket(site.base_url) as page:
        await page.chat("a", exactly(LONG_ENOUGH))
        await page.cancel("a")
        await page.cancel("a")
        await page.until("cancelled", "a")
        await page.chat("a", exactly(1))
        await page.until("finished", "a")
        assert [frame["type"] for frame in page.seen if frame["type"] == "cancelled"] == ["cancelled"]
    assert wait_until_idle(site.deployment)["running"] == 0


@ON_DAPHNE
async def test_cancelling_what_does_not_run_is_ignored(site: Site) -> None:
    async with socket(site.base_url) as page:
        await page.cancel("nobody")
        await page.chat("a", exactly(1))
        await page.until("finished")
        await page.cancel("a")
        await page.chat("b", exactly(1))
        await page.until("finished")
        assert {frame["type"] for frame in page.seen} <= {"accepted", "delta", "finished"}


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_FRAMES: dict[str, tuple[Any, str | None, str, str]] = {
    "empty": ("", None, "invalid_request", "body"),
    "not JSON": ('{"type": "chat", "id": "a"', None, "invalid_request", "body"),
    "binary": (b'{"type": "cancel", "id": "a"}', None, "invalid_request", "body"),
    "array": ([], None, "invalid_request", "body"),
    "no type": ({"id": "a"}, "a", "invalid_request", "type"),
    "unknown type": ({"type": "sing", "id": "a"}, "a", "invalid_request", "type"),
    "no id": ({"type": "chat", "request": exactly(1)}, None, "invalid_request", "id"),
    "id number": ({"type": "chat", "id": 7, "request": exactly(1)}, None, "invalid_request", "id"),
    "id empty": ({"type": "cancel", "id": ""}, None, "invalid_request", "id"),
    "id too long": ({"type": "cancel", "id": "x" * 101}, None, "invalid_request", "id"),
    "no request": ({"type": "chat", "id": "a"}, "a", "invalid_request", "request"),
    "unknown field": ({"type": "cancel", "id": "a", "x": 1}, "a", "invalid_request", "x"),
    "bad field": (
        {"type": "chat", "id": "a", "request": chat(temperature="x")}, "a", "invalid_request", "temperature"),
    "big number": (
        {"type": "chat", "id": "a", "request": chat(max_tokens=10**30)}, "a", "invalid_request", "max_tokens"),
    "not a stream": (
        {"type": "chat", "id": "a", "request": chat(stream=False)}, "a", "invalid_request", "stream"),
    "unknown model": (
        {"type": "chat", "id": "a", "request": {**chat(), "model": "nope"}}, "a", "model_not_found", "model"),
    "too long": ({"type": "chat", "id": "a", "request": chat("x " * 9000)}, "a", "context_length_exceeded", "messages"),
    "brackets": ('{"type": "chat", "id": "a", "request": ' + "[" * 100_000, None, "invalid_request", "request"),
    "brackets before the type": (
        '{"id": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", None, "invalid_request", "body"),
}  # fmt: skip


@ON_BOTH
@pytest.mark.parametrize(("frame", "name", "code", "param"), BAD_FRAMES.values(), ids=BAD_FRAMES)
async def test_a_bad_frame_is_answered_with_its_id_and_the_socket_goes_on(
    site: Site, frame: Any, name: str | None, code: str, param: str
) -> None:
    async with socket(site.base_url) as page:
        await page.send(json.dumps(frame) if isinstance(frame, list) else frame)
        answer = await page.next()
        assert (answer["type"], answer["id"]) == ("error", name)
        assert (answer["error"]["code"], answer["error"]["param"]) == (code, param), answer
        await page.chat("a", exactly(1))
        await page.until("finished", "a")


@ON_DAPHNE
async def test_an_id_that_is_in_use_is_refused(site: Site) -> None:
    async with socket(site.base_url) as page:
        await page.chat("a", exactly(20))
        await page.chat("a", exactly(20))
        error = await page.until("error", "a")
        assert (error["error"]["code"], error["error"]["param"]) == ("invalid_request", "id")
        await page.until("finished", "a")


async def test_a_socket_has_a_limit_of_requests(closed_site: str, cookie: str) -> None:
    async with socket(closed_site, additional_headers={"Cookie": cookie}) as page:
        for at in range(LIMIT):
            await page.chat(f"{at}", exactly(LONG_ENOUGH))
        await page.chat("one more", exactly(1))
        error = await page.until("error")
        assert (error["id"], error["error"]["code"]) == ("one more", "overloaded")
        assert error["error"]["type"] == "rate_limit_error"
        await page.cancel("0")
        await page.until("cancelled", "0")
        await page.chat("one more", exactly(1))
        await page.until("finished", "one more")


# --- who may connect --------------------------------------------------------------------------------------------------


@ON_BOTH
@pytest.mark.parametrize("origin", ["https://evil.example", "null", None])
async def test_a_foreign_origin_is_refused(site: Site, origin: str | None) -> None:
    with pytest.raises(InvalidStatus) as raised:
        async with socket(site.base_url, origin=origin):
            pass
    assert raised.value.response.status_code == 403


async def test_a_closed_site_refuses_anonymous_sockets(closed_site: str) -> None:
    with pytest.raises(InvalidStatus) as raised:
        async with socket(closed_site):
            pass
    assert raised.value.response.status_code == 403


async def test_a_closed_site_refuses_a_made_up_session(closed_site: str) -> None:
    with pytest.raises(InvalidStatus):
        async with socket(closed_site, additional_headers={"Cookie": "sessionid=0123456789abcdefghijklmnopqrstuv"}):
            pass


async def test_a_closed_site_serves_a_logged_in_user(closed_site: str, cookie: str) -> None:
    async with socket(closed_site, additional_headers={"Cookie": cookie}) as page:
        await page.chat("a", exactly(1))
        await page.until("finished", "a")


async def test_a_session_does_not_help_a_foreign_origin(closed_site: str, cookie: str) -> None:
    with pytest.raises(InvalidStatus):
        async with socket(closed_site, origin="https://evil.example", additional_headers={"Cookie": cookie}):
            pass


@ON_BOTH
async def test_the_sub_protocol_is_chosen_when_it_is_offered(site: Site) -> None:
    async with socket(site.base_url, subprotocols=["other", "mlx-serving.v1"]) as page:
        assert page.connection.subprotocol == "mlx-serving.v1"
    async with socket(site.base_url, subprotocols=["other"]) as page:
        assert page.connection.subprotocol is None
    async with socket(site.base_url) as page:
        assert page.connection.subprotocol is None
