"""Which architectures of mlx-lm batch rightly, and whose KV can be reused: `python -m benchmarks.architectures`.

Every architecture is built small with random weights (`benchmarks.small_configs`) and examined on the CPU in a process
of its own with a time limit. What counts as right is what mlx-lm computes for one row, with the prompt in one piece.
Rows of a batch, prompts in chunks, and KV that was copied or cut back have to give the same logits and greedy tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.small_configs import VOCAB, WINDOW, build, names
from benchmarks.table import render
from inference import compat
from inference.batch import Prefill, compact_order
from inference.engine import Engine, EngineOptions, PreparedRequest
from inference.kv import SlotBatch
from inference.loading import LoadedModel
from inference.protocol import (
    Configure,
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Load,
    ModelInfo,
    SamplingParams,
)
from inference.scheduler import Limits
from inference.selfcheck import check

_TOLERANCE = 1e-3
"""Largest difference of a logit that counts as rounding, relative to the largest logit."""
_CHUNK = WINDOW
_GREEDY = SamplingParams(temperature=0)


_REPORT = """\
# Architectures

Every text architecture of mlx-lm {mlx_lm}, built small with random float32 weights and run with mlx {mlx} on the CPU.
Written by `python -m benchmarks.architectures --markdown FILE`.

- {count} architectures. {run} can be built and run here; {right} of them give every request the tokens that it gets
  alone.
- As the self-check at load time decides, {batches} run in batches, {apart} in batches whose prompts are prefilled one
  by one, and {single} one request at a time. Where it decides otherwise than this table: {misjudged}.
- Right in batches thanks to `inference/compat.py`: {fixed}.
- mlx-lm itself computes something else with KV than without: {unlike}.

*Batch*: rows of unequal lengths, prefilled together, joining and leaving, have the logits and greedy tokens that each
has alone; with mlx-lm's model as it is, and after `compat`. *Right*: the engine's tokens in the mode it is served in.
*Chunks*: a prompt in several pieces computes what it computes in one. *Copied*: a copy of a prefix's KV can be
continued. *Cut back*: KV can be trimmed to a shorter prefix.

{table}

## Not run

{failures}
"""


@dataclass(slots=True)
class Row:
    """What was found out about one architecture. A text that is neither `yes` nor a measure says what went wrong."""

    name: str
    failure: str = ""
    """Why it could not be built or run; all else is empty then."""
    caches: str = ""
    cached: str = ""
    """Whether one row with KV computes what it computes without."""
    chunks: str = ""
    """Whether a prompt in chunks computes what it computes in one piece."""
    mlx_batch: str = ""
    """Whether a batch is right with mlx-lm's model as it is."""
    batch: str = ""
    """Whether it is right after `inference.compat`."""
    unpadded: str = ""
    """Whether it is right when every prompt is prefilled by itself."""
    mode: str = ""
    """What the self-check chose: `batches`, `batches, prompts apart` or `one at a time`."""
    misjudged: str = ""
    """Where the self-check chose otherwise than what was found here."""
    served: str = ""
    """Whether the engine in that mode gives every request the tokens that it gets alone."""
    exclusive: str = ""
    """The same, one request at a time."""
    extend: str = ""
    """Whether a copy of a prefix's KV can be continued."""
    trim: str = ""
    """Whether KV can be cut back to a shorter prefix, for prompts within and beyond the sliding window."""


@dataclass(frozen=True, slots=True)
class _Alone:
    """What one row computes by itself: its greedy tokens and their logits, shape [tokens, vocab]."""

    tokens: list[int]
    logits: np.ndarray


def _prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def _alone(model: nn.Module, prompt: Sequence[int], count: int) -> _Alone:
    cache = make_prompt_cache(model)
    tokens: list[int] = []
    logits: list[np.ndarray] = []
    inputs = list(prompt)
    for _ in range(count):
        last = np.array(model(mx.array([inputs], mx.uint32), cache=cache)[0, -1])
        logits.append(last)
        inputs = [int(last.argmax())]
        tokens.extend(inputs)
    return _Alone(tokens, np.stack(logits))


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    finite = np.isfinite(expected)
    difference = float(np.abs(found[finite] - expected[finite]).max() / np.abs(expected[finite]).max())
    return difference if np.isfinite(difference) else float("inf")


