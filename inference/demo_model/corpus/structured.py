"""Answers in JSON: flat, nested, arrays."""

from collections.abc import Callable
from typing import Any

from .base import Ability, Check, Conversation, Dice, assistant, draw, dumps, join_and, user, vary_case
from .words import ADJECTIVES, ANIMALS, COLOURS, FOODS, JOBS, city, name, word

Field = tuple[str, Any]

ASK = (
    "Answer in JSON with {keys}: {t}", "Answer as JSON with {keys}: {t}", "Reply in JSON with {keys}. {t}",
    "Give me JSON with {keys}: {t}", "Return a JSON object with {keys}: {t}", "{t} Answer in JSON with {keys}.",
    "Extract {keys} as JSON: {t}", "Write a JSON object with {keys} for this: {t}", "Convert to JSON with {keys}: {t}",
    "{t} Return JSON with {keys}.", "As JSON with {keys}: {t}", "{t}\nGive me this as JSON with {keys}.",
    "Respond only with JSON with {keys}: {t}", "Output JSON with {keys}. Text: {t}",
)  # fmt: skip
ASK_HELD_OUT = ("Please answer in JSON with {keys}: {t}", "Please return {keys} as a JSON object: {t}")
ITEMS = (
    "Give me a JSON array of the words: {t}", "Write these words as a JSON array: {t}", "JSON array: {t}",
    "Make a JSON list of: {t}", "Return a JSON array with {t}.", "Turn this into a JSON array: {t}",
    "Answer with a JSON array: {t}",
)  # fmt: skip
ITEMS_HELD_OUT = ("Please write a JSON array of the words: {t}", "Give me a JSON list of: {t}")


def key_list(dice: Dice, keys: list[str]) -> str:
    """Name the keys in words."""
    if len(keys) == 1:
        return f"the key {keys[0]}"
    return dice.pick(("keys ", "the keys ", "the fields ")) + join_and(keys)


def person(dice: Dice, *, held_out: bool) -> tuple[list[Field], str]:
    """Describe a person."""
    who = name(dice, held_out=held_out)
    facts: list[tuple[str, Any, str]] = [
        (dice.pick(("age", "age", "years")), age := dice.between(1, 99), f"is {age} years old"),
        (dice.pick(("city", "city", "town", "home")), town := city(dice), f"lives in {town}"),
        (dice.pick(("job", "job", "work")), job := dice.pick(JOBS), f"works as a {job}"),
        (dice.pick(("colour", "color")), colour := dice.pick(COLOURS), f"likes the colour {colour}"),
        (dice.pick(("pet", "animal")), pet := dice.pick(ANIMALS), f"has a {pet}"),
        (dice.pick(("food", "dish")), food := dice.pick(FOODS), f"likes to eat {food}"),
    ]
    chosen = dice.some(facts, dice.between(1, 3))
    fields: list[Field] = [(dice.pick(("name", "name", "name", "person")), who)]
    return fields + [(key, value) for key, value, _ in chosen], f"{who} {join_and([text for *_, text in chosen])}."


def product(dice: Dice, *, held_out: bool) -> tuple[list[Field], str]:
    """Describe a thing."""
    what = word(dice, held_out=held_out)
    facts: list[tuple[str, Any, str]] = [
        ("price", price := dice.between(1, 999), f"costs {price} dollars"),
        (dice.pick(("colour", "color")), colour := dice.pick(COLOURS), f"is {colour}"),
        (dice.pick(("weight", "kilos")), weight := dice.between(1, 99), f"weighs {weight} kilos"),
        (dice.pick(("shape", "look")), look := dice.pick(ADJECTIVES), f"looks {look}"),
        ("count", count := dice.between(1, 99), f"is there {count} times"),
    ]
    chosen = dice.some(facts, dice.between(1, 3))
    fields: list[Field] = [(dice.pick(("item", "product", "thing", "name")), what)]
    return fields + [(key, value) for key, value, _ in chosen], f"The {what} {join_and([text for *_, text in chosen])}."


def pairs(dice: Dice, *, held_out: bool) -> tuple[list[Field], str]:
    """Name keys and values outright, so that any key can occur."""
    fields: list[Field] = []
    used: set[str] = set()
    for _ in range(dice.between(1, 4)):
        key = draw(lambda: word(dice), held_out=False)
        if key in used:
            continue
        used.add(key)
        value: Any = dice.between(0, 999) if dice.chance(0.4) else word(dice, held_out=held_out)
        fields.append((key, value))
    return fields, f"The {join_and([f'{key} is {value}' for key, value in fields])}."


def flat(dice: Dice, *, held_out: bool) -> tuple[str, Any]:
    """Ask for one object, sometimes inside another."""
    make = dice.pick((person, person, product, pairs))
    fields, text = make(dice, held_out=held_out)
    forms = ASK_HELD_OUT if held_out and dice.chance(0.5) else ASK
    keys = [key for key, _ in fields]
    if len(set(keys)) < len(keys):
        return flat(dice, held_out=held_out)
    if dice.chance(0.2):
        outer = dice.pick(("person", "data", "result", "record", "entry", "user"))
        if outer not in keys:
            named = f"a key {outer} that holds {join_and(keys)}"
            return dice.pick(forms).format(keys=named, t=text), {outer: dict(fields)}
    return dice.pick(forms).format(keys=key_list(dice, keys), t=text), dict(fields)


def array(dice: Dice, *, held_out: bool) -> tuple[str, Any]:
    """Ask for an array."""
    if dice.chance(0.3):
        ask = dice.pick(("List the numbers from {a} to {b} as a JSON array.", "JSON array of the numbers {a} to {b}"))
        low, high = draw(lambda: shift(dice), held_out=held_out)
        return ask.format(a=low, b=high), list(range(low, high + 1))
    words = [word(dice, held_out=held_out) for _ in range(dice.between(1, 6))]
    forms = ITEMS_HELD_OUT if held_out and dice.chance(0.5) else ITEMS
    text = dice.pick((", ".join(words), join_and(words)))
    if dice.chance(0.3):
        key = dice.pick(("words", "items", "list", "names", "things"))
        ask = dice.pick(("Answer in JSON with a key {k} that holds a list of: {t}", "JSON with a list named {k}: {t}"))
        return ask.format(k=key, t=text), {key: words}
    return dice.pick(forms).format(t=text), words


def shift(dice: Dice) -> tuple[int, int]:
    """Return a short range of numbers."""
    low = dice.between(0, 60)
    return low, low + dice.between(1, 8)


def exchange(dice: Dice, *, held_out: bool = False) -> tuple[str, Any]:
    """Return a question and the value its answer holds."""
    kinds: tuple[Callable[..., tuple[str, Any]], ...] = (flat, flat, flat, array)
    return dice.pick(kinds)(dice, held_out=held_out)


def write(dice: Dice) -> Conversation:
    """Write one request and its JSON answer."""
    text, value = exchange(dice)
    return Conversation([user(vary_case(dice, text)), assistant(dumps(value))])


def check(dice: Dice) -> Check:
    """Write one request about unseen people and things."""
    text, value = exchange(dice, held_out=True)
    return Check("json", [user(text)], dumps(value), mode="json")


ABILITY = Ability("json", 1.5, write, check)
