"""The WebSocket: chat requests, several at once on one socket, each of which can be cancelled.

Frames are JSON text. From the client: `{"type": "chat", "id": ..., "request": {...}}`, where the request is the body
of POST /v1/chat/completions, and `{"type": "cancel", "id": ...}`. To the client: `accepted`, `delta`, `finished`,
`cancelled` and `error`, each with the id that the client chose.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from channels.exceptions import StopConsumer
from channels.generic.websocket import AsyncWebsocketConsumer
from msgspec import Meta

from inference.protocol import Accepted, Delta, Finished

from .. import metrics
from ..conf import settings
from ..errors import AuthenticationRequired, BodyTooLarge, InvalidRequest, Overloaded, ServingError
from ..gateway import Call, gateway
from .auth import client_of_scope
from .body import parse
from .chat import new_request_id
from .chat_format import tool_call_object, usage_object
from .errors import error_body, unexpected
from .schemas import ChatCompletionRequest, to_generation_request

SUBPROTOCOL = "mlx-serving.v1"
CLOSE_UNAUTHENTICATED = 4401

_encode = msgspec.json.encode
ClientId = Annotated[str, Meta(min_length=1, max_length=100)]


class ChatFrame(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="chat"):
    """Start a request."""

    id: ClientId
    request: ChatCompletionRequest


class CancelFrame(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cancel"):
    """Stop a request; answered by `cancelled` unless it has ended already."""

    id: ClientId


_decoder = msgspec.json.Decoder(ChatFrame | CancelFrame)


class _IdOnly(msgspec.Struct):
    id: ClientId | None = None


class ChatConsumer(AsyncWebsocketConsumer):
    """One socket."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._client = ""
        self._running: dict[str, asyncio.Task[None]] = {}

    async def connect(self) -> None:
        """Accept the socket, or refuse it when its sender may not use the API."""
        try:
            self._client = client_of_scope(self.scope)
        except AuthenticationRequired:
            await self.close(code=CLOSE_UNAUTHENTICATED)
            return
        offered = self.scope.get("subprotocols") or []
        await self.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)

    async def disconnect(self, code: int) -> None:
        """Stop what runs: nobody will read it."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Take a frame. Requests run in tasks of their own, so that a long one does not block the socket."""
        try:
            frame = self._parse(text_data)
            if isinstance(frame, ChatFrame):
                self._start(frame)
            elif (task := self._running.get(frame.id)) is not None:
                task.cancel()
        except ServingError as error:
            await self._send({"type": "error", "id": _id_of(text_data), "error": error_body(error)})

    @staticmethod
    def _parse(text_data: str | None) -> ChatFrame | CancelFrame:
        if text_data is None:
            raise InvalidRequest("frames must be text", param="body")
        limit = settings().MAX_BODY_BYTES
        if len(text_data) > limit:
            raise BodyTooLarge(f"the frame is longer than {limit} bytes", param="body")
        try:
            return parse(text_data, _decoder)
        except InvalidRequest as error:
            # Fields of the request are named as over HTTP, whatever they are wrapped in.
            error.param = (error.param or "").removeprefix("request.") or None
            raise

    def _start(self, frame: ChatFrame) -> None:
        if frame.id in self._running:
            raise InvalidRequest("a request with this id is running on this socket", param="id")
        limit = settings().MAX_REQUESTS_PER_SOCKET
        if len(self._running) >= limit:
            raise Overloaded(
                f"this socket has {limit} requests in flight already", retry_after_s=settings().RETRY_AFTER_S
            )
        if frame.request.stream is False or frame.request.stream_options is not None:
            raise InvalidRequest("a socket always streams, usage included", param="stream")
        task = asyncio.create_task(self._run(frame))
        self._running[frame.id] = task
        task.add_done_callback(lambda _: self._running.pop(frame.id, None))

    async def _run(self, frame: ChatFrame) -> None:
        try:
            await self._stream(frame)
        except asyncio.CancelledError:
            await self._send({"type": "cancelled", "id": frame.id})
        except ServingError as error:
            await self._send({"type": "error", "id": frame.id, "error": error_body(error)})
        except Exception as error:
            await self._send({"type": "error", "id": frame.id, "error": error_body(unexpected(error))})

    async def _stream(self, frame: ChatFrame) -> None:
        generation = to_generation_request(frame.request, new_request_id(), settings().DEFAULT_MODEL)
        call = Call(generation, self._client, settings().REQUEST_TIMEOUT_S)
        sent = metrics.deltas_sent.labels("websocket")
        async with aclosing(gateway.stream(call)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    sent.inc()
                    await self._send(_delta_frame(frame.id, event))
                elif isinstance(event, Accepted):
                    await self._send(
                        {
                            "type": "accepted",
                            "id": frame.id,
                            "request_id": generation.request_id,
                            "model": generation.model,
                            "prompt_tokens": event.prompt_tokens,
                        }
                    )
                elif isinstance(event, Finished):
                    await self._send({"type": "finished", "id": frame.id, "usage": usage_object(event.usage)})

    async def _send(self, frame: dict[str, Any]) -> None:
        # The socket may have gone while a task was on its way here.
        try:
            await self.send(text_data=_encode(frame).decode())
        except (RuntimeError, StopConsumer):
            return


def _delta_frame(client_id: str, delta: Delta) -> dict[str, Any]:
    frame: dict[str, Any] = {
        "type": "delta",
        "id": client_id,
        "seq": delta.seq,
        "index": delta.index,
        "text": delta.text,
        "finish_reason": delta.finish_reason,
    }
    if delta.tool_calls:
        frame["tool_calls"] = [{"index": call.index, **tool_call_object(call)} for call in delta.tool_calls]
    return frame


def _id_of(text_data: str | None) -> str | None:
    """Return the id of a frame that is otherwise not understood, where it has one."""
    try:
        return msgspec.json.decode(text_data or "", type=_IdOnly).id
    except (msgspec.DecodeError, RecursionError):
        return None
