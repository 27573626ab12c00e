"""The first stage: how many requests may be in flight, in this process and for one client."""

from __future__ import annotations

from collections import Counter
from contextlib import aclosing

from ..conf import settings
from ..errors import Overloaded
from .call import Call, Events, Next


class Admission:
    """Counts requests in flight and refuses those beyond the limits at once, so that no queue grows without bound."""

    def __init__(self) -> None:
        self.total = 0
        self._by_client: Counter[str] = Counter()

    async def stream(self, call: Call, proceed: Next) -> Events:
        """Pass the call on, counted.

        Raises:
            Overloaded: a limit is reached.
        """
        self._check(call.client)
        self.total += 1
        self._by_client[call.client] += 1
        try:
            async with aclosing(proceed(call)) as events:
                async for event in events:
                    yield event
        finally:
            self.total -= 1
            self._by_client[call.client] -= 1
            if not self._by_client[call.client]:
                del self._by_client[call.client]

    def _check(self, client: str) -> None:
        limits = settings()
        if self.total >= limits.MAX_INFLIGHT:
            reason = f"this server has {limits.MAX_INFLIGHT} requests in flight already"
        elif self._by_client[client] >= limits.MAX_INFLIGHT_PER_CLIENT:
            reason = f"you have {limits.MAX_INFLIGHT_PER_CLIENT} requests in flight already"
        else:
            return
        raise Overloaded(f"{reason}; try again in a moment", retry_after_s=limits.RETRY_AFTER_S)
