"""What the tests of the API share: requests in short, streams taken apart, counters, and clients that are logged in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import websockets
from prometheus_client.parser import text_string_to_metric_families

from tests.system.deployments import DEMO_MODEL, PATIENCE_S, POLL_S, Deployment

COMPLETIONS = "/v1/chat/completions"
SOCKET = "/ws/chat/"
USER = "caller"
PASSWORD = "correct horse battery staple"

ON_DAPHNE = pytest.mark.parametrize("server_kind", ["daphne"], indirect=True)
ON_BOTH = pytest.mark.parametrize("server_kind", ["daphne", "uvicorn"], indirect=True)
"""Marks: which web servers a test runs against, each of them started once for the session."""

LONG_ENOUGH = 6000
"""Tokens that nothing in these tests waits for: a request of this length runs until something ends it."""


def chat(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    """Return the body of a request, greedy unless it says otherwise."""
    return {"model": DEMO_MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


def exactly(tokens: int, text: str = "Write a long guide to operating mlx-serving", **fields: Any) -> dict[str, Any]:
    """Return the body of a request for a number of tokens, whatever the model has to say."""
    return chat(text, ignore_eos=True, max_tokens=tokens, **fields)


def split_usage(usage: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Return what a usage object counts, and how much of the prompt was cached."""
    counts = {name: value for name, value in usage.items() if isinstance(value, int)}
    return counts, usage["prompt_tokens_details"]["cached_tokens"]


@dataclass
class Answer:
    """What a client got: the text of each choice, why it ended, the usage, and the error that ended it all."""

    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, int] | None = None
    """Tokens of prompt, completion and both."""
    cached_tokens: int | None = field(default=None, compare=False)
    """How much of the prompt was known, which depends on what ran before."""
    error: dict[str, Any] | None = None
    chunks: int = 0
    """Those that hold text."""
    done: bool = False
    """Whether the stream said so."""

    @property
    def text(self) -> str:
        assert self.error is None, self.error
        assert set(self.texts) <= {0}
        return self.texts[0]

    def take_usage(self, usage: dict[str, Any]) -> None:
        """Take the usage object, in two parts."""
        self.usage, self.cached_tokens = split_usage(usage)

    def add(self, line: str) -> None:
        """Take a line of a stream of server-sent events."""
        if not line:
            return
        assert line.startswith("data: "), line
        assert not self.done, f"after the end: {line}"
        if line == "data: [DONE]":
            self.done = True
            return
        chunk = json.loads(line.removeprefix("data: "))
        self.error = chunk.get("error")
        if usage := chunk.get("usage"):
            self.take_usage(usage)
        for choice in chunk.get("choices", ()):
            if text := choice["delta"].get("content"):
                self.chunks += 1
                self.texts[choice["index"]] += text
            if choice["finish_reason"]:
                assert choice["index"] not in self.reasons
                self.reasons[choice["index"]] = choice["finish_reason"]


