"""What the processes of a benchmark tell each other, as JSON lines: prompts, jobs, and what was measured.

Times are those of the measuring process's own monotonic clock, in seconds; only differences within one run mean
anything.
"""

from __future__ import annotations

import msgspec

Record = msgspec.Struct


class Prompt(Record, frozen=True):
    """One user message, and the token ids that the model's chat template makes of it."""

    text: str
    ids: list[int] = []


class MakePrompts(Record, frozen=True, tag="prompts"):
    """Ask for prompts of exactly `tokens` tokens where the tokenizer allows it, all different.

    Attributes:
        shared: about so many tokens at their start are the same in all of them.
    """

    count: int
    tokens: int
    seed: int
    shared: int = 0


class Generate(Record, frozen=True, tag="generate"):
    """Ask for the prompts' greedy continuations, without a server.

    Attributes:
        engine: "raw" is mlx-lm's batch generator, "engine" the product's engine.
        clients: requests in flight; when one ends the next begins.
        rows: most sequences in the batch.
        prefill_tokens_per_step: for "engine"; 0 leaves the device's default.
    """

    engine: str
    prompts: list[list[int]]
    clients: int
    max_tokens: int
    rows: int
    prefill_tokens_per_step: int = 0


Task = MakePrompts | Generate


class ClientJob(Record, frozen=True):
    """What the load client does: every prompt once, `clients` at a time.

    Attributes:
        url: `http://host:port` of the site.
        transport: "sse" or "ws".
        idle_s: longest silence before a request counts as failed.
    """

    url: str
    transport: str
    model: str
    prompts: list[str]
    clients: int
    max_tokens: int
    idle_s: float = 120.0


class Trace(Record):
    """One request as its client saw it.

    Attributes:
        arrivals: when each piece of visible output came; several pieces may share a moment.
        tokens: generated tokens, counted by the server or engine and not by pieces.
        error: empty when the request succeeded.
    """

    started: float
    ended: float
    arrivals: list[float]
    prompt_tokens: int = 0
    tokens: int = 0
    text: str = ""
    error: str = ""


class Measured(Record):
    """One run: its requests, and the CPU seconds of the process that measured it."""

    traces: list[Trace]
    cpu_s: float
