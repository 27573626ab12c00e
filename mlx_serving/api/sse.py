"""The HTTP answer that carries a stream of server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator

from django.http import StreamingHttpResponse


def event_stream(chunks: AsyncIterator[bytes]) -> StreamingHttpResponse:
    """Return the answer for a stream of encoded events, which nothing on the way is to hold back."""
    response = StreamingHttpResponse(chunks, content_type="text/event-stream")
    response["Cache-Control"] = "no-cache"
    # Proxies that buffer would hold tokens back.
    response["X-Accel-Buffering"] = "no"
    return response
