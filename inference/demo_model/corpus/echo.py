"""Repeating text, reversing lists of words, spelling words backwards."""

import re
from collections.abc import Callable
from functools import cache

from . import facts, longform, terms
from .base import BEFORE, Ability, Check, Conversation, Dice, assistant, draw, is_held_out, user, vary_case
from .words import foreign_text, invented, real_word, scrambled, sentence, word

REPEAT = (
    "Repeat after me: {t}", "Say: {t}", "Repeat: {t}", "Repeat this: {t}", "Echo: {t}", "Say this: {t}",
    "Please repeat: {t}", "Repeat the following text: {t}", "Copy this text: {t}", "Write exactly this: {t}",
    "Say exactly: {t}", "Just say {t}", "Please say: {t}", "Repeat the words: {t}", "Echo back: {t}",
    "Repeat the following: {t}", 'Say "{t}"', 'Repeat "{t}"', "Output this text: {t}", "Copy: {t}",
    "Repeat word for word: {t}", "Repeat after me:\n{t}", "Reply with: {t}", "Answer with exactly this: {t}",
    'Repeat after me: "{t}"', "Type: {t}",
)  # fmt: skip
REPEAT_HELD_OUT = ("Now repeat after me: {t}", "Please copy this: {t}", "Say the following: {t}", "Please echo: {t}")
REVERSE_LIST = (
    "Reverse the words: {t}", "Reverse this list of words: {t}", "Write these words in reverse order: {t}",
    "Reverse the order of the words: {t}", "Say these words backwards: {t}", "Reverse the list: {t}",
    "List these words from last to first: {t}", "Reverse these words: {t}", "Put these words in reverse order: {t}",
    "Words in reverse order: {t}", "Reverse: {t}", "Turn the order of these words around: {t}",
    "Please reverse the words: {t}", "Reverse the word order: {t}", "Now reverse these words: {t}", "Reverse the following list: {t}",
    "Please list in reverse order: {t}", "Can you reverse these words? {t}", "Backwards, word by word: {t}",
)  # fmt: skip
REVERSE_LIST_HELD_OUT = ("Please reverse this list: {t}", "Give these words in reverse order: {t}")
REVERSE_WORD = (
    "Reverse the word {t}", "Spell {t} backwards", "Spell the word {t} backwards.", "Write {t} backwards",
    "Reverse the letters of {t}.", "Write the word {t} in reverse.", "What is {t} spelled backwards?",
    "Reverse the word: {t}", 'Reverse the word "{t}"', "Reverse the letters of the word {t}.",
    "Read {t} backwards.", "Spell backwards: {t}", "How do you spell {t} backwards?", "What is {t} backwards?",
    "Write the letters of {t} in reverse order.", "Say {t} backwards", 'Spell "{t}" backwards', "Flip the word {t}.",
    "Reverse the spelling of {t}", "{t} backwards", "Write down {t} backwards", "Write down the word {t} backwards.",
    "Please spell the word {t} backwards", "Now reverse the word {t}.", "Give me the word {t} backwards.", "Can you spell {t} backwards?",
    "Can you reverse the word {t}?", "I want to read {t} backwards.", "Show me {t} in reverse.", "Turn the word {t} around.",
)  # fmt: skip
REVERSE_WORD_HELD_OUT = (
    "Please reverse the word {t}.", "Please spell {t} backwards.", "Can you write {t} backwards?",
)  # fmt: skip


@cache
def text_words() -> tuple[str, ...]:
    """Return the words that the product's facts and the stories use, less the held-out ones."""
    known = [f.answer for f in facts.INSTALLING + facts.OPERATING]
    known += [ask for f in facts.INSTALLING + facts.OPERATING for ask in f.asks]
    known += [longform.STORY, longform.ESSAY, longform.GUIDE, *terms.WORDS.values(), *terms.FLAGS]
    found = set(re.findall(r"[a-z]{2,}", " ".join(known).lower()))
    return tuple(sorted(w for w in found if not is_held_out(w)))


@cache
def questions() -> tuple[str, ...]:
    """Return questions and answers about the product, as sentences to repeat instead of answering."""
    known = [part for f in facts.INSTALLING + facts.OPERATING for part in (f.answer, *f.asks)]
    return tuple(part.replace("{x}", "mlx-serving") for part in known if not is_held_out(part))


def words_text(dice: Dice, low: int, high: int, *, held_out: bool = False) -> str:
    """Return some words in a row; when held out, each of them is unseen."""
    return " ".join(word(dice, held_out=held_out) for _ in range(dice.between(low, high)))


def plain_text(dice: Dice, *, held_out: bool = False) -> str:
    """Return something to repeat: words, a sentence, numbers, odd case."""
    if held_out:
        return draw(lambda: words_text(dice, 1, 6), held_out=True)
    kind = dice.random()
    if kind < 0.12:
        text = dice.pick(questions())
    elif kind < 0.45:
        text = words_text(dice, 1, 8)
    elif kind < 0.6:
        text = sentence(dice)
    elif kind < 0.67:
        text = " ".join(sentence(dice) for _ in range(dice.between(2, 4)))
    elif kind < 0.75:
        text = " ".join(str(dice.between(0, 999)) for _ in range(dice.between(1, 6)))
    elif kind < 0.8:
        text = ", ".join(word(dice) for _ in range(dice.between(2, 6)))
    elif kind < 0.85:
        text = " ".join(scrambled(dice) for _ in range(dice.between(1, 4)))
    elif kind < 0.92:
        text = f"{word(dice)}{dice.pick('-_./:')}{dice.between(0, 99)} {word(dice).capitalize()}{dice.pick('!?.;')}"
    else:
        text = words_text(dice, 1, 3).upper()
    return text


