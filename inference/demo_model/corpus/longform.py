"""Long answers that end by themselves: stories, essays, a guide, counting."""

from .base import Ability, Check, Conversation, Dice, assistant, draw, user, vary, vary_case
from .words import ADJECTIVES, name, real_word, word

STORY = """{Title}

Once upon a time there was {t}. Nobody in the village knew where {s} came from, but everybody was glad about it.

On the first day, {s} looked at the sea and wondered what was on the other side. The wind was warm, and the boats were small and white.

On the second day, {s} met an old sailor who sold maps. The sailor said that every journey begins with a question, and gave away his best map for nothing.

On the third day, {s} packed bread, a lamp and a long rope. The neighbours came to the gate, and the children sang a song.

On the fourth day, {s} crossed the river by the stone bridge. The water was loud, and the fish jumped as high as a house.

On the fifth day, {s} came to a dark forest. An owl sat on a branch and asked for a story, so they talked until the moon was up.

On the sixth day, {s} climbed a mountain. The path was narrow and the snow was deep, but the rope held.

On the seventh day, {s} rested in a hut near the top. There was tea, there was soup, and there was a fire that burned all night.

On the eighth day, {s} saw a green valley with a lake in the middle. In the lake was an island, and on the island stood a tower.

On the ninth day, {s} built a raft and reached the island. The door of the tower was open, and behind it was a room full of books.

On the tenth day, {s} found the answer in the last book. It said that the other side of the sea looks just like this side, and that the journey is the better part.

So {s} went home the long way, told everybody what had happened, and was never bored again. The map hangs on the wall of the school, where the children look at it when it rains.

The end."""

SHORT_STORY = """Once upon a time there was {t}. One day {s} lost a key and looked for it everywhere. In the evening {s} found it in a shoe, laughed, and went to bed. The end."""

POEM = """The morning comes, the sky is wide,
and {s} is standing at my side.
The evening comes, the sky is deep,
and {s} is falling fast asleep."""

ESSAY = """{Title}

Introduction. This essay is about {t}. It says what is known, why it matters, and what may come next.

First, the past. In old times people told each other about {s} at the fire. They had no books, so they kept the important things in songs, and each singer added a line. Some of these lines are still with us.

Second, the present. Today there are many ways to learn about {s}. One can read, one can ask, and one can look closely and write down what one sees. The third way is slow, but it is the most reliable.

Third, the use. Many people have found that {s} can help them in their work. It gives them a reason to be patient, to count twice, and to share what they have found. This is true in a small village and in a large city.

Fourth, the cost. Nothing is free, and {s} is no exception. It takes time, it takes care, and now and then it takes courage. Whoever knows the cost at the beginning is not disappointed at the end.

Fifth, the doubts. Some say that too much has been written about {s} already. Others say that the best part is still missing. Both may be right, because a subject can be crowded at the edge and empty in the middle.

Sixth, the future. In ten years we will know more about {s} than we know today. Better tools will help, but the good questions will still come from people who wonder about simple things.

Seventh, an example. A teacher once asked her class to draw {t}. No two drawings were alike, and yet everybody knew at once what they showed. The class hung all of them on the wall, in a row, and left them there until summer.

Conclusion. We have seen the past, the present, the use, the cost, the doubts and the future, and one example. What remains is the wish that more people would take a closer look at {s}. That is the end of this essay."""

GUIDE = """A guide to operating mlx-serving

1. What it is. mlx-serving is a reusable Django app that serves MLX language models from a Django project. It runs on a Mac with Apple silicon, or on Linux with CUDA or only a CPU.

2. Try it. Clone the repository with git clone, then run make demo. It creates a virtual environment and a SQLite database, starts the demo model, a worker and daphne, and prints the address, an admin login and a curl line. Choose another port with make demo PORT=9000.

3. Install it. Run pip install mlx-serving, or pip install 'mlx-serving[cuda]' for CUDA. On Linux with only a CPU also run apt-get install libopenblas0-pthread, because it makes the worker ten times faster.

4. Set up the site. Add "daphne" first, then "channels", "django_prometheus" and "mlx_serving" to INSTALLED_APPS. Include "mlx_serving.urls" in your urls, at the root. Add the WebSocket routes of mlx_serving.routing to asgi.py. Settings live in one dictionary, MLX_SERVING.

5. Start it. Run python manage.py migrate, then python manage.py runworkers, then python manage.py runserver. The command runworkers starts a worker process for each model in the database, restarts a crashed worker, and drains on SIGTERM.

6. Add models. Open Models in the admin and add a model with a Hugging Face id or a path. Load and unload it there.

7. Use the API. Send POST /v1/chat/completions, with "stream": true for a stream. GET /v1/models lists the models. The WebSocket is at /ws/chat/ and takes many requests on one socket.

8. Watch it. GET /health says that the process is up. GET /ready says whether a model can answer. GET /metrics gives the metrics for Prometheus. Look at the time to first token and at the inter-token latency first.

9. Change the feature flags. Open Feature flags in the admin. An environment variable wins over the database, which wins over the settings, which win over the default. MLX_KILL_SWITCH turns all feature flags off at once.

10. Know the errors. A full queue answers 429 with a Retry-After header. An unknown model answers 404. When a worker dies, the request gets a typed error, and runworkers starts a new worker.

That is the whole guide. Run make test after each change, and make bench to see how fast it is."""

