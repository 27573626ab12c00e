"""Asks the model the held-out questions: `python -m inference.demo_model.evaluate`.

Greedy decoding in float32, batched by mlx-lm; prints a table with one row an ability.
"""

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import batch_generate, load

from . import MODEL_PATH
from .corpus import Check, checks

LONG = frozenset({"long answers", "counting"})
LONGEST = 1600
SHORT = 160
GROUP = 64
CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Outcome:
    """One question's answer and whether it is right."""

    check: Check
    answer: str
    tokens: int
    right: bool


def parsed(text: str) -> object:
    """Return the JSON value in a text, or None."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def is_right(check: Check, answer: str, tokens: int, *, ended: bool) -> bool:
    """Compare an answer with what was expected."""
    if not ended:
        return False
    answer = answer.strip()
    if check.mode == "json":
        return parsed(answer) == json.loads(check.expected)
    if check.mode == "tools":
        return [parsed(call) for call in CALL.findall(answer)] == json.loads(check.expected)
    if check.mode == "contains":
        return check.expected in answer
    if check.mode == "long":
        return tokens >= check.min_tokens and check.expected.strip() == answer
    return answer == check.expected.strip()


def ask(model: Any, tokenizer: Any, questions: list[Check]) -> list[Outcome]:
    """Answer all questions, those of similar length together."""
    prompts = [
        tokenizer.apply_chat_template(check.messages, tools=check.tools, add_generation_prompt=True)
        for check in questions
    ]
    limits = [LONGEST if check.ability in LONG else SHORT for check in questions]
    order = sorted(range(len(questions)), key=lambda i: (limits[i], len(prompts[i])))
    found: list[Outcome | None] = [None] * len(questions)
    for begin in range(0, len(order), GROUP):
        group = order[begin : begin + GROUP]
        response = batch_generate(
            model,
            tokenizer,
            [prompts[i] for i in group],
            max_tokens=[limits[i] for i in group],
            return_token_ids=True,
            completion_batch_size=GROUP,
        )
        for i, answer, ids in zip(group, response.texts, response.token_ids, strict=True):
            tokens = len(ids)
            right = is_right(questions[i], answer, tokens, ended=tokens < limits[i])
            found[i] = Outcome(questions[i], answer, tokens, right)
        sys.stderr.write(f"\r{min(begin + GROUP, len(order))} of {len(order)} questions")
        sys.stderr.flush()
    sys.stderr.write("\n")
    return [outcome for outcome in found if outcome is not None]


def summary(outcomes: list[Outcome]) -> dict[str, tuple[int, int]]:
    """Return, for each ability and for the total, how many were right and asked."""
    table: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        table[outcome.check.ability].append(outcome.right)
    rows = {ability: (sum(rights), len(rights)) for ability, rights in table.items()}
    rows["total"] = (sum(r for r, _ in rows.values()), sum(n for _, n in rows.values()))
    return rows


def main() -> None:
    """Read the command line, ask, print."""
    parser = argparse.ArgumentParser(prog="python -m inference.demo_model.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_PATH, help="model folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--wrong", action="store_true", help="also print the wrong answers")
    parser.add_argument("--only", action="append", metavar="ABILITY", help="ask about this ability; may be repeated")
    parser.add_argument("--seed", type=int, default=2026)
    arguments = parser.parse_args()
    began = time.monotonic()
    model, tokenizer, *_ = load(str(arguments.model))
    model.set_dtype(mx.float32)
    questions = [c for c in checks(arguments.seed) if not arguments.only or c.ability in arguments.only]
    outcomes = ask(model, tokenizer, questions)
    rows = summary(outcomes)
    seconds = time.monotonic() - began
    if arguments.json:
        values = {ability: {"right": right, "asked": asked} for ability, (right, asked) in rows.items()}
        sys.stdout.write(json.dumps({"abilities": values, "seconds": round(seconds, 1)}, indent=2) + "\n")
        return
    if arguments.wrong:
        for outcome in outcomes:
            if not outcome.right:
                last = outcome.check.messages[-1].get("content")
                note = f" ({outcome.check.note})" if outcome.check.note else ""
                sys.stdout.write(
                    f"[{outcome.check.ability}] {last!r}{note}\n  got  {outcome.answer[-300:]!r} ({outcome.tokens})\n"
                    f"  want {outcome.check.expected[-300:]!r}\n"
                )
    sys.stdout.write(f"{'ability':<18}{'right':>7}{'asked':>7}{'share':>9}\n")
    for ability, (right, asked) in rows.items():
        sys.stdout.write(f"{ability:<18}{right:>7}{asked:>7}{right / asked:>9.1%}\n")
    sys.stdout.write(f"{mx.default_device()}, float32, {seconds:.0f} s\n")


if __name__ == "__main__":
    main()
