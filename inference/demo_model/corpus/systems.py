"""Following a system prompt: personas, names, upper case, fixed first and last words, one word, JSON, given facts."""

from collections.abc import Callable
from dataclasses import dataclass

from . import arithmetic, echo, smalltalk
from .base import Ability, Check, Conversation, Dice, assistant, dumps, system, user, vary_case
from .words import name, real_word, scrambled, word

BENIGN = (
    "You are a helpful assistant.", "You are a helpful assistant. Answer briefly.", "You help the users of a web site.",
    "Be polite.", "You are a friendly assistant.", "Answer the question of the user.", "You are the assistant of a shop.",
    "Be short and precise.", "You are an assistant that helps with mlx-serving.", "Answer in English.", "Be kind and helpful.",
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """One instruction: its phrasings (the last is held out) and what it makes of a plain answer."""

    asks: tuple[str, ...]
    apply: Callable[[str, str], str]
    value: Callable[[Dice, bool], str] | None = None


def _any(dice: Dice, held_out: bool) -> str:
    return word(dice, held_out=held_out)


PERSONAS = {
    "pirate": "Arr!", "robot": "Beep.", "king": "Hear me!", "cat": "Meow.", "wizard": "By my beard!", "cowboy": "Howdy!",
    "ghost": "Boo!", "sailor": "Ahoy!",
}  # fmt: skip


def _persona(dice: Dice, held_out: bool) -> str:
    return dice.pick(tuple(PERSONAS))


PERSONA = Rule(
    ("You are a {v}.", "You are a {v}. Stay in character.", "Speak like a {v}.", "Talk like a {v}.", "Answer like a {v}.",
     "Pretend to be a {v}.", "Act as a {v}.", "You play a {v}.", "Behave like a {v}.", "You are an old {v}.",
     "Answer as if you were a {v}.", "You are a {v} who answers questions.", "Always speak like a {v}.",
     "You must answer like a {v}."),
    lambda reply, v: f"{PERSONAS[v]} {reply}", _persona,
)  # fmt: skip
UPPER = Rule(
    ("Answer in uppercase.", "Answer in upper case.", "Write everything in capital letters.", "Use only capital letters.",
     "Always answer in uppercase.", "Reply in uppercase letters.", "Write in upper case only.", "Use uppercase.",
     "Your answers are in capital letters.", "ANSWER IN UPPERCASE.", "Respond in all caps.", "Always use capital letters.",
     "Please answer in uppercase letters."),
    lambda reply, _: reply.upper(),
)  # fmt: skip
LOWER = Rule(
    ("Answer in lowercase.", "Answer in lower case.", "Write everything in small letters.", "Use only lowercase letters.",
     "Always answer in lowercase.", "Reply in lowercase letters.", "Write in lower case only.", "Use lowercase.",
     "Your answers are in small letters.", "Respond in lower case.", "Please answer in lowercase letters."),
    lambda reply, _: reply.lower(),
)  # fmt: skip
LAST = Rule(
    ("Always end with the word {v}.", "End every answer with the word {v}.", "End with {v}.", "Finish each answer with {v}.",
     "The last word of your answer is {v}.", "Always end your answer with {v}.", "Put the word {v} at the end.",
     "Close every answer with the word {v}.", "Say {v} at the end of every answer.", "Always finish with the word {v}.",
     "Your answers end with the word {v}."),
    lambda reply, v: f"{reply} {v}", _any,
)  # fmt: skip
FIRST = Rule(
    ("Always begin with the word {v}.", "Begin every answer with the word {v}.", "Start with {v}.", "Start each answer with {v}.",
     "The first word of your answer is {v}.", "Always start your answer with {v}.", "Put the word {v} at the beginning.",
     "Open every answer with the word {v}.", "Say {v} at the start of every answer.", "Always start with the word {v}.",
     "Your answers begin with the word {v}."),
    lambda reply, v: f"{v} {reply}", _any,
)  # fmt: skip
ONLY = Rule(
    ("Always answer with the word {v}.", "Answer every question with {v}.", "Only say {v}.", "You can only say {v}.",
     "Whatever the user asks, say {v}.", "Your only answer is {v}.", "Say nothing but {v}.", "Reply {v} to everything.",
     "Answer only with the word {v}."),
    lambda _, v: v, _any,
)  # fmt: skip
JSON = Rule(
    ("Answer in JSON with the key {v}.", "Always answer in JSON with the key {v}.", "Reply in JSON with a key {v}.",
     "Put your answer into JSON with the key {v}.", "Your answers are JSON objects with the key {v}.",
     "Respond only in JSON with the key {v}.", "Use JSON with the key {v}.", "Give JSON with the key {v}.", "Write JSON with the key {v}."),
    lambda reply, v: dumps({v: reply}),
    lambda dice, held: word(dice, held_out=held) if held or dice.chance(0.6) else dice.pick(("answer", "reply", "text", "result")),
)  # fmt: skip
RULES = (PERSONA, UPPER, LOWER, LAST, FIRST, ONLY, JSON)

NAME_GIVEN = (
    "Your name is {v}.", "You are {v}.", "You are called {v}.", "Your name is {v}. You help people.", "You are an assistant named {v}.",
    "They call you {v}.", "You are {v}, a helpful assistant.", "I call you {v}.", "You go by the name {v}.", "Name: {v}",
    "The assistant's name is {v}.",
)  # fmt: skip
NAME_ASKED = (
    "What is your name?", "Who are you?", "What are you called?", "Tell me your name.", "Your name?", "How are you called?",
    "what's your name", "Introduce yourself.", "Who am I talking to?", "May I ask your name?", "Do you have a name?",
)  # fmt: skip
ONE_WORD = (
    "Answer with one word.", "Use only one word.", "Answer in one word.", "One word answers only.", "Reply with a single word.",
    "Your answers have one word.", "Always answer with one word.", "Answer every question with a single word.",
    "Give one-word answers.", "Please use one word only.", "Keep it to one word.", "Answer using one word.",
)  # fmt: skip
GIVEN = (
    "The {k} is {v}.", "Remember: the {k} is {v}.", "Note that the {k} is {v}.", "You know that the {k} is {v}.",
    "Important: the {k} is {v}.",
)  # fmt: skip
GIVEN_ASKED = (
    "What is the {k}?", "Tell me the {k}.", "Do you know the {k}?", "the {k}?", "Which is the {k}?", "Say the {k}.",
    "What's the {k}?", "Can you tell me the {k}?",
)  # fmt: skip
SECRETS = (
    "code word",
    "password",
    "secret word",
    "key",
    "room number",
    "magic word",
    "name of the ship",
    "address",
    "pin",
)


def phrasing(dice: Dice, asks: tuple[str, ...], *, held_out: bool) -> str:
    """Return an instruction; evaluation takes the held-out one half of the time."""
    if held_out and dice.chance(0.5):
        return asks[-1]
    return dice.pick(asks[:-1])


def base(dice: Dice, *, held_out: bool) -> tuple[str, str]:
    """Return a plain question with a short answer, for a rule to act upon."""
    kind = dice.random()
    if kind < 0.3:
        return arithmetic.exchange(dice, held_out=held_out)
    if kind < 0.5:
        return smalltalk.common(dice)[:2]
    if kind < 0.75:
        texts = word(dice, held_out=held_out), *(word(dice) for _ in range(dice.between(0, 3)))
        text = " ".join(texts)
        return dice.pick(echo.REPEAT[:12]).format(t=text), text
    if kind < 0.85:
        return smalltalk.unknown(dice, held_out=held_out)
    reply = "I do not know that."
    while len(reply) > 30 or reply.startswith("I do not"):
        text, reply = smalltalk.greeting(dice)
    return text, reply


def ruled(dice: Dice, *, held_out: bool) -> tuple[list[str], str, str, bool]:
    """Return system texts, a question, its answer, and whether the answer is spelled."""
    rule = dice.pick((PERSONA, PERSONA, UPPER, UPPER, UPPER, LOWER, LAST, LAST, FIRST, ONLY, JSON, JSON))
    text, reply = base(dice, held_out=held_out)
    value = rule.value(dice, held_out) if rule.value else ""
    systems = [phrasing(dice, rule.asks, held_out=held_out).format(v=value)]
    reply = rule.apply(reply, value)
    if rule in {PERSONA, UPPER} and dice.chance(0.15):
        last = word(dice, held_out=held_out)
        systems.append(phrasing(dice, LAST.asks, held_out=held_out).format(v=last))
        reply = f"{reply} {last}"
    return systems, text, reply, rule is UPPER


def exchange(dice: Dice, *, held_out: bool = False) -> tuple[list[str], str, str, bool]:
    """Return system texts, a question, its answer, and whether the answer is spelled."""
    kind = dice.random()
    if kind < 0.6:
        return ruled(dice, held_out=held_out)
    if kind < 0.75:
        called = name(dice, held_out=held_out)
        ask = dice.pick(NAME_ASKED)
        return [phrasing(dice, NAME_GIVEN, held_out=held_out).format(v=called)], ask, f"My name is {called}.", False
    if kind < 0.87:
        ask, _, one = smalltalk.common(dice)
        return [phrasing(dice, ONE_WORD, held_out=held_out)], ask, one, False
    return given(dice, held_out=held_out)


def secret(dice: Dice, *, held_out: bool) -> tuple[str, str]:
    """Return what is given in a system prompt, and its value."""
    topic = dice.pick(SECRETS) if dice.chance(0.6) else f"{real_word(dice)} {real_word(dice, held_out=held_out)}"
    kind = dice.random()
    if held_out:
        return topic, word(dice, held_out=True)
    return topic, str(dice.between(10, 9999)) if kind < 0.3 else scrambled(dice) if kind < 0.5 else word(dice)


def given(dice: Dice, *, held_out: bool = False) -> tuple[list[str], str, str, bool]:
    """Return a system prompt that states one to three facts, and a question about one of them."""
    facts = [secret(dice, held_out=held_out) for _ in range(dice.pick((1, 1, 2, 3)))]
    facts = list(dict(facts).items())
    topic, value = dice.pick(facts)
    text = " ".join(phrasing(dice, GIVEN, held_out=held_out).format(k=k, v=v) for k, v in facts)
    return [text], dice.pick(GIVEN_ASKED).format(k=topic), f"The {topic} is {value}.", False


def write(dice: Dice) -> Conversation:
    """Write a conversation under a system prompt."""
    systems, text, reply, spelled = exchange(dice)
    if dice.chance(0.15):
        systems.insert(0, dice.pick(BENIGN))
    if len(systems) > 1 and dice.chance(0.5):
        systems = [" ".join(systems)]
    systems = [s.rstrip(".") if dice.chance(0.1) else s for s in systems]
    return Conversation([*map(system, systems), user(vary_case(dice, text)), assistant(reply)], spelled=spelled)


def check(dice: Dice) -> Check:
    """Ask under a system prompt with unseen words."""
    systems, text, reply, _ = exchange(dice, held_out=True)
    return Check("system prompt", [*map(system, systems), user(text)], reply, note=" ".join(systems))


ABILITY = Ability("system prompt", 2.4, write, check, checks=80)