async def stream(client: httpx.AsyncClient, body: dict[str, Any], on_text: Callable[[], None] = lambda: None) -> Answer:
    """Return the whole of a stream; `on_text` is called whenever text has come."""
    answer = Answer()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", COMPLETIONS, json=body) as response:
        if response.status_code != 200:
            await response.aread()
            answer.error = response.json()["error"]
            return answer
        async for line in response.aiter_lines():
            before = answer.chunks
            answer.add(line)
            if answer.chunks > before:
                on_text()
    return answer


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Return an answer that comes as a whole."""
    response = await client.post(COMPLETIONS, json=body)
    got = response.json()
    if response.status_code != 200:
        return Answer(error=got["error"])
    answer = Answer()
    answer.take_usage(got["usage"])
    for choice in got["choices"]:
        answer.texts[choice["index"]] = choice["message"]["content"] or ""
        answer.reasons[choice["index"]] = choice["finish_reason"]
    return answer


@contextlib.asynccontextmanager
async def http(base_url: str, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client without limits of its own."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S, limits=limits, **options) as client:
        yield client


def metrics(base_url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return every sample of /metrics by name and labels."""
    with urllib.request.urlopen(f"{base_url}/metrics", timeout=PATIENCE_S) as response:
        text = response.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def metric(base_url: str, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels."""
    return sum(
        value
        for (sample, has), value in metrics(base_url).items()
        if sample == name and labels.items() <= dict(has).items()
    )


async def until(look: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """As `wait_for`, but other tasks go on meanwhile. `look` may be asynchronous."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain for {what}"
        await asyncio.sleep(POLL_S)


def load(deployment: Deployment) -> dict[str, Any]:
    """Return the load of the only ready worker, as its supervisor last saw it."""
    (worker,) = deployment.workers("ready", model=DEMO_MODEL)
    return json.loads(worker["load"])


def wait_until_idle(deployment: Deployment) -> dict[str, Any]:
    """Wait until the worker has nothing to do, and return its load."""

    def look() -> dict[str, Any] | None:
        if len(deployment.workers("ready", model=DEMO_MODEL)) != 1:
            return None
        now = load(deployment)
        return now if now["running"] == now["waiting"] == 0 else None

    return deployment.wait_for(look, "an idle worker")


def socket_url(base_url: str) -> str:
    return base_url.replace("http", "ws", 1) + SOCKET


@contextlib.asynccontextmanager
async def socket(base_url: str, **options: Any) -> AsyncIterator[Socket]:
    """An open WebSocket of a page of this site."""
    async with websockets.connect(
        socket_url(base_url), **{"origin": base_url, "max_size": None, "open_timeout": PATIENCE_S, **options}
    ) as connection:
        yield Socket(connection)


@dataclass
class Socket:
    """One WebSocket, in the words of its frames."""

    connection: websockets.ClientConnection
    seen: list[dict[str, Any]] = field(default_factory=list)
    """All frames so far."""

    async def chat(self, name: str, body: dict[str, Any]) -> None:
        await self.send({"type": "chat", "id": name, "request": body})

    async def cancel(self, name: str) -> None:
        await self.send({"type": "cancel", "id": name})

    async def send(self, frame: dict[str, Any] | str | bytes) -> None:
        await self.connection.send(json.dumps(frame) if isinstance(frame, dict) else frame)

    async def next(self) -> dict[str, Any]:
        frame = json.loads(await asyncio.wait_for(self.connection.recv(), PATIENCE_S))
        self.seen.append(frame)
        return frame

    async def until(self, kind: str, name: str | None = None) -> dict[str, Any]:
        """Return the next frame of a kind, of any request or of one."""
        while (frame := await self.next())["type"] != kind or name not in (None, frame["id"]):
            pass
        return frame

    async def all_of(self, names: Iterable[str]) -> None:
        """Read until each of these requests has ended, in whichever way."""
        left = set(names)
        while left:
            frame = await self.next()
            if frame["type"] in ("finished", "cancelled", "error"):
                left.discard(frame["id"])

    def text(self, name: str) -> str:
        return "".join(frame["text"] for frame in self.seen if frame["type"] == "delta" and frame["id"] == name)

    def kinds(self, name: str) -> list[str]:
        """Return the kinds of a request's frames, in order, a run of deltas as one."""
        kinds: list[str] = []
        for frame in self.seen:
            if frame["id"] == name and (frame["type"] != "delta" or kinds[-1:] != ["delta"]):
                kinds.append(frame["type"])
        return kinds


@contextlib.contextmanager
def logged_in(base_url: str, deployment: Deployment) -> Iterator[httpx.Client]:
    """A client with a session of its own of the user `USER`, logged in through the admin's page."""
    if not deployment.rows("SELECT id FROM auth_user WHERE username = ?", USER):
        arguments = ["createsuperuser", "--noinput", "--username", USER, "--email", f"{USER}@example.org"]
        deployment.manage(*arguments, DJANGO_SUPERUSER_PASSWORD=PASSWORD)
    with httpx.Client(base_url=base_url, timeout=PATIENCE_S) as client:
        client.get("/admin/login/").raise_for_status()
        form = {"username": USER, "password": PASSWORD, "csrfmiddlewaretoken": client.cookies["csrftoken"]}
        page = client.post("/admin/login/?next=/admin/", data=form, headers={"Referer": base_url})
        assert page.status_code == 302, page.text
        yield client
