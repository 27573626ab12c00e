"""Every Prometheus metric of the app, declared once. Served at /metrics through django-prometheus.

Request metrics are counted in the process that serves the request. What happens inside workers is read from the
`Worker` rows when metrics are scraped, so every web process shows the same values for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from django.db import Error as DatabaseProblem
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from inference.protocol import BATCH_ROW_BUCKETS, Usage

from . import flags

logger = logging.getLogger(__name__)

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

requests = Counter(
    "mlx_requests", "Requests that have ended, by outcome: ok, cancelled or an error code.", ["model", "outcome"]
)
inflight = Gauge("mlx_requests_inflight", "Requests in flight in this process.", multiprocess_mode="livesum")
ttft = Histogram(
    "mlx_ttft_seconds", "Time from a request's arrival to its first token.", ["model"], buckets=_TTFT_BUCKETS
)
itl = Histogram("mlx_itl_seconds", "Time between two tokens of a request.", ["model"], buckets=_ITL_BUCKETS)
duration = Histogram(
    "mlx_request_seconds", "Time from a request's arrival to its end.", ["model"], buckets=_E2E_BUCKETS
)
prompt_tokens = Counter("mlx_prompt_tokens", "Prompt tokens of finished requests.", ["model"])
completion_tokens = Counter("mlx_completion_tokens", "Completion tokens of finished requests.", ["model"])
links_opened = Counter("mlx_links_opened", "Connections to workers that were opened.", ["model"])
link_requests = Counter(
    "mlx_link_requests", "Requests sent to workers, by whether their connection was shared.", ["model", "pooled"]
)
merged_deltas = Counter(
    "mlx_stream_merged_deltas", "Deltas merged in this process because their reader lagged.", ["model"]
)
deltas_sent = Counter("mlx_stream_chunks", "Chunks of completion text written to clients.", ["transport"])


class RequestWatch:
    """Measures one request. Its model is a label only once routing knows it, since clients may invent names."""

    __slots__ = ("_itl", "_last", "_outcome", "_started", "model")

    def __init__(self) -> None:
        self.model = ""
        self._started = time.perf_counter()
        self._last: float | None = None
        self._outcome = "cancelled"
        self._itl: Histogram | None = None
        inflight.inc()

    def delta(self, now: float, tokens: int) -> None:
        """Note a delta of `tokens` tokens at `now` seconds of the performance counter."""
        if self._last is None or self._itl is None:
            ttft.labels(self.model).observe(now - self._started)
            self._itl = itl.labels(self.model)
        elif tokens:
            self._itl.observe((now - self._last) / tokens)
        self._last = now

    def finished(self, usage: Usage) -> None:
        """Note that the request has succeeded."""
        self._outcome = "ok"
        prompt_tokens.labels(self.model).inc(usage.prompt_tokens)
        completion_tokens.labels(self.model).inc(usage.completion_tokens)

    def failed(self, code: str) -> None:
        """Note that the request has failed."""
        self._outcome = code

    def close(self) -> None:
        """Note that the request has ended; without `finished` or `failed` its client has gone."""
        inflight.dec()
        requests.labels(self.model, self._outcome).inc()
        duration.labels(self.model).observe(time.perf_counter() - self._started)


_WORKER_GAUGES = {
    "running": "Rows in the worker's batch.",
    "waiting": "Requests that wait for a place in the batch.",
    "kv_bytes": "Memory of the KV cache.",
    "memory_bytes": "Memory that mlx holds.",
    "step_ms": "Moving average of a decode step's time, in milliseconds.",
    "row_limit": "Rows that may run; adaptive batching lowers and raises it.",
    "prefix_bytes": "Memory of the KV that later prompts may begin with.",
    "cancel_steps_max": "Most decode steps that a row stayed in the batch after its cancel arrived.",
}
_CACHE_COUNTERS = {
    "mlx_cache_hits": ("prefix_hits_total", "Prompts that began with a known prefix."),
    "mlx_cache_misses": ("prefix_misses_total", "Prompts that did not."),
    "mlx_cache_hit_tokens": ("prefix_hit_tokens_total", "Prompt tokens that were not computed again."),
    "mlx_cache_evictions": ("prefix_evictions_total", "Entries that made room for others."),
}
_WORKER_COUNTERS = {
    "steps_total": "Decode steps.",
    "prompt_tokens_total": "Prompt tokens prefilled.",
    "generated_tokens_total": "Tokens generated.",
    "requests_total": "Requests that have ended.",
    "cancelled_total": "Requests that were cancelled.",
    "preempted_total": "Rows that left the batch for lack of memory and were resumed later.",
    "frames_total": "Frames sent to web processes.",
    "deltas_total": "Deltas produced.",
    "merged_deltas_total": "Deltas merged in the worker because their reader lagged.",
}


def batch_size_buckets(load: Mapping[str, Any]) -> tuple[list[tuple[str, float]], float]:
    """Return the cumulative buckets and the sum of the histogram of rows in a decode step.

    Args:
        load: a worker's `inference.protocol.Load` as a dictionary.
    """
    bounds = [*map(str, map(float, BATCH_ROW_BUCKETS)), "+Inf"]
    return list(zip(bounds, map(float, accumulate(load["batch_rows"])), strict=True)), float(load["batch_rows_sum"])


class FleetCollector(Collector):
    """Reads workers and flags when metrics are scraped."""

    def describe(self) -> Iterable[Metric]:
        """Return no descriptions, so that registering does not read the database."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return what the database says of workers now, and the flags in force."""
        yield from self._flags()
        try:
            yield from self._workers()
        except DatabaseProblem as error:
            logger.warning("workers could not be read for metrics: %s", type(error).__name__)

    def _flags(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("mlx_feature_flag", "Whether a feature flag is on.", labels=["flag"])
        for name, value in flags.values().items():
            family.add_metric([name], float(value.enabled))
        yield family

    def _workers(self) -> Iterable[Metric]:
        from .models import Worker

        active = GaugeMetricFamily("mlx_worker_active", "Workers by state.", labels=["model", "state"])
        gauges = {
            name: GaugeMetricFamily(f"mlx_worker_{name}", text, labels=["model", "worker"])
            for name, text in _WORKER_GAUGES.items()
        }
        counters = {
            name: CounterMetricFamily(f"mlx_worker_{name.removesuffix('_total')}", text, labels=["model", "worker"])
            for name, text in _WORKER_COUNTERS.items()
        }
        caches = {
            name: CounterMetricFamily(name, text, labels=["layer", "model", "worker"])
            for name, (_, text) in _CACHE_COUNTERS.items()
        }
        sizes = HistogramMetricFamily("mlx_batch_size", "Rows in a decode step.", labels=["model", "worker"])
        counts: dict[tuple[str, str], int] = {}
        rows = Worker.objects.exclude(state__in=(Worker.State.STOPPED, Worker.State.FAILED))
        families: list[tuple[str, GaugeMetricFamily | CounterMetricFamily]] = [*gauges.items(), *counters.items()]
        for worker_id, model, state, load in rows.values_list("pk", "model__name", "state", "load"):
            counts[model, state] = counts.get((model, state), 0) + 1
            for name, family in families:
                family.add_metric([model, worker_id], float(load.get(name, 0)))
            for name, (key, _) in _CACHE_COUNTERS.items():
                caches[name].add_metric(["prefix", model, worker_id], float(load.get(key, 0)))
            if load.get("batch_rows"):
                sizes.add_metric([model, worker_id], *batch_size_buckets(load))
        for (model, state), count in sorted(counts.items()):
            active.add_metric([model, state], count)
        yield active
        yield from gauges.values()
        yield from counters.values()
        yield from caches.values()
        yield sizes


def register_collectors() -> None:
    """Register the collector that reads the database. Called once, when the app is ready."""
    REGISTRY.register(FleetCollector())
