"""What travels through the stages: a request, who sent it, and what the stages decided about it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from inference.protocol import GenerationRequest, RequestEvent

from ..fleet.registry import WorkerView

Events: TypeAlias = AsyncGenerator[RequestEvent, None]


@dataclass(slots=True)
class Call:
    """One request on its way.

    Attributes:
        request: what to generate.
        client: who asks, such as `user:7` or `anonymous:127.0.0.1`; admission counts by it.
        timeout_s: longest time until the last event.
        worker: set by routing.
        notes: what the stages have to tell the client, by response header.
    """

    request: GenerationRequest
    client: str
    timeout_s: float
    worker: WorkerView | None = None
    notes: dict[str, str] = field(default_factory=dict)


Next: TypeAlias = Callable[[Call], Events]


class Stage(Protocol):
    """One station. It passes the call on to `proceed`, or answers by itself, or raises a `ServingError`."""

    def stream(self, call: Call, proceed: Next) -> Events:
        """Return the events of a call."""
        ...
