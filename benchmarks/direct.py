"""The same work without a server, in a process of its own: `python -m benchmarks.direct SOURCE ROWS`.

Loads the model once, the way a worker does and with the same BLAS, and then answers tasks that come as JSON lines on
standard input: make prompts, generate with mlx-lm's batch generator ("raw"), generate with the product's engine. Both
keep a given number of requests in flight, as the load client does.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from inference.blas import prepare_process
from inference.protocol import Delta, Event, Finished, GenerationRequest, Load, ModelInfo, SamplingParams, WorkerConfig

from .random_model import made_up_words, write_model
from .records import Generate, MakePrompts, Measured, Prompt, Task, Trace

if TYPE_CHECKING:
    from inference.loading import LoadedModel

RANDOM_29M = "random-29m"
_TRIES = 8


def make_prompts(loaded: LoadedModel, task: MakePrompts) -> list[Prompt]:
    """Return different prompts that have the wanted number of tokens, template included."""
    from inference.prompts import prepare

    def ids_of(text: str) -> list[int]:
        request = GenerationRequest(request_id="-", model="-", messages=({"role": "user", "content": text},))
        return list(prepare(loaded, request).prompt)

    rng = random.Random(task.seed)
    overhead = len(ids_of("a")) - 1
    prompts = []
    shared = loaded.tokenizer.encode(" ".join(made_up_words(task.shared, rng)))[: task.shared]
    for _ in range(task.count):
        words = [*shared, *loaded.tokenizer.encode(" ".join(["", *made_up_words(task.tokens, rng)]))]
        take = max(task.tokens - overhead, 1)
        best = Prompt("a")
        for _ in range(_TRIES):
            text = loaded.tokenizer.decode(words[:take], skip_special_tokens=True).strip()
            prompt = Prompt(text, ids_of(text))
            if abs(len(prompt.ids) - task.tokens) < abs(len(best.ids) - task.tokens):
                best = prompt
            if len(prompt.ids) == task.tokens:
                break
            take += task.tokens - len(prompt.ids)  # cutting a text in pieces may change how its end is divided
        prompts.append(best)
    return prompts


def run_raw(loaded: LoadedModel, task: Generate) -> list[Trace]:
    """Generate with mlx-lm's batch generator at its own settings, except the row limit."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(loaded.model, max_tokens=task.max_tokens, completion_batch_size=task.rows)
    waiting = iter(enumerate(task.prompts))
    traces = [Trace(0.0, 0.0, [], len(prompt)) for prompt in task.prompts]
    outputs: list[list[int]] = [[] for _ in task.prompts]
    running: dict[int, int] = {}

    def begin(count: int) -> None:
        batch = [pair for _, pair in zip(range(count), waiting, strict=False)]
        if batch:
            now = time.perf_counter()
            for at, _ in batch:
                traces[at].started = now
            uids = generator.insert([list(prompt) for _, prompt in batch])
            running.update(zip(uids, (at for at, _ in batch), strict=True))

    begin(task.clients)
    while running:
        responses = generator.next_generated()
        now = time.perf_counter()
        ended = 0
        for response in responses:
            at = running[response.uid]
            outputs[at].append(response.token)
            traces[at].arrivals.append(now)
            if response.finish_reason is not None:
                traces[at].ended = now
                del running[response.uid]
                ended += 1
        begin(ended)
    generator.close()
    mx.clear_cache()
    for trace, output in zip(traces, outputs, strict=True):
        trace.tokens = len(output)
        trace.text = loaded.tokenizer.decode(output, skip_special_tokens=True)
    return traces


def run_engine(loaded: LoadedModel, task: Generate) -> list[Trace]:
    """Generate with the product's engine, text included, as a worker runs it but without its I/O thread."""
    import mlx.core as mx

    from inference.running import PreparedRequest
    from inference.worker import build_engine

    config = WorkerConfig(
        worker_id="bench",
        model="-",
        source="-",
        max_rows=task.rows,
        max_waiting=len(task.prompts),
        prefill_tokens_per_step=task.prefill_tokens_per_step,
    )
    traces = [Trace(0.0, 0.0, [], len(prompt)) for prompt in task.prompts]
    left = len(traces)
    requests = _prepared(task, PreparedRequest)

    def emit(events: list[Event], _load: Load) -> None:
        nonlocal left
        now = time.perf_counter()
        for event in events:
            if isinstance(event, Delta):
                trace = traces[int(event.request_id)]
                if event.text:
                    trace.arrivals.append(now)
                    trace.text += event.text
            elif isinstance(event, Finished):
                trace = traces[int(event.request_id)]
                trace.ended, trace.tokens = now, event.usage.completion_tokens
                left -= 1
                begin(1)
        if not left:
            engine.stop()

    def begin(count: int) -> None:
        for _, prepared in zip(range(count), requests, strict=False):
            traces[int(prepared.request.request_id)].started = time.perf_counter()
            engine.submit(prepared)

    engine = build_engine(config, loaded, emit)
    begin(task.clients)
    engine.run()
    mx.clear_cache()
    return traces


def _prepared(task: Generate, kind: type) -> Iterator:
    for at, prompt in enumerate(task.prompts):
        request = GenerationRequest(
            request_id=str(at),
            model="-",
            prompt=tuple(prompt),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=task.max_tokens,
            ignore_eos=True,
        )
        yield kind(request, tuple(prompt), task.max_tokens)


def load_model(source: str, rows: int) -> LoadedModel:
    """Load the model as a worker would, in float32 and without a self-check."""
    from inference.loading import load

    config = WorkerConfig(worker_id="bench", model="bench", source=source, dtype="float32", max_rows=rows)
    return load(config, lambda _fraction: None)


def serve(arguments: Sequence[str]) -> None:
    """Answer the model's information, then tasks until standard input ends."""
    source, rows = arguments[0], int(arguments[1])
    loaded = load_model(source, rows)
    say(loaded.info)
    decoder = msgspec.json.Decoder(Task)
    for line in sys.stdin.buffer:
        task = decoder.decode(line)
        if isinstance(task, MakePrompts):
            say(make_prompts(loaded, task))
            continue
        cpu = time.process_time()
        traces = run_raw(loaded, task) if task.engine == "raw" else run_engine(loaded, task)
        say(Measured(traces, time.process_time() - cpu))


def say(answer: ModelInfo | list[Prompt] | Measured) -> None:
    """Write one line."""
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    prepare_process()
    if sys.argv[1] == "--write-random":
        write_model(Path(sys.argv[2]))
    else:
        serve(sys.argv[1:])