def _verdict(measure: Callable[[], float]) -> str:
    try:
        difference = measure()
    except Exception as error:
        return _brief(error)
    return "yes" if difference <= _TOLERANCE else f"off by {difference:.0e}"


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:110]}" if lines else type(error).__name__


def _with_and_without_cache(model: nn.Module) -> float:
    prompt = _prompt(40, 1)
    alone = _alone(model, prompt, 4)
    whole = np.array(model(mx.array([prompt + alone.tokens], mx.uint32))[0])
    return _difference(alone.logits, whole[len(prompt) - 1 : -1])


def _in_chunks(model: nn.Module) -> float:
    prompt = _prompt(50, 2)
    alone = _alone(model, prompt, 6)
    prefill = Prefill(model, [prompt], [make_prompt_cache(model)])
    while prefill.remaining:
        prefill.advance(_CHUNK)
    found = []
    inputs = prompt[-1]
    for token in alone.tokens:
        found.append(np.array(model(mx.array([[inputs]], mx.uint32), cache=prefill.cache)[0, -1]))
        inputs = token
    return _difference(np.stack(found), alone.logits)


class _MlxBatch:
    """A batch in mlx-lm's own caches, with the interface of `SlotBatch`."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def join(self, cache: Sequence[Any], _lengths: Sequence[int], *, single: bool) -> None:
        joining = [layer.merge([layer]) for layer in cache] if single else list(cache)
        for mine, its in zip(self.layers, joining, strict=bool(self.layers)):
            mine.extend(its)
        self.layers = self.layers or joining

    def keep(self, order: Sequence[int]) -> None:
        for layer in self.layers:
            layer.filter(mx.array(order))

    def advance(self) -> None:
        pass


def _batched(model: nn.Module, kv: SlotBatch | _MlxBatch, *, padded: bool = True) -> float:
    """Let rows of unequal lengths join and leave, and return the largest difference of any of their logits.

    With `padded` False every prompt is prefilled by itself.
    """
    prompts: list[list[int]] = []
    alone: list[_Alone] = []
    taken: list[int] = []
    present: list[int] = []
    worst = 0.0

    def join(*lengths: int) -> None:
        if not padded and len(lengths) > 1:
            for length in lengths:
                join(length)
            return
        rows = range(len(prompts), len(prompts) + len(lengths))
        prompts.extend(_prompt(length, 10 + row) for row, length in zip(rows, lengths, strict=True))
        alone.extend(_alone(model, prompts[row], 2 * WINDOW + 4) for row in rows)
        taken.extend([0] * len(lengths))
        present.extend(rows)
        prefill = Prefill(model, [prompts[row] for row in rows], [make_prompt_cache(model) for _ in rows])
        while prefill.remaining:
            prefill.advance(_CHUNK)
        kv.join(prefill.cache, [length - 1 for length in lengths], single=prefill.single)

    def keep(*at: int) -> None:
        order = compact_order(at)
        present[:] = [present[i] for i in order]
        kv.keep(order)

    def step(times: int) -> None:
        nonlocal worst
        for _ in range(times):
            if worst > _TOLERANCE:
                return  # what follows another token cannot be compared
            fed = [[prompts[row][-1], *alone[row].tokens][taken[row]] for row in present]
            logits = np.array(model(mx.array(fed, mx.uint32)[:, None], cache=kv.layers)[:, -1, :])
            kv.advance()
            for row, found in zip(present, logits, strict=True):
                expected = alone[row].logits[taken[row]]
                worst = max(worst, _difference(found, expected))
                if found.argmax() != expected.argmax():
                    worst = max(worst, 2 * _TOLERANCE)
                taken[row] += 1

    join(3, 11, 2 * WINDOW + 8)
    step(3)
    join(3 * WINDOW + 2)
    step(3)
    keep(0, 2, 3)
    step(2)
    join(1, 6)
    step(WINDOW + 4)
    keep(1, 3, 4)
    step(3)
    keep(0)
    join(2)
    step(3)
    return worst


class _Words:
    """The least of a tokenizer that the engine needs: every token is a word."""

    def __init__(self) -> None:
        self.backend_tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}))


def _loaded(model: nn.Module, *, batched: bool) -> LoadedModel:
    info = ModelInfo(
        context_length=512,
        vocab_size=VOCAB,
        parameters=0,
        weight_bytes=0,
        kv_bytes_per_token=64,
        dtype="float32",
        device="CPU",
        blas="",
        batched=batched,
        max_rows=8 if batched else 1,
        load_s=0.0,
    )
    return LoadedModel(model, _Words(), info, frozenset(), None)


_ENGINE_REQUESTS = ((3, 9), (30, 14), (9, 5), (50, 20), (1, 18), (17, 3), (12, 8), (70, 6))
"""Prompt lengths and tokens to generate."""


def _engine_requests(model: nn.Module) -> list[tuple[PreparedRequest, list[int]]]:
    """Return requests of unequal lengths with the tokens that each gets alone."""
    requests = []
    for at, (length, count) in enumerate(_ENGINE_REQUESTS):
        prompt = tuple(_prompt(length, 50 + at))
        request = GenerationRequest(request_id=str(at), model="m", prompt=prompt, sampling=_GREEDY, ignore_eos=True)
        requests.append((PreparedRequest(request, prompt, count), _alone(model, prompt, count).tokens))
    return requests


def _through_engine(
    model: nn.Module, requests: Sequence[tuple[PreparedRequest, list[int]]], *, batched: bool, padded: bool
) -> str:
    """Run the requests, half of which arrive later, and say whether each got its tokens."""
    limits = Limits(
        max_rows=8 if batched else 1,
        max_waiting=64,
        kv_budget_bytes=1 << 30,
        kv_bytes_per_token=64,
        prefill_tokens_per_step=2 * _CHUNK,
        pads_prompts=padded,
    )
    half = len(requests) // 2
    late = [prepared for prepared, _ in requests[half:]]
    found: dict[str, list[int]] = {prepared.request.request_id: [] for prepared, _ in requests}
    failed: list[str] = []
    open_ids = set(found)

    def emit(events: list[Event], _load: Load) -> None:
        for event in events:
            if isinstance(event, Delta):
                found[event.request_id].extend(event.token_ids)
            elif isinstance(event, Finished | Failed):
                open_ids.discard(event.request_id)
            if isinstance(event, Failed):
                failed.append(event.message)
        if late and sum(map(len, found.values())) > 8:
            engine.submit(late.pop(0))
        if not open_ids or failed:
            engine.stop()

    options = EngineOptions(
        limits, prefix_cache_bytes=1 << 28, target_itl_ms=10_000.0, features=Configure(), runs_ahead=False
    )
    engine = Engine(_loaded(model, batched=batched), options, emit, "w")
    for prepared, _ in requests[:half]:
        engine.submit(prepared)
    engine.run()
    if failed:
        return failed[0]
    wrong = sum(found[prepared.request.request_id] != expected for prepared, expected in requests)
    return f"{wrong} of {len(requests)} wrong" if wrong else "yes"


def _extended(model: nn.Module) -> float:
    """Continue two copies of one prefix's KV."""
    prefix, endings = _prompt(30, 3), [_prompt(10, 4), _prompt(7, 5)]
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([prefix], mx.uint32), cache=cache))
    worst = 0.0
    for ending in endings:
        mine = copy.deepcopy(cache)
        found = np.array(model(mx.array([ending], mx.uint32), cache=mine)[0, -1])
        worst = max(worst, _difference(found, _alone(model, prefix + ending, 1).logits[0]))
    return worst


