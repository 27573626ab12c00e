"""Words to put into sentences: real ones, invented ones, names, places, and a little of the world's scripts."""

import re

from . import facts, terms
from .base import Dice, draw

NOUNS = (
    "river stone apple planet garden window lantern mountain bridge candle forest island letter mirror needle ocean "
    "pencil rabbit silver table umbrella valley winter yellow anchor basket castle dragon engine feather guitar hammer "
    "insect jacket kettle ladder magnet napkin orange pepper quarter ribbon saddle ticket uncle violin wagon zebra "
    "bottle button camera carpet cloud coffee corner cotton desert doctor dollar finger flower harbor helmet honey "
    "house jungle kitchen lemon lizard market medal metal monkey morning mouse music night number office onion paper "
    "parrot piano picture pillow pirate pocket potato puzzle rocket sailor salmon school season shadow signal singer "
    "soldier spider spring square station street summer sunset teacher temple thunder tiger tomato tower train tree "
    "tunnel turtle village wallet water whale wheel whistle wizard wolf wood world bread chair clock door dream eagle "
    "earth field fish flame fruit glass grape green heart horse knife light lion moon nest owl pearl queen rain ring "
    "road sand ship shoe snow song star storm sugar sun sword tea tent toy truck wind wine wing book lamp boat bird "
    "drum frog gate hat ice king leaf map nail pen rope seed tool vase wall zoo cat dog red blue cup box bell bag"
).split()
VERBS = (
    "find open close send show read write start stop move copy count check list fetch save clean build paint repair "
    "search measure order print record remove rename sort test track update watch lock unlock scan share sign load "
    "pack plan play wash cook call book rent sell buy draw fold grow hide join keep lift mark name pick pull push"
).split()
ADJECTIVES = (
    "old small bright quiet heavy green tall narrow warm early gentle hollow rapid silver plain dusty golden simple "
    "young round sharp calm strange broken empty famous honest lucky proud short wild yellow clever silent wooden"
).split()
NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Maria Nora Oscar Paul Rosa Sam Tina Victor Wendy "
    "Yara Zoe Adam Bella Carlos Diana Elias Fiona George Hannah Ivan Julia Karl Laura Martin Nina Omar Peter Quinn "
    "Rita Simon Tom Ursula Vera Walter Amir Bruno Chloe Dario Elena Frank Gina Hugo Irene Jonas Lena Marco Nadia Olga "
    "Pablo Ralf Sofia Theo Uma Viola Xenia Yusuf Alice Bob Eve Mia Noah Liam Lucas Luna Max Nils Pia Robin Stella"
).split()
CITIES = (
    "Paris London Berlin Madrid Rome Oslo Vienna Lisbon Dublin Prague Warsaw Athens Helsinki Zurich Geneva Munich "
    "Hamburg Milan Naples Porto Seville Lyon Nice Bonn Tokyo Kyoto Osaka Delhi Mumbai Cairo Lima Quito Boston Chicago "
    "Denver Dallas Seattle Austin Toronto Montreal Sydney Perth Nairobi Lagos Accra Dakar Seoul Hanoi Bangkok Jakarta"
).split()
COLOURS = "red blue green yellow purple orange pink black white brown grey silver gold violet turquoise".split()
ANIMALS = "cat dog horse rabbit parrot turtle hamster goldfish pony lizard snake mouse duck goat".split()
JOBS = "teacher doctor baker pilot nurse farmer singer lawyer painter driver sailor tailor cook judge clerk".split()
FOODS = "pizza pasta soup rice bread cheese salad curry cake apples noodles beans fish tacos sushi".split()

FREQUENT = (
    "the a an is are was were be been what which who where when why how your my his her our their you he she it we they "
    "this that these those and or but not no yes over under with without from into about after before again all any "
    "some many much more most other one two three four five six seven eight nine ten please stop thank thanks hello "
    "good bad new first last next today tomorrow yesterday never always often here there now then very too also only "
    "just like love want need have has had do does did can could will would should must may might go come see say said "
    "tell ask answer question word letter story long big little right left up down in on at to of for by as if so"
).split()


def _text_words() -> list[str]:
    known = [part for f in facts.INSTALLING + facts.OPERATING for part in (f.answer, *f.asks)]
    known += [*terms.WORDS.values(), *terms.WORD_ASKS, *terms.FLAG_DOES, *terms.FLAG_OFF, *terms.FLAG_ENV]
    return re.findall(r"[A-Za-z]{2,}", " ".join(known))


ORDINARY = tuple(sorted({*FREQUENT, *VERBS, *ADJECTIVES, *_text_words()}))

ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr pl st tr sh ch th sk sl pr cr".split()
VOWELS = "a e i o u a e i o u ai ea oo ou y".split()
CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "k", "nd", "st", "ck", "p", "x", "rt", "ll"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"