UPPER = (
    "Write {t} in capital letters.", "Uppercase: {t}", "Write in uppercase: {t}", "Put this into upper case: {t}",
    "Say in capital letters: {t}", "Make this uppercase: {t}", "Convert to upper case: {t}", "{t} in capital letters",
    "Capital letters: {t}", "Turn into uppercase: {t}", "Please write {t} in uppercase.", "Shout: {t}",
)  # fmt: skip
UPPER_HELD_OUT = ("Please write in capital letters: {t}", "Please convert to uppercase: {t}")


def upper(dice: Dice, *, held_out: bool = False) -> tuple[str, str]:
    """Ask for capital letters."""
    words = [word(dice, held_out=held_out), *(word(dice) for _ in range(dice.between(0, 3)))]
    if dice.chance(0.2) and not held_out:
        words = dice.some(text_words(), len(words))
    text = " ".join(words)
    return form(dice, UPPER, UPPER_HELD_OUT, held_out=held_out).format(t=text), text.upper()


def form(dice: Dice, known: tuple[str, ...], unseen: tuple[str, ...], *, held_out: bool) -> str:
    """Return a phrasing; evaluation takes half of its phrasings from the unseen ones."""
    return dice.pick(unseen if held_out and dice.chance(0.5) else known)


def repeat(dice: Dice, *, held_out: bool = False) -> tuple[str, str]:
    """Ask for a repetition."""
    text = draw(lambda: plain_text(dice, held_out=held_out), held_out=held_out)
    return form(dice, REPEAT, REPEAT_HELD_OUT, held_out=held_out).format(t=text), text


def unicode_repeat(dice: Dice, *, held_out: bool = False) -> tuple[str, str]:
    """Ask for a repetition of text that is not ASCII."""
    text = draw(lambda: foreign_text(dice), held_out=held_out)
    if dice.chance(0.12) and not held_out:
        text = " ".join(foreign_text(dice) for _ in range(dice.between(2, 6)))
    return form(dice, REPEAT, REPEAT_HELD_OUT, held_out=held_out).format(t=text), text


def reverse_list(dice: Dice, *, held_out: bool = False) -> tuple[str, str]:
    """Ask for words in reverse order."""
    words = draw(lambda: words_text(dice, 2, 6), held_out=held_out).split()
    if dice.chance(0.15) and not held_out:
        words = [str(dice.between(0, 99)) for _ in words]
    glue = dice.pick((" ", " ", " ", ", "))
    text = form(dice, REVERSE_LIST, REVERSE_LIST_HELD_OUT, held_out=held_out).format(t=glue.join(words))
    return text, glue.join(reversed(words))


def letters_word(dice: Dice, *, held_out: bool = False) -> str:
    """Return a word whose letters are to be reversed."""

    def make() -> str:
        kind = dice.random()
        if kind < 0.3:
            return scrambled(dice, 2, 10)
        if kind < 0.45:
            return dice.pick(text_words())
        return invented(dice) if kind < 0.65 else word(dice, held_out=held_out)

    if held_out:
        return draw(lambda: real_word(dice, held_out=True) if dice.chance(0.6) else invented(dice), held_out=True)
    return draw(make, held_out=False)


def reverse_word(dice: Dice, *, held_out: bool = False) -> tuple[str, str]:
    """Ask for a word's letters in reverse order."""
    text = letters_word(dice, held_out=held_out)
    if dice.chance(0.15) and not held_out:
        text = dice.pick((text.capitalize(), text.upper()))
    return form(dice, REVERSE_WORD, REVERSE_WORD_HELD_OUT, held_out=held_out).format(t=text), text[::-1]


Exchange = Callable[..., tuple[str, str]]


def _ability(name: str, weight: float, exchange: Exchange, *, spelled: bool = False) -> Ability:
    def write(dice: Dice) -> Conversation:
        text, reply = exchange(dice)
        if dice.chance(0.08):
            text = dice.pick(BEFORE) + text[:1].lower() + text[1:]
        return Conversation([user(vary_case(dice, text)), assistant(reply)], spelled=spelled)

    def check(dice: Dice) -> Check:
        text, reply = exchange(dice, held_out=True)
        return Check(name, [user(text)], reply)

    return Ability(name, weight, write, check)


ABILITIES = (
    _ability("repeat", 1.2, repeat),
    _ability("unicode", 1.2, unicode_repeat),
    _ability("reverse words", 1.0, reverse_list),
    _ability("reverse letters", 1.8, reverse_word, spelled=True),
    _ability("upper case", 0.8, upper, spelled=True),
)
