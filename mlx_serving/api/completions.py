"""POST /v1/completions, streaming and not: text without a chat template, one prompt or several."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.views.decorators.csrf import csrf_exempt

from inference.protocol import Accepted, Delta, GenerationRequest, RequestEvent

from .. import metrics
from ..conf import settings
from ..errors import EngineError, MethodNotAllowed, ServingError
from ..gateway import Call, gateway
from .auth import client_of
from .body import parse, read_body
from .completion_format import CompletionFormatter, WholeCompletion
from .completion_schemas import completion_decoder, to_generation_requests
from .errors import answers_errors, unexpected
from .sse import event_stream

NumberedEvents = AsyncGenerator[tuple[int, RequestEvent], None]

_QUEUE_EVENTS = 64


async def together(calls: Sequence[Call]) -> NumberedEvents:
    """Return the events of several calls as they come, each with the number of its call.

    The first failure of any of them ends all.

    Raises:
        ServingError: one of the calls failed.
    """
    events: asyncio.Queue[tuple[int, RequestEvent | None]] = asyncio.Queue(_QUEUE_EVENTS)

    async def forward(number: int, call: Call) -> None:
        async with aclosing(gateway.stream(call)) as stream:
            async for event in stream:
                await events.put((number, event))
        await events.put((number, None))

    tasks = [asyncio.create_task(forward(number, call)) for number, call in enumerate(calls)]
    failed = asyncio.create_task(asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION))
    try:
        left = len(tasks)
        while left:
            getting = asyncio.create_task(events.get())
            await asyncio.wait((getting, failed), return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                for task in tasks:
                    if task.done():
                        task.result()
                raise EngineError("a prompt ended without its last event")
            number, event = getting.result()
            if event is None:
                left -= 1
            else:
                yield number, event
    finally:
        failed.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, failed, return_exceptions=True)


# Not exempt for logged-in users: `client_of` runs Django's CSRF check on every request that carries a session.
@csrf_exempt
@answers_errors
async def completions(request: HttpRequest) -> HttpResponseBase:
    """Answer a completion request."""
    if request.method != "POST":
        raise MethodNotAllowed("POST")
    client = await client_of(request)
    body = parse(read_body(request, settings().MAX_BODY_BYTES), completion_decoder)
    request_id = f"cmpl-{secrets.token_hex(12)}"
    generations = to_generation_requests(body, request_id, settings().DEFAULT_MODEL)
    calls = [Call(generation, client, settings().REQUEST_TIMEOUT_S) for generation in generations]
    created = int(time.time())
    response: HttpResponseBase
    if body.stream:
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        first = generations[0]
        formatter = CompletionFormatter(request_id, first.model, created, first.n, include_usage=include_usage)
        events = together(calls)
        try:
            held = await _all_accepted(events, len(calls))
        except BaseException:
            await events.aclose()
            raise
        response = event_stream(_chunks(held, events, formatter))
    else:
        answer = await _whole(calls, generations, request_id, created)
        response = HttpResponse(answer, content_type="application/json")
    response["X-Request-Id"] = request_id
    for name, value in calls[0].notes.items():
        response[name] = value
    return response


async def _all_accepted(events: NumberedEvents, calls: int) -> list[tuple[int, RequestEvent]]:
    """Return the events up to the one by which every prompt is accepted, so that refusals become HTTP answers."""
    held: list[tuple[int, RequestEvent]] = []
    accepted = 0
    async for number, event in events:
        held.append((number, event))
        accepted += isinstance(event, Accepted)
        if accepted == calls:
            return held
    raise EngineError("the worker did not accept the request")


async def _whole(
    calls: Sequence[Call], generations: Sequence[GenerationRequest], request_id: str, created: int
) -> bytes:
    first = generations[0]
    answer = WholeCompletion(len(calls), first.n)
    async with aclosing(together(calls)) as events:
        async for number, event in events:
            answer.add(number, event)
    return answer.encode(request_id, first.model, created, logprobs=first.logprobs is not None)


async def _chunks(
    held: Sequence[tuple[int, RequestEvent]], events: NumberedEvents, formatter: CompletionFormatter
) -> AsyncGenerator[bytes, None]:
    """Return the stream's bytes; closed by Django when the client has gone, which cancels the request."""
    sent = metrics.deltas_sent.labels("sse")
    async with aclosing(events):
        try:
            for number, event in held:
                if chunk := formatter.event(number, event):
                    yield chunk
            async for number, event in events:
                if chunk := formatter.event(number, event):
                    sent.inc(isinstance(event, Delta))
                    yield chunk
            yield formatter.finish()
        except ServingError as error:
            yield formatter.error(error)
        except Exception as error:
            yield formatter.error(unexpected(error))
