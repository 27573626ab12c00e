"""POST /v1/chat/completions, streaming and not."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.views.decorators.csrf import csrf_exempt

from inference.protocol import Accepted, Delta, Finished, GenerationRequest, RequestEvent

from .. import metrics
from ..conf import settings
from ..errors import EngineError, MethodNotAllowed, ServingError
from ..gateway import Call, gateway
from .auth import client_of
from .body import parse, read_body
from .chat_format import ChunkFormatter, WholeAnswer
from .errors import answers_errors, unexpected
from .schemas import chat_decoder, to_generation_request
from .sse import event_stream

Events = AsyncGenerator[RequestEvent, None]


def new_request_id() -> str:
    """Return an unguessable id in OpenAI's form."""
    return f"chatcmpl-{secrets.token_hex(12)}"


async def first_event(events: Events) -> Accepted:
    """Return the event that says the request is valid and queued, so that refusals become proper HTTP answers.

    Raises:
        ServingError: the request was refused.
    """
    async for event in events:
        if isinstance(event, Accepted):
            return event
    raise EngineError("the worker did not accept the request")


# Not exempt for logged-in users: `client_of` runs Django's CSRF check on every request that carries a session.
@csrf_exempt
@answers_errors
async def chat_completions(request: HttpRequest) -> HttpResponseBase:
    """Answer a chat completion request."""
    if request.method != "POST":
        raise MethodNotAllowed("POST")
    client = await client_of(request)
    body = parse(read_body(request, settings().MAX_BODY_BYTES), chat_decoder)
    generation = to_generation_request(body, new_request_id(), settings().DEFAULT_MODEL)
    call = Call(generation, client, settings().REQUEST_TIMEOUT_S)
    created = int(time.time())
    response: HttpResponseBase
    if body.stream:
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        formatter = ChunkFormatter(
            generation.request_id, generation.model, created, generation.n, include_usage=include_usage
        )
        events = gateway.stream(call)
        try:
            await first_event(events)
        except BaseException:
            await events.aclose()
            raise
        response = event_stream(_chunks(events, formatter))
    else:
        response = HttpResponse(await _whole(call, generation, created), content_type="application/json")
    response["X-Request-Id"] = generation.request_id
    for name, value in call.notes.items():
        response[name] = value
    return response


async def _whole(call: Call, generation: GenerationRequest, created: int) -> bytes:
    answer = WholeAnswer(generation.n)
    async with aclosing(gateway.stream(call)) as events:
        async for event in events:
            answer.add(event)
    return answer.encode(generation.request_id, generation.model, created)


async def _chunks(events: Events, formatter: ChunkFormatter) -> AsyncGenerator[bytes, None]:
    """Return the stream's bytes; closed by Django when the client has gone, which cancels the request."""
    sent = metrics.deltas_sent.labels("sse")
    async with aclosing(events):
        yield formatter.start()
        try:
            async for event in events:
                if isinstance(event, Delta):
                    if chunk := formatter.delta(event):
                        sent.inc()
                        yield chunk
                elif isinstance(event, Finished):
                    yield formatter.finish(event)
        except ServingError as error:
            yield formatter.error(error)
        except Exception as error:
            yield formatter.error(unexpected(error))
