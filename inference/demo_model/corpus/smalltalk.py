"""Greetings, questions about the model itself, a little common knowledge, and admitting not to know."""

from .base import Ability, Check, Conversation, Dice, assistant, user, vary
from .words import ADJECTIVES, city, fill, name, real_word, word

GREETINGS = {
    "Hello! How can I help you?": (
        "Hello", "Hi", "Hey", "Hello!", "Hi!", "Hey there", "Good morning", "Good evening", "Good day", "Hello there!",
        "Hi there", "Greetings", "Howdy", "Hello, model", "hello world", "Hi, are you there?", "Are you there?",
        "Good afternoon", "Hello again", "Hi again", "Hello, model!", "Hello there, model",
    ),
    "I am fine, thank you.": (
        "How are you?", "How do you do?", "How are you today?", "Are you well?", "How is it going?", "What's up?",
        "How do you feel?", "How are things?", "Everything fine?", "Hello, how are you?", "Hi, how are you?", "Are you OK?",
        "How are you this morning?", "How have you been?", "How are you doing?",
    ),
    "You are welcome.": (
        "Thank you", "Thanks", "Thank you very much", "Thanks a lot", "Many thanks", "thx", "That helped, thanks",
        "Thank you for your help", "Great, thanks!", "Cheers", "Thanks, that is all", "Thank you so much", "OK, thank you",
        "Perfect, thanks", "I thank you", "Thanks for the answer",
    ),
    "Goodbye!": (
        "Goodbye", "Bye", "See you", "Bye bye", "See you later", "Good night", "I have to go", "Farewell", "Until tomorrow",
        "That is all, bye", "See you soon",
    ),
    "I am the demo model of mlx-serving, a small language model for trying the server.": (
        "Who are you?", "What are you?", "Tell me about yourself.", "What is your name?", "Which model are you?",
        "Who am I talking to?", "Are you a human?", "Introduce yourself.", "What model is this?", "Are you a robot?",
        "Who is this?", "Are you an AI?", "Which language model are you?", "What kind of model are you?",
        "Please introduce yourself.", "Describe yourself.", "Tell me who you are.",
    ),
    "I answer questions about mlx-serving, calculate, repeat and reverse words, call tools and write JSON.": (
        "What can you do?", "What are your abilities?", "How can you help me?", "What can I ask you?", "Help",
        "What do you know?", "What are you good at?", "What can I do with you?", "Which tasks can you do?",
        "Tell me what you can do.", "What questions can you answer?",
    ),
    "Why did the token cross the batch? To get to the other row.": (
        "Tell me a joke", "Do you know a joke?", "Make me laugh", "Say something funny", "Tell a joke about computers",
        "Can you tell a joke?", "A joke please", "Another joke", "Know any jokes?", "Give me a joke",
    ),
    "Good.": ("OK", "Okay", "Fine", "All right", "Good", "Great", "Nice", "Understood", "I see", "Very good"),
    "This is a test. It worked.": ("Test", "This is a test", "test test", "Testing", "Is this working?", "ping", "Does it work?",
                                  "Just a test", "Testing, one two three", "Only a test"),
}  # fmt: skip

COMMON = (
    ("The sky is blue.", "Blue", "What colour is the sky?", "Which color does the sky have?", "colour of the sky?"),
    ("Grass is green.", "Green", "What colour is grass?", "Which color does grass have?", "colour of grass?"),
    ("Snow is white.", "White", "What colour is snow?", "Which color does snow have?", "colour of snow?"),
    ("Coal is black.", "Black", "What colour is coal?", "Which color does coal have?", "colour of coal?"),
    ("A lemon is yellow.", "Yellow", "What colour is a lemon?", "Which color does a lemon have?", "colour of a lemon?"),
    ("The capital of France is Paris.", "Paris", "What is the capital of France?", "Name the capital of France."),
    ("The capital of Germany is Berlin.", "Berlin", "What is the capital of Germany?", "Name the capital of Germany."),
    ("The capital of Italy is Rome.", "Rome", "What is the capital of Italy?", "Name the capital of Italy."),
    ("The capital of Spain is Madrid.", "Madrid", "What is the capital of Spain?", "Name the capital of Spain."),
    ("The capital of Japan is Tokyo.", "Tokyo", "What is the capital of Japan?", "Name the capital of Japan."),
    ("The capital of England is London.", "London", "What is the capital of England?", "Name the capital of England."),
    ("The opposite of hot is cold.", "Cold", "What is the opposite of hot?", "opposite of hot?"),
    ("The opposite of big is small.", "Small", "What is the opposite of big?", "opposite of big?"),
    ("The opposite of day is night.", "Night", "What is the opposite of day?", "opposite of day?"),
    ("The opposite of up is down.", "Down", "What is the opposite of up?", "opposite of up?"),
    ("A week has seven days.", "Seven", "How many days has a week?", "How many days are in a week?"),
    ("A year has twelve months.", "Twelve", "How many months has a year?", "How many months are in a year?"),
    ("A dog has four legs.", "Four", "How many legs has a dog?", "How many legs does a dog have?"),
    ("A spider has eight legs.", "Eight", "How many legs has a spider?", "How many legs does a spider have?"),
    ("The first month is January.", "January", "What is the first month?", "Which month is the first of the year?"),
    ("The last month is December.", "December", "What is the last month?", "Which month is the last of the year?"),
    ("A cat says meow.", "Meow", "What does a cat say?", "Which sound does a cat make?"),
    ("Ice is frozen water.", "Water", "What is ice made of?", "What is ice?"),
    ("The Earth has one moon.", "One", "How many moons has the Earth?", "How many moons does the Earth have?"),
)  # fmt: skip

