"""The training text of the demo model and its held-out questions, written by templates and seeded dice.

`conversation` writes one training sample; `checks` writes the evaluation set. Neither imports mlx.
"""

from itertools import accumulate

from . import arithmetic, dialogue, echo, longform, product, smalltalk, structured, systems, tools
from .base import Ability, Check, Conversation, Dice, Message, Tool, assistant, system, user

ABILITIES: tuple[Ability, ...] = (
    product.ABILITY,
    arithmetic.ABILITY,
    *echo.ABILITIES,
    tools.ABILITY,
    structured.ABILITY,
    systems.ABILITY,
    *dialogue.ABILITIES,
    *longform.ABILITIES,
    smalltalk.ABILITY,
)
_LIMITS = tuple(accumulate(ability.weight for ability in ABILITIES))


def one_ability(dice: Dice) -> Conversation:
    """Write a sample of one ability, chosen by weight."""
    point = dice.random() * _LIMITS[-1]
    index = next(i for i, limit in enumerate(_LIMITS) if point < limit)
    return ABILITIES[index].write(dice)


def conversation(dice: Dice) -> Conversation:
    """Write one training sample: one ability, with a system prompt or an unrelated beginning at times."""
    sample = one_ability(dice)
    if sample.messages[0]["role"] == "system" or dice.chance(0.7):
        return sample
    if dice.chance(0.5):
        return Conversation([system(dice.pick(systems.BENIGN)), *sample.messages], sample.tools, spelled=sample.spelled)
    if sample.tools:
        return sample
    before = [message for _ in range(dice.between(1, 3)) for message in dialogue.turns(*dialogue.simple(dice))]
    return Conversation(before + sample.messages, spelled=sample.spelled)


def checks(seed: int = 2026) -> list[Check]:
    """Write the evaluation set; the same seed gives the same questions."""
    found: list[Check] = []
    for ability in ABILITIES:
        dice = Dice(f"{seed} {ability.name}")
        found += ability.fixed() if ability.fixed else []
        asked: set[str] = set()
        for _ in range(ability.checks * 20):
            made = ability.check(dice)
            text = str((made.messages, made.tools))
            if text not in asked and len(asked) < ability.checks:
                asked.add(text)
                found.append(made)
    return found


__all__ = [
    "ABILITIES",
    "Ability",
    "Check",
    "Conversation",
    "Dice",
    "Message",
    "Tool",
    "assistant",
    "checks",
    "conversation",
    "system",
    "user",
]
