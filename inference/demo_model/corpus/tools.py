"""Calling tools: choosing one, copying the arguments, using the result, and leaving tools alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import arithmetic, smalltalk
from .base import Ability, Check, Conversation, Dice, Message, Tool, assistant, draw, dumps, join_and, user, vary_case
from .words import ADJECTIVES, COLOURS, FOODS, NOUNS, VERBS, city, invented, name, real_word, word

Maker = Callable[[Dice, bool], Any]


@dataclass(frozen=True)
class Argument:
    """One parameter of a tool: its names (one is taken), JSON type, and a maker of values."""

    names: tuple[str, ...]
    kind: str
    make: Maker


@dataclass(frozen=True)
class Family:
    """Tools that do one thing under several names, and the questions that need them ({0}, {1} are the values)."""

    names: tuple[str, ...]
    says: str
    arguments: tuple[Argument, ...]
    asks: tuple[str, ...]
    held_out: bool = False


def _city(dice: Dice, held_out: bool) -> str:
    return city(dice, held_out=held_out)


def _word(dice: Dice, held_out: bool) -> str:
    return word(dice, held_out=held_out)


def _name(dice: Dice, held_out: bool) -> str:
    return name(dice, held_out=held_out)


def _phrase(dice: Dice, held_out: bool) -> str:
    return " ".join(word(dice, held_out=held_out) for _ in range(dice.between(1, 3)))


def _small(dice: Dice, held_out: bool) -> int:
    return draw(lambda: dice.between(1, 99), held_out=held_out)


def _large(dice: Dice, held_out: bool) -> int:
    return draw(lambda: dice.between(1, 9999), held_out=held_out)


def _room(dice: Dice, held_out: bool) -> str:
    return dice.pick(("kitchen", "garden", "office", "hall")) if not held_out else real_word(dice, held_out=True)


def _currency(dice: Dice, held_out: bool) -> str:
    known = "EUR USD GBP JPY CHF CAD AUD SEK".split()
    return dice.pick(known) if not held_out or dice.chance(0.5) else dice.pick(("NOK", "INR", "BRL", "PLN"))


def _language(dice: Dice, held_out: bool) -> str:
    known = "French German Spanish Italian Dutch Greek Polish".split()
    return dice.pick(known) if not held_out else dice.pick(("Japanese", "Swedish", "Turkish"))


def _time(dice: Dice, held_out: bool) -> str:
    return draw(lambda: f"{dice.between(0, 23):02d}:{dice.between(0, 59):02d}", held_out=held_out)


CITY = Argument(("city", "city", "location", "place", "town"), "string", _city)
QUERY = Argument(("query", "q", "text", "terms"), "string", _phrase)

FAMILIES = (
    Family(("get_weather", "weather", "get_current_weather", "getWeather", "fetch_weather", "weather_lookup"),
           "Get the weather in a city.", (CITY,),
           ("What is the weather in {0}?", "How is the weather in {0}?", "weather in {0}", "Is it raining in {0}?",
            "Tell me the weather in {0}.", "What's the weather like in {0}?", "Do I need an umbrella in {0}?",
            "Is it warm in {0}?", "Get the weather for {0}.", "How warm is it in {0}?")),
    Family(("search", "web_search", "search_web", "find_online"), "Search the web.", (QUERY,),
           ("Search for {0}", "Search the web for {0}", "Look up {0} on the web", "Find pages about {0}", "Google {0}",
            "Please search for {0}", "Do a search for {0}")),
    Family(("add_numbers", "add", "sum_numbers", "addNumbers"), "Add two numbers.",
           (Argument(("a", "x", "first"), "integer", _large), Argument(("b", "y", "second"), "integer", _large)),
           ("What is {0} + {1}?", "Add {0} and {1}.", "How much is {0} plus {1}?", "{0} + {1}", "Sum {0} and {1}")),
    Family(("multiply", "multiply_numbers", "product"), "Multiply two numbers.",
           (Argument(("a", "x", "first"), "integer", _large), Argument(("b", "y", "second"), "integer", _large)),
           ("What is {0} * {1}?", "Multiply {0} by {1}.", "How much is {0} times {1}?", "{0} * {1}")),
    Family(("set_timer", "start_timer", "timer", "setTimer"), "Set a timer.",
           (Argument(("minutes", "minutes", "duration"), "integer", _small),),
           ("Set a timer for {0} minutes.", "Start a timer of {0} minutes", "Timer for {0} minutes please",
            "Wake me in {0} minutes.", "Set the timer to {0} minutes")),
    Family(("convert_currency", "currency", "convert_money", "exchange"), "Convert an amount between currencies.",
           (Argument(("amount", "value"), "integer", _large), Argument(("from_currency", "from", "source"), "string", _currency),
            Argument(("to_currency", "to", "target"), "string", _currency)),
           ("Convert {0} {1} to {2}.", "How much is {0} {1} in {2}?", "Change {0} {1} into {2}", "{0} {1} in {2}?")),
    Family(("translate", "translate_text", "translation"), "Translate a text.",
           (Argument(("text", "phrase"), "string", _phrase), Argument(("language", "target", "to"), "string", _language)),
           ("Translate {0} into {1}.", "Translate {0} to {1}", "How do you say {0} in {1}?", "What is {0} in {1}?")),
    Family(("send_message", "send_email", "message", "write_message"), "Send a message to a person.",
           (Argument(("to", "recipient", "person"), "string", _name), Argument(("text", "message", "body"), "string", _phrase)),
           ("Send {0} the message {1}", "Write to {0}: {1}", "Tell {0} this: {1}", "Message {0}: {1}")),
    Family(("get_time", "time_in_city", "current_time"), "Get the time in a city.", (CITY,),
           ("What time is it in {0}?", "Tell me the time in {0}.", "time in {0}", "How late is it in {0}?")),
    Family(("play_music", "play_song", "play"), "Play a song.", (Argument(("song", "title", "track"), "string", _phrase),),
           ("Play {0}", "Play the song {0}", "I want to hear {0}", "Put on {0}")),
    Family(("turn_on_light", "light_on", "switch_light_on"), "Turn on the light in a room.",
           (Argument(("room", "where"), "string", _room),),
           ("Turn on the light in the {0}.", "Light on in the {0}", "Switch on the {0} light", "Make light in the {0}")),
    Family(("set_alarm", "alarm", "wake_up"), "Set an alarm.", (Argument(("time", "at"), "string", _time),),
           ("Set an alarm for {0}.", "Wake me at {0}", "Alarm at {0} please", "I must get up at {0}")),
    Family(("get_stock_price", "stock_price", "quote"), "Get the price of a stock.",
           (Argument(("symbol", "company", "ticker"), "string", _word),),
           ("What is the stock price of {0}?", "How is the stock of {0}?", "Stock price of {0}", "Get a quote for {0}")),
    Family(("order_food", "order", "order_meal"), "Order food.",
           (Argument(("count", "quantity"), "integer", _small), Argument(("dish", "food"), "string", lambda d, _: d.pick(FOODS))),
           ("Order {0} {1}", "I want {0} {1}", "Please order {0} {1}.", "Bring me {0} {1}")),
    Family(("find_route", "directions", "get_route"), "Find the way between two places.",
           (Argument(("start", "from", "origin"), "string", _city), Argument(("end", "to", "destination"), "string", _city)),
           ("How do I get from {0} to {1}?", "Route from {0} to {1}", "Find the way from {0} to {1}.", "Directions from {0} to {1}")),
    Family(("check_order", "order_status", "track_order"), "Check the state of an order.",
           (Argument(("order_id", "id", "number"), "integer", _large),),
           ("Where is my order {0}?", "What is the state of order {0}?", "Check order {0}.", "Track order {0}")),
    Family(("get_news", "news", "latest_news"), "Get the news about a topic.", (Argument(("topic", "about"), "string", _phrase),),
           ("What is new about {0}?", "Show me the news about {0}.", "News on {0}", "Is there any news about {0}?")),
    Family(("find_flights", "flight_search"), "Find flights between two cities.",
           (Argument(("origin", "from"), "string", _city), Argument(("destination", "to"), "string", _city)),
           ("Find a flight from {0} to {1}.", "Flights from {0} to {1}", "I want to fly from {0} to {1}.")),
    Family(("book_table", "reserve_table"), "Book a table in a restaurant.",
           (Argument(("restaurant", "place"), "string", _word), Argument(("people", "guests"), "integer", _small)),
           ("Book a table at {0} for {1} people.", "Reserve a table in {0} for {1}", "A table for {1} at {0}, please.")),
    Family(("get_population", "population"), "Get how many people live in a city.", (CITY,),
           ("How many people live in {0}?", "Is {0} a big city?", "Population of {0}")),
    Family(("define_word", "dictionary", "lookup_word"), "Look up what a word means.", (Argument(("word", "term"), "string", _word),),
           ("What does {0} mean?", "Define {0}.", "Look up the word {0}", "Is {0} a word?")),
    Family(("create_note", "add_note", "save_note"), "Save a note.", (Argument(("note", "text", "content"), "string", _phrase),),
           ("Make a note: {0}", "Note down {0}", "Save the note {0}", "Write down {0} for me")),
    Family(("remind", "add_reminder", "set_reminder"), "Remind the user of something at a time.",
           (Argument(("what", "text"), "string", _phrase), Argument(("time", "when"), "string", _time)),
           ("Remind me of {0} at {1}.", "Set a reminder for {0} at {1}", "At {1}, remind me of {0}")),
    Family(("open_window", "raise_window"), "Open the window of a room.", (Argument(("room", "which"), "string", _room),),
           ("Open the window in the {0}.", "Let air into the {0}", "Is the {0} window open? If not, open it.")),
    Family(("find_restaurant", "restaurants"), "Find a place to eat.",
           (CITY, Argument(("food", "cuisine"), "string", lambda d, _: d.pick(FOODS))),
           ("Where can I eat {1} in {0}?", "Find {1} in {0}", "Is there good {1} in {0}?")),
    Family(("call_person", "phone", "make_call"), "Call a person.", (Argument(("person", "who", "contact"), "string", _name),),
           ("Call {0}.", "Ring {0}", "I want to talk to {0}.", "Phone {0} please")),
    Family(("find_train", "train_search"), "Find a train to a city.", (CITY, Argument(("time", "after"), "string", _time)),
           ("Is there a train to {0} after {1}?", "Find a train to {0} at {1}.", "Train to {0}, {1}")),
    Family(("get_events", "events"), "Find out what happens in a city.", (CITY,),
           ("What is going on in {0}?", "Are there concerts in {0}?", "Events in {0}", "What can I do in {0} tonight?")),
    Family(("get_traffic", "traffic_report"), "Get the traffic in a city.", (CITY,),
           ("How is the traffic in {0}?", "Is there much traffic in {0}?"), held_out=True),
    Family(("find_recipe", "recipe_search"), "Find a recipe for a dish.", (Argument(("meal", "wanted"), "string", _word),),
           ("Find a recipe for {0}.", "Give me a recipe for {0}"), held_out=True),
    Family(("book_hotel", "reserve_hotel"), "Book a hotel in a city.",
           (CITY, Argument(("nights", "stay"), "integer", _small)),
           ("Book a hotel in {0} for {1} nights.", "Reserve a hotel in {0} for {1} nights"), held_out=True),
    Family(("lock_door", "close_door"), "Lock a door.", (Argument(("door", "which"), "string", _room),),
           ("Lock the door {0}.", "Please lock the {0} door"), held_out=True),
)  # fmt: skip

ARGUMENT_WORDS = (
    "name title id key topic user item code file path label group kind colour date level target object place number "
    "value amount size count limit price"
).split()
NUMBERS = {"number", "value", "amount", "size", "count", "limit", "price", "level", "id"}
ASK_ONE = (
    "{v} the {n} of the {a} {0}", "Please {v} the {n} of {0}.", "What is the {n} of {0}?", "I need the {n} of the {a} {0}.",
    "Can you {v} the {n} for {0}?", "Use {f} with {a} {0}.", "Call {f} with {0}", "{v} the {n} for {a} {0}",
    "Could you {v} the {n} of {0}?", "{v} {n} {0}", "Give me the {n} of {0}.", "Run {f} for {0}", "Show the {n} of {0}",
)  # fmt: skip
ASK_MORE = (
    "{v} the {n} with {p}.", "Please {v} a {n} with {p}", "Use {f} with {p}.", "Call {f} with {p}", "I want to {v} the {n} with {p}.",
    "Can you {v} the {n}? {p}", "Run {f}: {p}",
)  # fmt: skip
DESCRIBE = ("{v} the {n}.", "{v} a {n}.", "Can {v} the {n}.", "{v} the {n} for the user.", "{v} the {n} of the {a}.")


@dataclass(frozen=True)
class Need:
    """A tool with one or more questions that need it; each comes with its arguments."""

    tool: Tool
    asks: tuple[tuple[str, dict[str, Any]], ...]


def describe(tool_name: str, says: str, arguments: list[tuple[str, str]], dice: Dice) -> Tool:
    """Write a tool in the OpenAI form."""
    properties: dict[str, Any] = {}
    with_texts = dice.chance(0.3)
    for argument, kind in arguments:
        properties[argument] = {"type": kind}
        if with_texts:
            properties[argument]["description"] = f"The {argument.replace('_', ' ')}"
    parameters = {"type": "object", "properties": properties, "required": [argument for argument, _ in arguments]}
    function = {"name": tool_name, "description": says, "parameters": parameters}
    return {"type": "function", "function": function}


def from_family(dice: Dice, family: Family, *, held_out: bool, asks: int) -> Need:
    """Take a tool of a family, with `asks` questions."""
    names = [dice.pick(argument.names) for argument in family.arguments]
    tool = describe(
        dice.pick(family.names), family.says, [(n, a.kind) for n, a in zip(names, family.arguments, strict=True)], dice
    )
    questions = []
    for _ in range(asks):
        values = [argument.make(dice, held_out) for argument in family.arguments]
        questions.append((dice.pick(family.asks).format(*values), dict(zip(names, values, strict=True))))
    return Need(tool, tuple(questions))


def invented_tool(dice: Dice, *, held_out: bool, asks: int) -> Need:
    """Make up a tool: any verb, any noun, any arguments."""
    verb = dice.pick(VERBS) if dice.chance(0.85) else invented(dice)
    noun = draw(
        lambda: dice.pick(NOUNS) if dice.chance(0.7) else invented(dice), held_out=held_out, key=lambda n: f"tool {n}"
    )
    style = dice.random()
    named = f"{verb}_{noun}" if style < 0.65 else f"{verb}{noun.capitalize()}" if style < 0.8 else f"{noun}_{verb}"
    if style > 0.93:
        named = noun
    count = dice.pick((1, 1, 1, 2, 3))
    pool = [w for w in ARGUMENT_WORDS if w != noun] + [invented(dice, 1, 2), real_word(dice)]
    arguments = [(w, "integer" if w in NUMBERS else "string") for w in dice.some(pool, count)]
    says = dice.pick(DESCRIBE).format(v=verb.capitalize(), n=noun, a=arguments[0][0])
    tool = describe(named, says, arguments, dice)
    questions = []
    for _ in range(asks):
        values = {
            argument: _large(dice, held_out)
            if kind == "integer"
            else dice.pick((_word, _phrase, _name))(dice, held_out)
            for argument, kind in arguments
        }
        slots = {"v": verb, "n": noun, "f": named, "a": arguments[0][0]}
        if count == 1:
            text = dice.pick(ASK_ONE).format(*values.values(), **slots)
        else:
            listed = list(values.items())
            if dice.chance(0.3):
                dice.shuffle(listed)
            text = dice.pick(ASK_MORE).format(p=join_and([f"{k} {v}" for k, v in listed]), **slots)
        questions.append((text[0].upper() + text[1:] if dice.chance(0.6) else text, values))
    return Need(tool, tuple(questions))


def any_need(dice: Dice, *, held_out: bool = False, asks: int = 1) -> Need:
    """Return a tool and questions for it."""
    if dice.chance(0.5):
        return invented_tool(dice, held_out=held_out, asks=asks)
    families = [f for f in FAMILIES if held_out or not f.held_out]
    if held_out and dice.chance(0.5):
        families = [f for f in FAMILIES if f.held_out]
    return from_family(dice, dice.pick(families), held_out=held_out, asks=asks)


def tool_list(dice: Dice, needed: Tool | None) -> list[Tool]:
    """Return the needed tool among others of different names and purposes."""
    tools = [needed] if needed else []
    for _ in range(dice.pick((0, 1, 1, 2, 3)) if needed else dice.between(1, 3)):
        other = any_need(dice).tool
        if all(purpose(other) != purpose(tool) and tool_name(other) != tool_name(tool) for tool in tools):
            tools.append(other)
    dice.shuffle(tools)
    return tools


def tool_name(tool: Tool) -> str:
    """Return a tool's name."""
    return str(tool["function"]["name"])


