"""The last stage: the connection to the worker, one for all requests of this process and event loop.

Connections are opened on first use, kept, shared and replaced when they break. With the flag `connection_pool` off
every request opens one of its own and closes it again.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from inference.protocol import Failed, ProtocolError

from .. import flags, metrics
from ..conf import settings
from ..errors import WorkerLost
from ..fleet.connection import WorkerConnection
from ..fleet.registry import Registry, WorkerView, registry
from .call import Call, Events, Next

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class LinkPool:
    """The open connections of one event loop, by worker."""

    def __init__(self) -> None:
        self._links: dict[str, WorkerConnection] = {}
        self._opening: dict[str, asyncio.Lock] = {}

    async def get(self, worker: WorkerView) -> WorkerConnection:
        """Return the connection to a worker, opened if there is none.

        Raises:
            OSError, TimeoutError, ProtocolError: it cannot be opened.
        """
        lock = self._opening.setdefault(worker.worker_id, asyncio.Lock())
        async with lock:
            link = self._links.get(worker.worker_id)
            if link is None or link.closed.is_set():
                self._drop_closed()
                link = await connect(worker)
                self._links[worker.worker_id] = link
                self._opening[worker.worker_id] = lock
        return link

    def _drop_closed(self) -> None:
        gone = [worker_id for worker_id, link in self._links.items() if link.closed.is_set()]
        for worker_id in gone:
            del self._links[worker_id]
            if not self._opening[worker_id].locked():
                del self._opening[worker_id]


async def connect(worker: WorkerView) -> WorkerConnection:
    """Open a connection to a worker.

    Raises:
        OSError, TimeoutError, ProtocolError: it cannot be opened.
    """
    link = await WorkerConnection.open(
        worker.endpoint, peer=f"web:{os.getpid()}", timeout_s=settings().CONNECT_TIMEOUT_S
    )
    metrics.links_opened.labels(worker.model).inc()
    return link


class Link:
    """Sends the call to its worker and returns the worker's events."""

    def __init__(self, source: Registry = registry) -> None:
        self._registry = source
        self._pools: WeakKeyDictionary[asyncio.AbstractEventLoop, LinkPool] = WeakKeyDictionary()

    async def stream(self, call: Call, _proceed: Next) -> Events:
        """Return the events of the worker.

        Raises:
            WorkerLost: the worker cannot be reached.
        """
        worker = call.worker
        if worker is None:
            raise WorkerLost("the request was not routed")
        async with self._link(worker) as link:
            stream = link.submit(call.request, merge=flags.enabled("optimized_streaming"))
            too_late = Failed(
                call.request.request_id, "request_timeout", f"the request took longer than {call.timeout_s:g} s"
            )
            timer = asyncio.get_running_loop().call_later(call.timeout_s, stream.fail, too_late)
            try:
                async for event in stream:
                    if isinstance(event, Failed) and event.code == "worker_lost":
                        self._registry.suspect(worker.worker_id)
                    yield event
            finally:
                timer.cancel()
                stream.cancel()
                if stream.merged_total:
                    metrics.merged_deltas.labels(worker.model).inc(stream.merged_total)

    @asynccontextmanager
    async def _link(self, worker: WorkerView) -> AsyncIterator[WorkerConnection]:
        pooled = flags.enabled("connection_pool")
        metrics.link_requests.labels(worker.model, "yes" if pooled else "no").inc()
        try:
            if pooled:
                pool = self._pools.setdefault(asyncio.get_running_loop(), LinkPool())
                link = await pool.get(worker)
            else:
                link = await connect(worker)
        except (OSError, TimeoutError, ProtocolError) as error:
            self._registry.suspect(worker.worker_id)
            message = f"the worker cannot be reached: {type(error).__name__}"
            raise WorkerLost(message, retry_after_s=settings().RETRY_AFTER_S) from error
        try:
            yield link
        finally:
            if not pooled:
                await link.close()
