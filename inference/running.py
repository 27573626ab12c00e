"""The engine's records of requests: a request between its acceptance and its last event, and its rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from .grammar import Matcher
from .protocol import GenerationRequest
from .radix import Tokens
from .scheduler import Job
from .text import TextStream


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A valid request with its prompt as token ids.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: most tokens of each choice; prompt and output fit the context.
    """

    request: GenerationRequest
    prompt: tuple[int, ...]
    max_new_tokens: int
    prompt_text: str = ""
    """The prompt as text, when the request asks for an echo."""
    matchers: tuple[Matcher, ...] = ()
    """One for each choice, when the output has to follow a grammar."""


@dataclass(slots=True, eq=False)
class Row:
    """One choice that is being generated."""

    running: Running
    index: int
    text: TextStream
    seed: int
    matcher: Matcher | None
    tokens: list[int] = field(default_factory=list)
    """What has been generated and read."""
    launched: int = 0
    """Tokens that the device was asked for, read or not."""
    joined_at: int = 0
    """Tokens of the prompt, and of the output before the row was preempted, when it joined the batch."""
    joined_launched: int = 0
    """`launched` at that moment."""
    in_batch: bool = False
    done: bool = False

    @property
    def kv_tokens(self) -> int:
        """Return how many tokens of the row the KV caches hold: all before it joined, then one for each step."""
        return self.joined_at - 1 + self.launched - self.joined_launched


@dataclass(slots=True, eq=False)
class Running:
    """A request between its acceptance and its last event."""

    prepared: PreparedRequest
    job: Job
    prompt: Tokens
    """What is prefilled: the prompt, and after a preemption the output so far."""
    rows: list[Row] = field(default_factory=list)
    seq: int = 0
    open_choices: int = 0
    generated: int = 0
    cached_tokens: int | None = None
    """Prompt tokens that came from the prefix cache; None before the first prefill."""

    @property
    def request_id(self) -> str:
        """Return the request's id."""
        return self.prepared.request.request_id

    @property
    def in_batch(self) -> bool:
        """Return whether rows of the request are in the batch."""
        return any(row.in_batch for row in self.rows)

    def next_seq(self) -> int:
        """Return the number of the next delta."""
        self.seq += 1
        return self.seq - 1