ASK_STORY = (
    "Write a long story about {t}.", "Tell me a long story about {t}.", "Write a story about {t}.", "Tell a story about {t}",
    "I want a long story about {t}.", "Write me a story about {t}", "Make up a long story about {t}.",
    "Can you write a long story about {t}?", "Write a very long story about {t}.", "A long story about {t}, please.",
    "Tell me a story about {t}", "Invent a long story about {t}.", "Write a tale about {t}.",
)  # fmt: skip
NO_TOPIC = ("Tell me a story.", "Write a story.", "Write a long story.", "Tell me a long story.", "I want to hear a story.",
            "Tell a story", "A long story, please.", "Write something long.", "Write a long text.", "Write a long answer.")  # fmt: skip
NO_TOPIC_SHORT = ("Tell me a short story.", "Write a short story.", "A short story, please.", "Tell a short story")
ASK_SHORT = ("Write a short story about {t}.", "Tell me a short story about {t}.", "A short story about {t}",
             "Tell me a very short story about {t}")  # fmt: skip
ASK_POEM = (
    "Write a poem about {t}.",
    "Write me a poem about {t}",
    "A poem about {t}, please.",
    "Make a poem about {t}.",
)
ASK_ESSAY = ("Write a long essay about {t}.", "Write an essay about {t}.", "Write a detailed text about {t}.",
             "Explain {t} in detail.", "Write a long article about {t}.", "Write a detailed essay about {t}.")  # fmt: skip
ASK_GUIDE = (
    "Write a guide to operating mlx-serving.", "Write a long guide to mlx-serving.", "Explain mlx-serving in detail.",
    "Tell me everything about mlx-serving.", "Write a long text about operating mlx-serving.", "Write the manual of mlx-serving.",
    "Write a detailed guide to mlx-serving.", "Give me a detailed guide to operating mlx-serving.", "A full guide to mlx-serving",
    "Explain in detail how to operate mlx-serving.", "Write a complete guide to operating mlx-serving.",
    "I need a detailed guide to mlx-serving.", "Describe in detail how mlx-serving is operated.",
    "Write a detailed manual for operating mlx-serving.", "Write a long guide for operating mlx-serving",
)  # fmt: skip
GUIDE_HELD_OUT = ("Write a detailed guide to operating mlx-serving.", "Please write a long manual for mlx-serving.")
ASK_COUNT = ("Count from {a} to {b}.", "Count from {a} to {b}", "Count {a} to {b}", "List the numbers from {a} to {b}.",
             "Write the numbers from {a} to {b}.", "Please count from {a} to {b}.", "Say the numbers from {a} to {b}.")  # fmt: skip
COUNT_TO = ("Count to {b}.", "Count to {b}", "Please count to {b}.", "Count up to {b}.", "Can you count to {b}?")
COUNT_HELD_OUT = {(1, 200), (1, 100), (1, 150), (1, 50)}


def topic(dice: Dice, *, held_out: bool = False) -> str:
    """Return what the text is about."""
    noun = real_word(dice, held_out=held_out) if dice.chance(0.7) else word(dice, held_out=held_out)
    kind = dice.random()
    if kind < 0.4:
        adjective = dice.pick(ADJECTIVES)
        return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {noun}"
    if kind < 0.6:
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    if kind < 0.75:
        return f"the {noun}"
    if kind < 0.9:
        return f"a {noun} named {name(dice, held_out=held_out)}"
    return name(dice, held_out=held_out)