def _trimmed(model: nn.Module, length: int) -> str:
    prefix, wrong, ending = _prompt(length, 6), _prompt(5, 7), _prompt(4, 8)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([prefix + wrong], mx.uint32), cache=cache))
    if not can_trim_prompt_cache(cache):
        return "no"

    def measure() -> float:
        trim_prompt_cache(cache, len(wrong))
        found = np.array(model(mx.array([ending], mx.uint32), cache=cache)[0, -1])
        return _difference(found, _alone(model, prefix + ending, 1).logits[0])

    return _verdict(measure)


def examine(name: str) -> Row:
    """Build an architecture and find out all about it. Never raises."""
    row = Row(name)
    try:
        model = build(name)
        row.caches = ", ".join(f"{count} {kind}" for kind, count in Counter(_kinds(make_prompt_cache(model))).items())
        _alone(model, _prompt(5, 0), 2)
    except (Exception, SystemExit) as error:
        row.failure = _brief(error)
        return row
    row.mlx_batch = _verdict(lambda: _batched(model, _MlxBatch()))
    compat.adapt(model)
    row.cached = _verdict(lambda: _with_and_without_cache(model))
    row.chunks = _verdict(lambda: _in_chunks(model))
    row.batch = _verdict(lambda: _batched(model, SlotBatch()))
    row.unpadded = row.batch if row.batch == "yes" else _verdict(lambda: _batched(model, SlotBatch(), padded=False))
    verdict = check(_loaded(model, batched=True))
    requests = _engine_requests(model)
    row.exclusive = _through_engine(model, requests, batched=False, padded=False)
    if verdict.batches:
        row.mode = "batches" if verdict.pads else "batches, prompts apart"
        row.served = _through_engine(model, requests, batched=True, padded=verdict.pads)
    else:
        row.mode, row.served = "one at a time", row.exclusive
    expected = "batches" if row.batch == "yes" else "batches, prompts apart" if row.unpadded == "yes" else row.mode
    if row.mode != expected or (row.mode != "one at a time" and row.unpadded != "yes"):
        row.misjudged = f"the self-check chose {row.mode}, right is {expected}"
    row.extend = _verdict(lambda: _extended(model))
    within, beyond = _trimmed(model, 6), _trimmed(model, 40)
    row.trim = within if within == beyond else f"{within}; {beyond} beyond the window"
    return row


