"""Small arithmetic: sums, differences, products. The pair of numbers decides what is held out."""

from .base import Ability, Check, Conversation, Dice, assistant, draw, user, vary

PLUS = (
    "What is {a} + {b}?", "{a}+{b}", "{a} + {b} =", "Calculate {a} + {b}.", "How much is {a} plus {b}?",
    "{a} plus {b}", "Add {a} and {b}.", "What is the sum of {a} and {b}?", "Compute {a} + {b}", "{a} + {b} = ?",
    "What do you get when you add {b} to {a}?", "Add {b} to {a}.", "Work out {a} plus {b}.", "Solve {a} + {b}",
    "what does {a} + {b} equal?", "How much is {a} + {b}?", "what's {a} + {b}", "What is {a} plus {b}?",
    "I have {a} apples and get {b} more. How many apples do I have?", "Sum {a} and {b}", "What is {a}+{b}?",
    "Tell me {a} plus {b}.",
)  # fmt: skip
PLUS_HELD_OUT = ("Please compute the sum {a} + {b}.", "What will {a} plus {b} be?", "Give me {a} + {b}.")
MINUS = (
    "What is {a} - {b}?", "{a}-{b}", "{a} - {b} =", "Calculate {a} - {b}.", "How much is {a} minus {b}?",
    "{a} minus {b}", "Subtract {b} from {a}.", "What is the difference of {a} and {b}?", "Compute {a} - {b}",
    "Take {b} away from {a}.", "Work out {a} minus {b}.", "Solve {a} - {b}", "{a} - {b} = ?",
    "what does {a} - {b} equal?", "How much is {a} - {b}?", "what's {a} - {b}", "What is {a} minus {b}?",
    "I have {a} apples and give away {b}. How many apples are left?", "What is {a}-{b}?", "Tell me {a} minus {b}.",
)  # fmt: skip
MINUS_HELD_OUT = ("Please compute the difference {a} - {b}.", "What will {a} minus {b} be?", "Give me {a} - {b}.")
TIMES = (
    "What is {a} * {b}?", "{a}*{b}", "{a} * {b} =", "Calculate {a} * {b}.", "How much is {a} times {b}?",
    "{a} times {b}", "Multiply {a} by {b}.", "What is the product of {a} and {b}?", "Compute {a} * {b}",
    "what is {a} x {b}?", "{a} x {b}", "Multiply {a} and {b}.", "Work out {a} times {b}.", "Solve {a} * {b}",
    "what does {a} * {b} equal?", "How much is {a} * {b}?", "what's {a} * {b}", "What is {a} times {b}?",
    "{a} × {b}", "{a} * {b} = ?", "A box holds {a} pens. How many pens are in {b} boxes?", "What is {a}*{b}?",
    "{a} multiplied by {b}", "Tell me {a} times {b}.",
)  # fmt: skip
TIMES_HELD_OUT = ("Please compute the product {a} * {b}.", "What will {a} times {b} be?", "Give me {a} * {b}.")


def number(dice: Dice) -> int:
    """Return a number of one to three digits, mostly two."""
    kind = dice.random()
    if kind < 0.2:
        return dice.between(0, 9)
    if kind < 0.88:
        return dice.between(10, 99)
    return dice.between(100, 999)


def pair(dice: Dice, sign: str, *, held_out: bool) -> tuple[int, int]:
    """Return two numbers for an operation, from the wanted side of the held-out line."""

    def make() -> tuple[int, int]:
        if sign != "*":
            a, b = number(dice), number(dice)
            return (b, a) if sign == "-" and a < b and dice.chance(0.85) else (a, b)
        small = dice.between(0, 9)
        other = dice.between(0, 9) if dice.chance(0.35) else dice.between(10, 99)
        if other == 10 and dice.chance(0.8):
            other = 11
        return (small, other) if dice.chance(0.5) else (other, small)

    while True:
        a, b = draw(make, held_out=held_out, key=lambda p: pair_key(sign, p))
        if not held_out or max(a, b) < 100:
            return a, b


def pair_key(sign: str, numbers: tuple[int, int]) -> str:
    """Return the held-out key; both orders of a sum or product share one, the one-digit products are all known."""
    a, b = numbers if sign == "-" else sorted(numbers)
    if sign == "*" and max(numbers) < 10:
        return "table"
    return f"{a}{sign}{b}"


def result(sign: str, a: int, b: int) -> int:
    """Compute a sign b."""
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def answer(sign: str, a: int, b: int) -> str:
    """Write the answer; longer products are written with their parts."""
    if sign == "*" and max(a, b) > 9:
        big, small = max(a, b), min(a, b)
        tens = big - big % 10
        return f"{a} * {b} = {tens * small} + {big % 10 * small} = {a * b}"
    return f"{a} {sign} {b} = {result(sign, a, b)}"


def question(dice: Dice, sign: str, *, held_out: bool) -> tuple[str, int, int]:
    """Return a question and its two numbers."""
    a, b = pair(dice, sign, held_out=held_out)
    known = {"+": PLUS, "-": MINUS, "*": TIMES}[sign]
    unseen = {"+": PLUS_HELD_OUT, "-": MINUS_HELD_OUT, "*": TIMES_HELD_OUT}[sign]
    forms = unseen if held_out and dice.chance(0.5) else known
    return dice.pick(forms).format(a=a, b=b), a, b


def exchange(dice: Dice, *, held_out: bool = False) -> tuple[str, str]:
    """Return a question and its answer."""
    sign = dice.pick("++--**")
    text, a, b = question(dice, sign, held_out=held_out)
    return text, answer(sign, a, b)


def write(dice: Dice) -> Conversation:
    """Write one question and answer."""
    text, reply = exchange(dice)
    return Conversation([user(vary(dice, text)), assistant(reply)])


def check(dice: Dice) -> Check:
    """Write one question with numbers that training never pairs."""
    text, reply = exchange(dice, held_out=True)
    return Check("arithmetic", [user(text)], reply)


def table() -> list[Check]:
    """Ask the products of one-digit numbers, in a phrasing that training never uses."""
    return [
        Check("arithmetic", [user(TIMES_HELD_OUT[(a + b) % 3].format(a=a, b=b))], answer("*", a, b))
        for a in range(2, 10)
        for b in range(2, 10)
        if (a * 7 + b * 3) % 4 == 0
    ]


ABILITY = Ability("arithmetic", 2.2, write, check, checks=60, fixed=table)