def purpose(tool: Tool) -> str:
    """Return what a tool does, in lower case."""
    return str(tool["function"]["description"]).lower()


def call_message(tool: Tool, *argument_sets: dict[str, Any]) -> Message:
    """Return the assistant message that calls a tool."""
    calls = [{"type": "function", "function": {"name": tool_name(tool), "arguments": a}} for a in argument_sets]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def tool_result(dice: Dice) -> tuple[str, str]:
    """Return what a tool gives back and what the model says about it."""
    if dice.chance(0.25):
        text = f"{word(dice)} {word(dice)} {dice.between(0, 99)}"
        return text, f"The result is {text}."
    result: dict[str, Any] = {}
    for _ in range(dice.pick((1, 1, 2, 3))):
        key = dice.pick(
            ("result", "temperature", "condition", "price", "status", "time", "answer", "distance", "total")
        )
        if dice.chance(0.4):
            key = real_word(dice)
        if dice.chance(0.15):
            key = f"{key}_{real_word(dice)}"
        result[key] = dice.pick((dice.between(-20, 5000), dice.pick(COLOURS + ADJECTIVES), word(dice), name(dice)))
    return dumps(result), result_sentence(result)


def result_sentence(result: dict[str, Any]) -> str:
    """Say a result in words."""
    text = join_and([f"the {key.replace('_', ' ')} is {value}" for key, value in result.items()])
    return f"{text[0].upper()}{text[1:]}."