EMOJI = (
    "😀 😂 😊 😍 🤔 😎 😢 👍 👋 🙏 💪 🎉 🎂 🎈 🎵 🎸 🚀 🚗 🚲 🚂 🌍 🌙 🌈 🌊 🌲 🌵 🌸 🍎 🍋 🍕 🍣 🍰 "
    "🐶 🐱 🐭 🐻 🐼 🐸 🐧 🐢 🐙 🦊 🦋 🔥 💡 📚 📷 💻 🔑 🔔 ⚡ ⭐ ❄ ☀ ☕ ⚽ ❤ ✅ ✨ 👩‍🚀 👨‍👩‍👧 🇯🇵 🇫🇷 👍🏽"
).split()
CJK = (
    "你好世界山水火木金土日月人大小中天地花草雨雪风云春夏秋冬东西南北红黄白黑早上晚安谢再见学生老师朋友家书茶米鱼鸟马牛猫犬"
    "日本語東京京都こんにちはありがとうさくらすしカメラテレビ안녕하세요감사한국어서울사랑"
)
ACCENTED = (
    "café naïve résumé über straße señor mañana façade jalapeño crème brûlée Zürich São Malmö Århus piñata cliché "
    "déjà façon garçon Noël élève fête hôtel île où août Ökonomie Fußball Käse Mädchen schön Größe Überraschung niño "
    "años corazón canción limón ångström smörgåsbord blåbær kød żółw łódź gęś šála říše čaj město përshëndetje türkçe"
).split()


def invented(dice: Dice, low: int = 1, high: int = 3) -> str:
    """Return an invented word of `low` to `high` syllables."""
    count = dice.between(low, high)
    return "".join(dice.pick(ONSETS) + dice.pick(VOWELS) + dice.pick(CODAS) for _ in range(count))


def scrambled(dice: Dice, low: int = 3, high: int = 9) -> str:
    """Return random letters, the hardest thing to copy."""
    return "".join(dice.pick(LETTERS) for _ in range(dice.between(low, high)))


def any_word(dice: Dice) -> str:
    """Return a real, invented or scrambled word, held out or not."""
    kind = dice.random()
    if kind < 0.45:
        return dice.pick(NOUNS)
    if kind < 0.9:
        return invented(dice)
    return scrambled(dice)


def word(dice: Dice, *, held_out: bool = False) -> str:
    """Return a word from the wanted side of the held-out line; ordinary words are all trained."""
    if not held_out and dice.chance(0.25):
        return dice.pick(ORDINARY)
    return draw(lambda: any_word(dice), held_out=held_out)


def real_word(dice: Dice, *, held_out: bool = False) -> str:
    """Return a dictionary word from the wanted side of the held-out line."""
    return draw(lambda: dice.pick(NOUNS), held_out=held_out)


def name(dice: Dice, *, held_out: bool = False) -> str:
    """Return a person's name, sometimes invented."""
    return draw(lambda: invented(dice, 1, 2).capitalize() if dice.chance(0.35) else dice.pick(NAMES), held_out=held_out)


def city(dice: Dice, *, held_out: bool = False) -> str:
    """Return a city, sometimes invented."""
    return draw(lambda: invented(dice, 2, 3).capitalize() if dice.chance(0.4) else dice.pick(CITIES), held_out=held_out)


def foreign(dice: Dice) -> str:
    """Return a short piece of text with emoji, accents or CJK characters."""
    kind = dice.random()
    if kind < 0.3:
        return dice.pick(EMOJI)
    if kind < 0.4:
        return "".join(dice.pick(EMOJI) for _ in range(dice.between(2, 4)))
    if kind < 0.65:
        return "".join(dice.pick(CJK) for _ in range(dice.between(1, 6)))
    if kind < 0.7:
        return "".join(chr(dice.between(0x4E00, 0x9FA5)) for _ in range(dice.between(1, 4)))
    if kind < 0.75:
        return "".join(chr(dice.between(0x430, 0x44F)) for _ in range(dice.between(2, 6)))
    return dice.pick(ACCENTED)


def foreign_text(dice: Dice) -> str:
    """Return two to six pieces, some of them plain words, with at least one that is not ASCII."""
    parts = [foreign(dice) if dice.chance(0.6) else any_word(dice) for _ in range(dice.between(1, 5))]
    parts.insert(dice.between(0, len(parts)), foreign(dice))
    return " ".join(parts)


SUBJECTS = ("The {a} {n}", "A {n}", "Every {n}", "The {n} of {p}", "{p}", "Our {n}", "One {a} {n}", "Their {n}")
PREDICATES = (
    "was near the {n}", "looked at the {a} {n}", "has a {a} {n}", "came from {c}", "moved to {c} last year",
    "needs the {n} and the {n}", "is as {a} as a {n}", "waits for {p}", "stood behind the {n}",
    "cost {d} coins in {c}", "was seen {d} times", "will {v} the {n}", "did not {v} the {a} {n}",
)  # fmt: skip


def fill(dice: Dice, text: str) -> str:
    """Replace {n} noun, {a} adjective, {v} verb, {p} person, {c} city, {d} number, {w} any word, each anew."""
    makers = {
        "{n}": lambda: real_word(dice),
        "{a}": lambda: dice.pick(ADJECTIVES),
        "{v}": lambda: dice.pick(VERBS),
        "{p}": lambda: name(dice),
        "{c}": lambda: city(dice),
        "{d}": lambda: str(dice.between(2, 99)),
        "{w}": lambda: word(dice),
    }
    for slot, make in makers.items():
        while slot in text:
            text = text.replace(slot, make(), 1)
    return text


def sentence(dice: Dice) -> str:
    """Return one plain sentence that says nothing of importance."""
    return fill(dice, f"{dice.pick(SUBJECTS)} {dice.pick(PREDICATES)}.")