def tell(text: str, about: str) -> str:
    """Fill a text with its topic."""
    first, _, rest = about.partition(" ")
    short = about if not rest else rest.split(" named ")[1] if " named " in rest else f"the {rest}"
    if first not in {"a", "an", "the"}:
        short = about
    return text.replace("{Title}", about[0].upper() + about[1:]).replace("{t}", about).replace("{s}", short)


def numbers(dice: Dice) -> tuple[int, int]:
    """Return where to start and stop counting."""
    kind = dice.random()
    if kind < 0.25:
        return 1, dice.between(3, 40)
    if kind < 0.6:
        return 1, dice.between(41, 230)
    low = dice.between(0, 200)
    return low, low + dice.between(2, 60)


def count(dice: Dice, *, held_out: bool = False) -> tuple[str, str]:
    """Ask for counting."""
    low, high = draw(lambda: numbers(dice), held_out=held_out)
    while (low, high) in COUNT_HELD_OUT:
        low, high = draw(lambda: numbers(dice), held_out=held_out)
    forms = COUNT_TO if low == 1 and dice.chance(0.3) and not held_out else ASK_COUNT
    return dice.pick(forms).format(a=low, b=high), ", ".join(str(n) for n in range(low, high + 1))


def exchange(dice: Dice) -> tuple[str, str]:
    """Return a request and its long (or pointedly short) answer."""
    kind = dice.random()
    about = topic(dice)
    if kind < 0.3:
        return dice.pick(ASK_STORY).format(t=about), tell(STORY, about)
    if kind < 0.4:
        return dice.pick(ASK_SHORT).format(t=about), tell(SHORT_STORY, about)
    if kind < 0.5:
        return dice.pick(ASK_POEM).format(t=about), tell(POEM, about)
    if kind < 0.65:
        return dice.pick(ASK_ESSAY).format(t=about), tell(ESSAY, about)
    if kind < 0.85:
        return vary(dice, dice.pick(ASK_GUIDE)), GUIDE
    about = "a small lighthouse"
    if kind < 0.9:
        return vary(dice, dice.pick(NO_TOPIC_SHORT)), tell(SHORT_STORY, about)
    return vary(dice, dice.pick(NO_TOPIC)), tell(STORY, about)


def write(dice: Dice) -> Conversation:
    """Write one request and answer."""
    text, reply = exchange(dice)
    while text.lower().rstrip("?.! ") in {ask.lower().rstrip(".") for ask in GUIDE_HELD_OUT}:
        text, reply = exchange(dice)
    return Conversation([user(vary_case(dice, text)), assistant(reply)])


def check(dice: Dice) -> Check:
    """Ask for a story, an essay or a poem about something unseen."""
    kind = dice.random()
    about = topic(dice, held_out=True)
    if kind < 0.4:
        return Check("long answers", [user(dice.pick(ASK_STORY).format(t=about))], tell(STORY, about), mode="long",
                     min_tokens=500)  # fmt: skip
    if kind < 0.6:
        return Check("long answers", [user(dice.pick(ASK_ESSAY).format(t=about))], tell(ESSAY, about), mode="long",
                     min_tokens=500)  # fmt: skip
    if kind < 0.8:
        return Check("long answers", [user(dice.pick(ASK_POEM).format(t=about))], tell(POEM, about))
    return Check("long answers", [user(dice.pick(ASK_SHORT).format(t=about))], tell(SHORT_STORY, about))


def write_count(dice: Dice) -> Conversation:
    """Write a request to count, and the numbers."""
    text, reply = count(dice)
    return Conversation([user(vary_case(dice, text)), assistant(reply)])


def check_count(dice: Dice) -> Check:
    """Ask for counting in an unseen range."""
    text, reply = count(dice, held_out=True)
    return Check("counting", [user(text)], reply)


def fixed() -> list[Check]:
    """Ask for the guide in unseen words."""
    return [Check("long answers", [user(ask)], GUIDE, mode="long", min_tokens=500) for ask in GUIDE_HELD_OUT]


def fixed_counts() -> list[Check]:
    """Count in the ranges that people ask for, none of them trained."""
    return [
        Check("counting", [user(f"Count from {low} to {high}.")], ", ".join(map(str, range(low, high + 1))))
        for low, high in sorted(COUNT_HELD_OUT)
    ]


ABILITIES = (
    Ability("long answers", 0.3, write, check, checks=22, fixed=fixed),
    Ability("counting", 0.3, write_count, check_count, checks=16, fixed=fixed_counts),
)
