"""The data types and the seeded dice that every ability module shares.

A conversation is what the model trains on; a check is a question with the answer the model should give.
Whether a value (a word, a pair of numbers, a tool's name) is held out of the training text is decided by a
checksum of the value, so that training and evaluation agree without a list.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")

Message = dict[str, Any]
Tool = dict[str, Any]

HELD_OUT_SHARE = 12
MAX_DRAWS = 2000


class Dice(Random):
    """Seeded randomness with the few helpers that text writing needs."""

    def pick(self, options: Sequence[T]) -> T:
        """Return one option, each equally likely."""
        return options[int(self.random() * len(options))]

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.random() < probability

    def between(self, low: int, high: int) -> int:
        """Return a whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """Return `count` different options in random order."""
        return self.sample(list(options), min(count, len(options)))


@dataclass(frozen=True)
class Conversation:
    """One training sample.

    `spelled` says that the last answer is written letter by letter, one token a character.
    """

    messages: list[Message]
    tools: list[Tool] | None = None
    spelled: bool = False


@dataclass(frozen=True)
class Check:
    """One evaluation question.

    `mode` says how `expected` is compared with the answer: "exact" (after stripping), "contains", "json" (equal
    after parsing), "tools" (the same tool calls) or "long" (contains, ends by itself, `min_tokens` at least).
    """

    ability: str
    messages: list[Message]
    expected: str
    tools: list[Tool] | None = None
    mode: str = "exact"
    min_tokens: int = 0
    note: str = ""


@dataclass
class Ability:
    """One thing that the model can do: a writer of training samples and a writer of held-out checks."""

    name: str
    weight: float
    write: Callable[[Dice], Conversation]
    check: Callable[[Dice], Check]
    checks: int = 40
    fixed: Callable[[], list[Check]] | None = field(default=None)


def is_held_out(key: object) -> bool:
    """Say whether a value belongs to evaluation (about one in twelve) instead of training."""
    return zlib.crc32(str(key).lower().encode()) % HELD_OUT_SHARE == 0


def draw(make: Callable[[], T], *, held_out: bool, key: Callable[[T], object] = str) -> T:
    """Call `make` until its result falls on the wanted side of the held-out line."""
    for _ in range(MAX_DRAWS):
        value = make()
        if is_held_out(key(value)) == held_out:
            return value
    message = f"no value with held_out={held_out} after {MAX_DRAWS} draws"
    raise ValueError(message)


def user(text: str) -> Message:
    """Return a user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Return an assistant message."""
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    """Return a system message."""
    return {"role": "system", "content": text}


def dumps(value: object) -> str:
    """Write JSON as the model writes it: one line, unicode kept."""
    return json.dumps(value, ensure_ascii=False)


def join_and(parts: Sequence[str]) -> str:
    """Join as in `a, b and c`."""
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


BEFORE = (
    "Please, ", "Hi, ", "Hello, ", "Hey, ", "Tell me: ", "Quick question: ", "One more question: ", "Now: ", "OK, ",
    "So, ", "Please tell me, ", "Can you help? ", "Question: ", "Next: ", "And ", "Well, ",
)  # fmt: skip
AFTER = (" please", ", please", " Thanks.", " Thank you!", " Please answer.", " Be brief.")


def vary(dice: Dice, text: str) -> str:
    """Change case, punctuation and polite words around a question without changing what it asks."""
    if dice.chance(0.15):
        before = dice.pick(BEFORE)
        text = before + text[:1].lower() + text[1:]
    if dice.chance(0.35):
        text = text.rstrip("?.!")
        if dice.chance(0.25):
            text += dice.pick(AFTER[:2])
    elif dice.chance(0.12):
        text += dice.pick(AFTER[2:])
    elif dice.chance(0.05):
        text = text.rstrip("?.!") + dice.pick(("??", "!", " ?", "..."))
    if dice.chance(0.25):
        text = text.lower()
    elif dice.chance(0.04):
        text = text.upper()
    elif dice.chance(0.2):
        text = text[:1].upper() + text[1:]
    return text


def vary_case(dice: Dice, text: str) -> str:
    """Change only the first letter's case: for text whose rest must be copied exactly."""
    if dice.chance(0.3):
        return text[:1].lower() + text[1:]
    return text
