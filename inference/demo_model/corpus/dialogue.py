"""Conversations of several turns: remembering what was said, going on with a result, long irrelevant texts."""

from collections.abc import Callable

from . import arithmetic, echo, product, smalltalk, structured, systems
from .base import (
    Ability,
    Check,
    Conversation,
    Dice,
    Message,
    assistant,
    draw,
    dumps,
    is_held_out,
    system,
    user,
    vary_case,
)
from .words import ANIMALS, COLOURS, FOODS, JOBS, city, name, sentence, word

Memory = tuple[tuple[str, ...], str, tuple[str, ...], str]

MEMORIES: dict[str, Memory] = {
    "name": (
        ("My name is {v}.", "I am {v}.", "I'm {v}.", "Hello, my name is {v}.", "Hi, I am {v}", "They call me {v}.",
         "You can call me {v}.", "I am called {v}.", "Please call me {v}.", "Hello, this is {v}."),
        "Nice to meet you, {v}.",
        ("What is my name?", "Who am I?", "Do you remember my name?", "What am I called?", "Tell me my name.", "my name?",
         "What's my name?", "Do you know my name?", "How am I called?", "Can you tell me my name?"),
        "Your name is {v}.",
    ),
    "colour": (
        ("My favourite colour is {v}.", "I like the colour {v} best.", "My favorite color is {v}.", "{v} is my favourite colour.",
         "The colour I like most is {v}.", "I love the color {v}.", "I think my favourite colour is {v}."),
        "I will remember that your favourite colour is {v}.",
        ("What is my favourite colour?", "Which colour do I like?", "What is my favorite color?", "Do you remember my favourite colour?",
         "Which colour do I like best?", "my favourite colour?", "Can you tell me my favourite colour?"),
        "Your favourite colour is {v}.",
    ),
    "number": (
        ("Remember the number {v}.", "My number is {v}.", "Keep the number {v} in mind.", "Please remember {v}.", "The number is {v}.",
         "I think of the number {v}.", "Note the number {v}.", "My lucky number is {v}.", "Please keep the number {v}."),
        "I will remember the number {v}.",
        ("What is the number?", "Which number did I say?", "What was the number?", "Which number was it?", "Tell me the number.",
         "Do you remember the number?", "What number did I tell you?", "the number?", "Can you tell me the number?"),
        "The number is {v}.",
    ),
    "city": (
        ("I live in {v}.", "My home is {v}.", "I am from {v}.", "My city is {v}.", "I come from {v}.", "My home town is {v}."),
        "{v} sounds like a nice place.",
        ("Where do I live?", "In which city do I live?", "Where am I from?", "What is my city?", "Do you remember where I live?",
         "Can you tell me where I live?"),
        "You live in {v}.",
    ),
    "pet": (
        ("My pet is a {v}.", "I have a {v}.", "I own a {v}.", "There is a {v} in my house.", "I have got a {v}."),
        "A {v} is a good pet.",
        ("What pet do I have?", "Which pet do I have?", "Which animal do I have?", "What is my pet?", "Can you tell me which pet I have?"),
        "You have a {v}.",
    ),
    "job": (
        ("I work as a {v}.", "My job is {v}.", "I am a {v} by profession.", "I have a job as a {v}."),
        "It must be interesting to work as a {v}.",
        ("What is my job?", "What do I do for a living?", "Which job do I have?", "As what do I work?", "Can you tell me my job?"),
        "You work as a {v}.",
    ),
    "word": (
        ("Remember the word {v}.", "The secret word is {v}.", "Keep the word {v} in mind.", "The code word is {v}.", "Please keep the word {v}."),
        "I will remember the word {v}.",
        ("What is the word?", "Which word was it?", "What was the word?", "Which word did I say?", "Tell me the word.",
         "What is the secret word?", "Do you remember the word?", "Can you tell me the word?"),
        "The word is {v}.",
    ),
    "food": (
        ("My favourite food is {v}.", "I like {v} best.", "I love to eat {v}.", "I really like {v}."),
        "{v} is a good choice.",
        ("What is my favourite food?", "What do I like to eat?", "Which food do I like?", "Can you tell me my favourite food?"),
        "Your favourite food is {v}.",
    ),
}  # fmt: skip

ADD_TO_THAT = ("Add {n} to that.", "add {n} to that", "And plus {n}?", "plus {n}", "Now add {n}.", "Add {n} more.", "And {n} more?",
               "Add another {n}.", "Please add {n} to it.")  # fmt: skip
TAKE_FROM_THAT = ("Subtract {n} from that.", "And minus {n}?", "minus {n}", "Now subtract {n}.", "Take away {n}.", "Subtract {n}",
                  "Please subtract {n} from it.")  # fmt: skip
