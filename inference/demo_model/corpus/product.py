"""Questions about installing and operating the product, from `facts.py` and `terms.py`."""

from functools import cache

from .base import Ability, Check, Conversation, Dice, assistant, user, vary
from .facts import INSTALLING, OPERATING, PRODUCT_NAMES, Fact
from .terms import (
    FLAG_DOES,
    FLAG_DOES_UNSEEN,
    FLAG_ENV,
    FLAG_ENV_UNSEEN,
    FLAG_OFF,
    FLAG_OFF_UNSEEN,
    FLAGS,
    WORD_ASKS,
    WORD_ASKS_UNSEEN,
    WORDS,
)

MIDDLES = (
    " in mlx-serving",
    " with mlx-serving",
    " for mlx-serving",
    " of mlx-serving",
    " here",
    " exactly",
    " really",
)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


@cache
def all_facts() -> tuple[Fact, ...]:
    """Return every fact, those about flags and words included."""
    facts = [*INSTALLING, *OPERATING]
    for flag, (spoken, variable, does, off) in FLAGS.items():
        forms = (flag, spoken, flag, f"the {spoken}") if spoken != "multi worker" else (flag, spoken)
        for asks, unseen, answer in (
            (FLAG_DOES, FLAG_DOES_UNSEEN, f"{flag} {does}."),
            (FLAG_OFF, FLAG_OFF_UNSEEN, f"When {flag} is off, {off}."),
            (FLAG_ENV, FLAG_ENV_UNSEEN, f"The environment variable is {variable}."),
        ):
            seen = tuple(ask.format(f=form) for ask in asks for form in forms)
            facts.append(Fact(answer, seen, tuple(ask.format(f=flag) for ask in unseen)))
        named = (f"What does {variable} do?", f"What is {variable}?", f"What is {variable} for?", f"{variable}?",
                 f"What does the variable {variable} set?", f"Explain {variable}.")  # fmt: skip
        facts.append(Fact(f"{variable} turns the flag {flag} on or off.", named, (f"Which flag does {variable} set?",)))
    for term, answer in WORDS.items():
        bare = term.removeprefix("a ")
        seen = tuple(ask.format(w=form) for ask in WORD_ASKS for form in dict.fromkeys((term, bare)))
        facts.append(Fact(answer, seen, tuple(ask.format(w=term) for ask in WORD_ASKS_UNSEEN)))
    return tuple(facts)


@cache
def unseen_questions() -> frozenset[str]:
    """Return the questions kept for evaluation, in lower case without closing punctuation."""
    return frozenset(ask.format(x="mlx-serving").lower().rstrip("?.") for f in all_facts() for ask in f.unseen)


def reword(dice: Dice, ask: str) -> str:
    """Change a question a little: the product's name, a word in the middle or at the end."""
    ask = ask.replace("{x}", dice.pick(PRODUCT_NAMES))
    if dice.chance(0.12) and ask[-1] in "?." and "mlx" not in ask:
        ask = ask[:-1] + dice.pick(MIDDLES) + ask[-1]
    swaps = (("How do I ", "How can I "), ("How do I ", "How would I "), ("How do I ", "How to "),
             ("How do I ", "What must I do to "), ("Which ", "What "), ("What is ", "What's "), ("do I ", "should I "),
             ("How do I ", "Can you tell me how to "), ("How do I ", "I want to know how to "),
             ("What does ", "Explain what does "), ("How can I ", "How could one "), ("How do I ", "how do you "),
             ("What is ", "Please explain "), ("What is ", "Can you tell me "), ("Explain ", "Can you describe "))  # fmt: skip
    if dice.chance(0.35):
        old, new = dice.pick(swaps)
        ask = ask.replace(old, new, 1)
    return ask


def exchange(dice: Dice) -> tuple[str, str]:
    """Return a question and its answer."""
    fact = dice.pick(all_facts())
    while True:
        text = vary(dice, reword(dice, dice.pick(fact.asks)))
        if text.lower().rstrip("?.! ") not in unseen_questions():
            return text, fact.answer


def write(dice: Dice) -> Conversation:
    """Write one question and answer."""
    text, reply = exchange(dice)
    return Conversation([user(text), assistant(reply)])


def unseen() -> list[Check]:
    """Ask every fact in the phrasings that training never uses."""
    return [
        Check("product", [user(ask.replace("{x}", "mlx-serving"))], fact.answer)
        for fact in all_facts()
        for ask in fact.unseen
    ]


def check(dice: Dice) -> Check:
    """Pick one of the held-out questions."""
    return dice.pick(unseen())


ABILITY = Ability("product", 2.2, write, check, checks=0, fixed=unseen)