def _kinds(cache: Sequence[Any]) -> list[str]:
    return [
        "+".join(type(part).__name__ for part in layer.caches) if hasattr(layer, "caches") else type(layer).__name__
        for layer in cache
    ]


def _child(name: str, connection: Connection) -> None:
    mx.set_default_device(mx.cpu)
    connection.send(examine(name))


def examine_apart(name: str, limit_s: float) -> Row:
    """Examine an architecture in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, its), daemon=True)
    process.start()
    its.close()
    try:
        return mine.recv() if mine.poll(limit_s) else Row(name, failure=f"took more than {limit_s:.0f} s")
    except EOFError:
        process.join()
        return Row(name, failure=f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def markdown(rows: Sequence[Row]) -> str:
    """Return the report."""
    run = [row for row in rows if not row.failure]
    modes = Counter(row.mode for row in run)
    right = sum(row.served == "yes" for row in run)
    fixed = [row.name for row in run if row.mlx_batch != "yes" and row.batch == "yes"]
    misjudged = [row.name for row in run if row.misjudged]
    head = [
        "architecture",
        "caches",
        "mlx-lm's batch",
        "our batch",
        "served in",
        "right",
        "chunks",
        "copied",
        "cut back",
    ]
    table = [
        [row.name, row.caches, row.mlx_batch, row.batch, row.mode, row.served, row.chunks, row.extend, row.trim]
        for row in run
    ]
    unlike = [row.name for row in run if row.cached != "yes"]
    return _REPORT.format(
        mlx_lm=version("mlx-lm"),
        mlx=version("mlx"),
        count=len(rows),
        run=len(run),
        right=right,
        batches=modes["batches"],
        apart=modes["batches, prompts apart"],
        single=modes["one at a time"],
        misjudged=", ".join(misjudged) or "none",
        fixed=", ".join(fixed) or "none",
        unlike=", ".join(unlike) or "none",
        table=render(head, [[cell.replace("|", "/") for cell in cells] for cells in table]),
        failures=render(
            ["architecture", "reason"], [[row.name, row.failure.replace("|", "/")] for row in rows if row.failure]
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine and report; return 1 when an architecture would be served wrongly."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="this architecture alone; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    parser.add_argument("--processes", type=int, default=2, help="how many at once (default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=180, help="seconds for each (default: %(default)s)")
    options = parser.parse_args(arguments)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.small_configs", "inference.engine"])
    rows = []
    with ThreadPoolExecutor(options.processes) as pool:
        for row in pool.map(lambda name: examine_apart(name, options.limit_s), options.only or names()):
            rows.append(row)
            print(json.dumps({key: value for key, value in asdict(row).items() if value != ""}), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    return int(any(not row.failure and row.served != "yes" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