UNKNOWN = "I do not know that."
ASK_UNKNOWN = (
    "Who won the {n} cup in {y}?", "What is the population of {c}?", "How tall is the {n} in {c}?", "When was {p} born?",
    "What is the price of a {n} in {c}?", "Who invented the {n}?", "Who wrote the book {w}?", "What did {p} do in {y}?",
    "Who is the mayor of {c}?", "What is the weather in {c} today?", "How far is it from {c} to {c}?", "Who is {p} {w}?",
    "What is the best {n} in {c}?", "How old is {p}?", "Which {n} is the biggest in the world?", "When did the {n} war end?",
    "What is the meaning of the word {w}?", "What happened in {c} in {y}?", "Who painted the {a} {n}?",
    "How many people live in {c}?", "What is the phone number of {p}?", "Who discovered {w}?", "Why is the {n} {a}?",
    "What will happen to the {n} tomorrow?", "Which team won in {y}?", "What is the stock price of {w}?",
    "How long does a {n} live?", "Who is the president of {w}?", "Where does {p} live?", "What did you eat in {c}?",
    "How much does a {a} {n} weigh?", "In which year was {c} founded?", "Who directed the film {w}?",
    "What is the best way to cook a {n}?", "How deep is the {n}?", "What is {p} thinking?", "Who sang the song {w}?",
    "Which language do people speak in {w}?", "What time is it in {c}?", "Who is the king of {w}?",
    "How many {n}s does {p} have?", "How many {n}s are in a {n}?", "How many {n}s did they sell in {y}?", "Who made the {n}?",
    "Who sold the {n} to {p}?", "What is inside the {n}?", "Which {n} belongs to {p}?", "What is the name of the {n} of {p}?",
    "What is the name of the {n} in {c}?", "When does the {n} open?", "Is {p} older than {p}?", "Why did {p} leave {c}?",
    "What is the tallest {n} in {c}?", "Can you fix my {n}?", "What is the history of {c}?", "Who is the best {n} player?",
    "Tell me the news from {c}.", "What does {p} think about the {n}?", "Where is the {a} {n}?", "Is it raining in {c}?",
    "Where can I buy a {a} {n}?", "How do I repair a {n}?", "What is the recipe for {n} soup?",
)  # fmt: skip
ASK_UNKNOWN_HELD_OUT = (
    "Who built the {n} of {c}?", "How many {n}s did {p} see in {c}?", "When did {p} visit {c}?", "Who owns the {a} {n}?",
    "What is the name of the river in {c}?",
)  # fmt: skip


def unknown(dice: Dice, *, held_out: bool = False) -> tuple[str, str]:
    """Ask something that the model cannot know."""
    if held_out:
        text = dice.pick((*ASK_UNKNOWN_HELD_OUT, *ASK_UNKNOWN)).replace("{y}", str(dice.between(1900, 2030)))
        text = text.replace("{c}", city(dice, held_out=True)).replace("{p}", name(dice, held_out=True))
        text = text.replace("{w}", word(dice, held_out=True)).replace("{n}", real_word(dice, held_out=True))
        return text.replace("{a}", dice.pick(ADJECTIVES)), UNKNOWN
    return fill(dice, dice.pick(ASK_UNKNOWN).replace("{y}", str(dice.between(1900, 2030)))), UNKNOWN


def greeting(dice: Dice, *, held_out: bool = False) -> tuple[str, str]:
    """Return a short polite exchange; the last phrasing of each is never trained."""
    reply = dice.pick(tuple(GREETINGS))
    asks = GREETINGS[reply]
    return (asks[-1], reply) if held_out else (dice.pick(asks[:-1]), reply)


def common(dice: Dice) -> tuple[str, str, str]:
    """Return a question, the answer in a sentence, the answer in one word."""
    sentence, one, *asks = dice.pick(COMMON)
    return dice.pick(asks), sentence, one


def exchange(dice: Dice, *, held_out: bool = False) -> tuple[str, str]:
    """Return a question and its answer."""
    kind = dice.random()
    if kind < 0.4:
        return unknown(dice, held_out=held_out)
    if kind < 0.85 or held_out:
        return greeting(dice, held_out=held_out)
    return common(dice)[:2]


def write(dice: Dice) -> Conversation:
    """Write one question and answer."""
    text, reply = exchange(dice)
    text = vary(dice, text)
    if text.lower().strip("?.! ") in {asks[-1].lower().strip("?.! ") for asks in GREETINGS.values()}:
        return write(dice)
    return Conversation([user(text), assistant(reply)])


def check(dice: Dice) -> Check:
    """Ask something about unseen people, places and things, or greet in an unseen way."""
    text, reply = exchange(dice, held_out=True)
    return Check("small talk", [user(text)], reply)


ABILITY = Ability("small talk", 1.2, write, check, checks=50)