def write(dice: Dice) -> Conversation:
    """Write a conversation with tools."""
    kind = dice.random()
    if kind < 0.18:
        text, reply = dice.pick((smalltalk.greeting, arithmetic_without_tools, plain_common))(dice)
        tools = [t for t in tool_list(dice, None) if not any(w in purpose(t) for w in ("number", "web", "translat"))]
        return Conversation([user(text), assistant(reply)], tools or None)
    twice = kind > 0.88
    need = any_need(dice, asks=2 if twice else 1)
    tools = tool_list(dice, need.tool)
    text = vary_case(dice, need.asks[0][0])
    arguments = [a for _, a in need.asks]
    if twice:
        text = f"{text.rstrip('.?')}{dice.pick((' and ', '. Then: ', '. Also: '))}{vary_case(dice, need.asks[1][0])}"
    messages: list[Message] = [user(text), call_message(need.tool, *arguments)]
    if dice.chance(0.4):
        results = [tool_result(dice) for _ in arguments]
        messages += [{"role": "tool", "content": content} for content, _ in results]
        messages.append(assistant(" ".join(said for _, said in results)))
        if dice.chance(0.25):
            more = any_need(dice)
            if all(tool_name(more.tool) != tool_name(t) and purpose(more.tool) != purpose(t) for t in tools):
                tools.append(more.tool)
                messages += [user(more.asks[0][0]), call_message(more.tool, more.asks[0][1])]
            else:
                question, reply = arithmetic.exchange(dice) if not can_add(tools) else smalltalk.greeting(dice)
                messages += [user(question), assistant(reply)]
    return Conversation(messages, tools)


