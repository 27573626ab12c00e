"""The stage that chooses the worker: the ready one of the model with the least to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing

from ..conf import settings
from ..errors import ModelNotFound, ModelNotReady
from ..fleet.registry import ModelView, Registry, WorkerView, registry
from .call import Call, Events, Next


def choose(workers: Sequence[WorkerView], outstanding: Mapping[str, int]) -> WorkerView | None:
    """Return the ready worker with the fewest outstanding requests, or None.

    Args:
        workers: the model's workers.
        outstanding: requests of this process by worker id. What other processes sent is in the worker's own numbers,
            which are up to a second old, so this process's requests count only beyond those.
    """
    ready = [worker for worker in workers if worker.state == "ready"]

    def busy(worker: WorkerView) -> tuple[int, str]:
        return max(outstanding.get(worker.worker_id, 0), worker.running + worker.waiting), worker.worker_id

    return min(ready, key=busy, default=None)


class Routing:
    """Sets the call's worker."""

    def __init__(self, source: Registry = registry) -> None:
        self._registry = source
        self._outstanding: Counter[str] = Counter()

    async def stream(self, call: Call, proceed: Next) -> Events:
        """Pass the call on with its worker.

        Raises:
            ModelNotFound: no such model.
            ModelNotReady: the model has no ready worker.
        """
        models = await self._registry.models()
        model = models.get(call.request.model)
        if model is None:
            raise ModelNotFound(f"the model {call.request.model!r} does not exist here", param="model")
        worker = choose(model.workers, self._outstanding)
        if worker is None:
            raise ModelNotReady(_why(model), param="model", retry_after_s=settings().RETRY_AFTER_S)
        call.worker = worker
        call.notes["X-MLX-Worker"] = worker.worker_id
        self._outstanding[worker.worker_id] += 1
        try:
            async with aclosing(proceed(call)) as events:
                async for event in events:
                    yield event
        finally:
            self._outstanding[worker.worker_id] -= 1
            if not self._outstanding[worker.worker_id]:
                del self._outstanding[worker.worker_id]


def _why(model: ModelView) -> str:
    if not model.wanted:
        return f"the model {model.name!r} is switched off"
    states = sorted({worker.state for worker in model.workers})
    return f"the model {model.name!r} is not ready" + (f" ({', '.join(states)})" if states else " (no worker runs)")