DOUBLE_THAT = (
    "Multiply that by {n}.",
    "times {n}",
    "And times {n}?",
    "Now multiply by {n}.",
    "Please multiply it by {n}.",
)
IN_REVERSE = ("And in reverse?", "and in reverse?", "Now in reverse.", "In reverse?", "And backwards?", "Now backwards", "Reverse that.",
              "And the other way round?", "Now reverse it.", "Reverse it.", "Backwards, please", "Now the reverse", "And reversed?",
              "Please reverse that.")  # fmt: skip
AGAIN = (
    "Again",
    "Say it again.",
    "Once more",
    "Repeat that.",
    "Can you repeat that?",
    "What did you say?",
    "Please say it again.",
    "Please repeat it.",
    "Say that again, please",
    "Repeat it",
    "Please repeat your answer.",
    "One more time",
    "Say it once more.",
    "Could you repeat that?",
    "Could you say that again?",
)


def memory_value(dice: Dice, topic: str, *, held_out: bool) -> str:
    """Return something to remember."""
    makers: dict[str, Callable[[], str]] = {
        "name": lambda: name(dice, held_out=held_out),
        "city": lambda: city(dice, held_out=held_out),
        "number": lambda: draw(lambda: str(dice.between(0, 9999)), held_out=held_out),
        "word": lambda: word(dice, held_out=held_out),
    }
    lists = {"colour": COLOURS, "pet": ANIMALS, "job": JOBS, "food": FOODS}
    if topic in makers:
        return makers[topic]()
    return word(dice, held_out=held_out) if dice.chance(0.25) else dice.pick(lists[topic])