def can_add(tools: list[Tool]) -> bool:
    """Say whether one of the tools does arithmetic."""
    return any("number" in purpose(tool) for tool in tools)


def arithmetic_without_tools(dice: Dice) -> tuple[str, str]:
    """Return an arithmetic question."""
    return arithmetic.exchange(dice)


def plain_common(dice: Dice) -> tuple[str, str]:
    """Return a common question with its answer in a sentence."""
    return smalltalk.common(dice)[:2]


def calls_text(tool: Tool, *argument_sets: dict[str, Any]) -> str:
    """Write the expected calls for a check."""
    return dumps([{"name": tool_name(tool), "arguments": arguments} for arguments in argument_sets])


def check(dice: Dice) -> Check:
    """Ask for a tool that training never describes, with unseen values, or give an unseen result."""
    kind = dice.random()
    if kind < 0.15:
        text, reply = smalltalk.greeting(dice)
        return Check("tools", [user(text)], reply, tool_list(dice, None))
    need = any_need(dice, held_out=True)
    tools = tool_list(dice, need.tool)
    text, arguments = need.asks[0]
    if kind < 0.75:
        return Check("tools", [user(text)], calls_text(need.tool, arguments), tools, mode="tools")
    content, said = tool_result(dice)
    messages = [user(text), call_message(need.tool, arguments), {"role": "tool", "content": content}]
    return Check("tools", messages, said, tools)


ABILITY = Ability("tools", 2.2, write, check, checks=80)
