"""From the traces of a run to its numbers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from .records import Trace


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly between the two nearest values; 0 for no values."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Spread:
    """Three percentiles, in milliseconds."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values_s: Sequence[float]) -> Spread:
        """Return the percentiles of values in seconds."""
        p50, p95, p99 = (percentile(values_s, percent) * 1000 for percent in (50, 95, 99))
        return cls(p50, p95, p99)

    @classmethod
    def median_of(cls, spreads: Sequence[Spread]) -> Spread:
        """Return the median of each percentile over several runs."""
        return cls(median(s.p50 for s in spreads), median(s.p95 for s in spreads), median(s.p99 for s in spreads))


@dataclass(frozen=True, slots=True)
class Summary:
    """The numbers of one run, or the medians of several.

    Attributes:
        tokens_per_s: generated tokens of all requests, from the first request's start to the last one's end.
        ttft: time from sending a request until its first visible output.
        itl: time between two pieces of visible output of one request.
        request_s: median time of a whole request, in seconds.
        prompt_tokens: mean tokens of a prompt.
        pieces_per_token: below 1 where tokens have no text of their own or arrive merged.
        errors: requests that failed.
    """

    requests: int
    errors: int
    tokens: int
    wall_s: float
    tokens_per_s: float
    ttft: Spread
    itl: Spread
    request_s: float
    prompt_tokens: float
    pieces_per_token: float


def summarise(traces: Sequence[Trace]) -> Summary:
    """Return the numbers of one run; failed requests count in `errors` alone."""
    good = [trace for trace in traces if not trace.error]
    tokens = sum(trace.tokens for trace in good)
    wall_s = max((t.ended for t in traces), default=0.0) - min((t.started for t in traces), default=0.0)
    return Summary(
        requests=len(traces),
        errors=len(traces) - len(good),
        tokens=tokens,
        wall_s=wall_s,
        tokens_per_s=tokens / wall_s if wall_s else 0.0,
        ttft=Spread.of([trace.arrivals[0] - trace.started for trace in good if trace.arrivals]),
        itl=Spread.of([after - before for trace in good for before, after in pairwise(trace.arrivals)]),
        request_s=percentile([trace.ended - trace.started for trace in good], 50),
        prompt_tokens=sum(trace.prompt_tokens for trace in good) / len(good) if good else 0.0,
        pieces_per_token=sum(len(trace.arrivals) for trace in good) / tokens if tokens else 0.0,
    )


def median_summary(runs: Sequence[Summary]) -> Summary:
    """Return the medians of several runs; requests, errors and tokens are sums."""
    return Summary(
        requests=sum(run.requests for run in runs),
        errors=sum(run.errors for run in runs),
        tokens=sum(run.tokens for run in runs),
        wall_s=median(run.wall_s for run in runs),
        tokens_per_s=median(run.tokens_per_s for run in runs),
        ttft=Spread.median_of([run.ttft for run in runs]),
        itl=Spread.median_of([run.itl for run in runs]),
        request_s=median(run.request_s for run in runs),
        prompt_tokens=median(run.prompt_tokens for run in runs),
        pieces_per_token=median(run.pieces_per_token for run in runs),
    )


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios of runs that were made one after the other."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True) if other]
    return median(ratios) if ratios else 0.0


def same_texts(first: Sequence[Trace], second: Sequence[Trace]) -> float:
    """Return the share of requests that got the same text in two runs of the same prompts in the same order."""
    pairs = list(zip(first, second, strict=True))
    return sum(a.text == b.text for a, b in pairs) / len(pairs) if pairs else 0.0