def capital(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def pick_form(dice: Dice, forms: tuple[str, ...], *, held_out: bool) -> str:
    """Return a phrasing; the last one is for evaluation only."""
    if held_out and dice.chance(0.5):
        return forms[-1]
    return dice.pick(forms[:-1])


def remember(dice: Dice, *, held_out: bool = False) -> list[Message]:
    """Tell one to three things and ask for one of them, with or without small talk between."""
    topics = dice.some(tuple(MEMORIES), dice.pick((1, 1, 1, 2, 3)))
    if held_out:
        topics = dice.some([t for t in topics if t in {"name", "city", "number", "word"}] or ["name"], 1)
    values = {topic: memory_value(dice, topic, held_out=held_out) for topic in topics}
    messages: list[Message] = []
    for topic in topics:
        tells, reply, _, _ = MEMORIES[topic]
        messages.append(user(capital(pick_form(dice, tells, held_out=held_out).format(v=values[topic]))))
        messages.append(assistant(capital(reply.format(v=values[topic]))))
    if dice.chance(0.3):
        messages += turns(*simple(dice))
    asked = dice.some(topics, 1 if held_out or dice.chance(0.8) else 2)
    for topic in asked:
        _, _, asks, reply = MEMORIES[topic]
        messages.append(user(pick_form(dice, asks, held_out=held_out)))
        messages.append(assistant(reply.format(v=values[topic])))
    return messages


def turns(text: str, reply: str) -> list[Message]:
    """Return a question and its answer as messages."""
    return [user(text), assistant(reply)]


def simple(dice: Dice) -> tuple[str, str]:
    """Return a plain exchange of any kind."""
    return dice.pick((arithmetic.exchange, smalltalk.exchange, product.exchange, echo.repeat, echo.reverse_list))(dice)


def go_on(dice: Dice, *, held_out: bool = False) -> list[Message]:
    """Calculate, and calculate on with the result."""
    while True:
        sign = dice.pick("++-*")
        text, a, b = arithmetic.question(dice, sign, held_out=False)
        total = arithmetic.result(sign, a, b)
        second = dice.pick("++-*")
        number = dice.between(2, 9) if second == "*" else dice.between(1, 99)
        fits = 0 < total < (100 if second == "*" else 1000) and (second != "-" or number <= total)
        if fits and is_held_out(arithmetic.pair_key(second, (total, number))) == held_out:
            break
        if fits and second == "*" and max(total, number) < 10:
            break
    forms = {"+": ADD_TO_THAT, "-": TAKE_FROM_THAT, "*": DOUBLE_THAT}[second]
    messages = turns(text, arithmetic.answer(sign, a, b))
    answer = arithmetic.answer(second, total, number)
    return messages + turns(pick_form(dice, forms, held_out=held_out).format(n=number), answer)


def reverse_it(dice: Dice, *, held_out: bool = False) -> tuple[list[Message], bool]:
    """Repeat words or spell one, then ask for the reverse."""
    if dice.chance(0.3):
        text = echo.letters_word(dice, held_out=held_out)
        reverse, spelled = text[::-1], True
    else:
        text = draw(lambda: echo.words_text(dice, 2, 5), held_out=held_out)
        reverse, spelled = " ".join(reversed(text.split())), False
    messages = turns(dice.pick(echo.REPEAT).format(t=text), text)
    return messages + turns(pick_form(dice, IN_REVERSE, held_out=held_out), reverse), spelled


def again(dice: Dice, *, held_out: bool = False) -> list[Message]:
    """Ask for the last answer once more."""
    text, reply = echo.repeat(dice, held_out=True) if held_out else simple(dice)
    return turns(text, reply) + turns(pick_form(dice, AGAIN, held_out=held_out), reply)


def two_turns(dice: Dice, *, held_out: bool = False) -> tuple[list[Message], bool]:
    """Return a conversation whose last turn needs an earlier one, and whether its answer is spelled."""
    kind = dice.random()
    if kind < 0.5:
        return remember(dice, held_out=held_out), False
    if kind < 0.75:
        return go_on(dice, held_out=held_out), False
    if kind < 0.9:
        return reverse_it(dice, held_out=held_out)
    return again(dice, held_out=held_out), False


def write(dice: Dice) -> Conversation:
    """Write a conversation of two or more turns."""
    messages, spelled = two_turns(dice)
    if dice.chance(0.2):
        messages = turns(*simple(dice)) + messages
    if dice.chance(0.15):
        messages.insert(0, system(dice.pick(systems.BENIGN)))
    return Conversation(messages, spelled=spelled)


def check(dice: Dice) -> Check:
    """Ask for something unseen that was said a turn before."""
    messages, _ = two_turns(dice, held_out=True)
    return Check("two turns", messages[:-1], str(messages[-1]["content"]))


def filler(dice: Dice, words: int) -> str:
    """Return about `words` words that say nothing of importance."""
    parts: list[str] = []
    length = 0
    while length < words:
        part = sentence(dice) if dice.chance(0.85) else dice.pick(product.all_facts()).answer
        parts.append(part)
        length += part.count(" ") + 1
    paragraphs = [" ".join(parts[i : i + 8]) for i in range(0, len(parts), 8)]
    return dice.pick(("\n", "\n\n", " ")).join(paragraphs)


def long_prompt(dice: Dice, *, held_out: bool = False, words: int | None = None) -> tuple[list[Message], bool]:
    """Put a long irrelevant text before a question; sometimes the answer stands in the text."""
    count = words or dice.pick((30, 60, 100, 200, 350, 550, 900, 900, 1700))
    text = filler(dice, dice.between(count // 2, count))
    kind = dice.random()
    if kind < 0.35:
        facts, ask, reply, _ = systems.given(dice, held_out=held_out)
        lines = text.split(". ")
        lines.insert(dice.between(0, len(lines)), facts[0].rstrip("."))
        return [system(". ".join(lines)), *turns(ask, reply)], False
    if kind < 0.5:
        rules, ask, reply, spelled = systems.ruled(dice, held_out=held_out)
        text = f"{' '.join(rules)}\n{text}" if dice.chance(0.5) else f"{text}\n{' '.join(rules)}"
        return [system(text), *turns(ask, reply)], spelled
    if kind < 0.65:
        messages, spelled = two_turns(dice, held_out=held_out)
        return [system(text), *messages], spelled
    if held_out:
        makers: tuple[Callable[..., tuple[str, str]], ...] = (arithmetic.exchange, echo.repeat, echo.reverse_list)
        return [system(text), *turns(*dice.pick(makers)(dice, held_out=True))], False
    if dice.chance(0.1):
        ask, value = structured.exchange(dice)
        return [system(text), *turns(ask, dumps(value))], False
    return [system(text), *turns(*simple(dice))], False


def write_long(dice: Dice) -> Conversation:
    """Write a conversation after a long system text."""
    messages, spelled = long_prompt(dice)
    messages[-2] = user(vary_case(dice, str(messages[-2]["content"])))
    return Conversation(messages, spelled=spelled)


def check_long(dice: Dice) -> Check:
    """Ask after a system text of about 1,000 to 2,000 tokens."""
    messages, _ = long_prompt(dice, held_out=True, words=850)
    return Check("long prompts", messages[:-1], str(messages[-1]["content"]))


ABILITIES = (
    Ability("two turns", 1.8, write, check, checks=60),
    Ability("long prompts", 0.6, write_long, check_long, checks=24),
)
