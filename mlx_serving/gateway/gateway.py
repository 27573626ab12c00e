"""The order of the stages, and the one entrance that HTTP, WebSocket and the Python API share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing

from inference.protocol import Delta, Failed, Finished

from .. import flags, metrics
from ..conf import settings
from ..errors import ServingError, from_failure
from .admission import Admission
from .call import Call, Events, Next, Stage
from .link import Link
from .routing import Routing


def _chain(stages: Sequence[Stage]) -> Next:
    """Return the function that sends a call through these stages, first to last."""

    def end(_call: Call) -> Events:
        raise LookupError("the last stage must answer by itself")

    proceed: Next = end
    for stage in reversed(stages):
        proceed = _bind(stage, proceed)
    return proceed


def _bind(stage: Stage, proceed: Next) -> Next:
    return lambda call: stage.stream(call, proceed)


class Gateway:
    """Sends calls through the stages."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = tuple(stages)
        self._enter = _chain(self._stages)

    async def stream(self, call: Call) -> Events:
        """Return the events of a call, ending with `Finished`.

        The caller closes the generator (`contextlib.aclosing`) when its client has gone; the request is then cancelled.

        Raises:
            ServingError: the request failed, before or after its first events.
        """
        await flags.arefresh()
        watch = metrics.RequestWatch()
        try:
            async with aclosing(self._enter(call)) as events:
                async for event in events:
                    if not watch.model and call.worker is not None:
                        watch.model = call.worker.model
                    if isinstance(event, Delta):
                        watch.delta(time.perf_counter(), len(event.token_ids))
                    elif isinstance(event, Finished):
                        watch.finished(event.usage)
                    elif isinstance(event, Failed):
                        raise from_failure(event, settings().RETRY_AFTER_S)
                    yield event
        except ServingError as error:
            watch.model = call.worker.model if call.worker is not None else ""
            watch.failed(error.code)
            raise
        finally:
            watch.close()


gateway = Gateway([Admission(), Routing(), Link()])
"""The process's gateway."""
