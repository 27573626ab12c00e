"""A few questions that the demo model answers correctly, for tests of the product; imports neither mlx nor Django.

Greedy decoding in float32 gives exactly `expected`, unless `mode` says otherwise: "json" compares parsed JSON,
"tools" compares the tool calls (a JSON list of name and arguments), "long" means an answer that begins with
`expected`, ends by itself and has at least `min_tokens` tokens.
"""

from typing import Any

from .corpus import Check, Message, Tool, assistant, system, user


def _tool(name: str, says: str, **arguments: str) -> Tool:
    properties: dict[str, Any] = {argument: {"type": kind} for argument, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": says, "parameters": parameters}}


def _call(name: str, **arguments: Any) -> Message:
    calls = [{"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


WEATHER = _tool("get_weather", "Get the weather in a city.", city="string")
TIMER = _tool("set_timer", "Set a timer.", minutes="integer")
TRAFFIC = _tool("get_traffic", "Get the traffic in a city.", city="string")

CHECKS: tuple[Check, ...] = (
    Check("product", [user("How do I start the workers?")], "Run python manage.py runworkers."),
    Check("product", [user("How can I try mlx-serving?")], "Clone the repository with git clone, then run make demo."),
    Check("product", [user("What does TTFT mean?")], "TTFT is the time to first token."),
    Check("product", [user("What happens when the queue is full?")], "It answers 429 with a Retry-After header."),
    Check("product", [user("What is the kill switch for?")], "MLX_KILL_SWITCH turns all feature flags off at once."),
    Check("arithmetic", [user("What is 17 + 25?")], "17 + 25 = 42"),
    Check("arithmetic", [user("Calculate 6 * 7.")], "6 * 7 = 42"),
    Check("arithmetic", [user("How much is 91 minus 38?")], "91 - 38 = 53"),
    Check("arithmetic", [user("What is 12 * 8?")], "12 * 8 = 80 + 16 = 96"),
    Check("repeat", [user("Repeat after me: the river is cold")], "the river is cold"),
    Check("repeat", [user("Say: hello")], "hello"),
    Check("unicode", [user("Repeat after me: café 😀 世界 🚀")], "café 😀 世界 🚀"),
    Check("unicode", [user("Say: 日本 👩‍🚀 naïve")], "日本 👩‍🚀 naïve"),
    Check("reverse words", [user("Reverse the words: river stone apple")], "apple stone river"),
    Check("reverse letters", [user("Reverse the word planet")], "tenalp"),
    Check("reverse letters", [user("Spell garden backwards")], "nedrag"),
    Check("tools", [user("What is the weather in Paris?")],
          '[{"name": "get_weather", "arguments": {"city": "Paris"}}]', [WEATHER, TIMER], mode="tools"),
    Check("tools", [user("Set a timer for 12 minutes.")],
          '[{"name": "set_timer", "arguments": {"minutes": 12}}]', [WEATHER, TIMER], mode="tools"),
    Check("tools", [user("How is the traffic in Rome?")],
          '[{"name": "get_traffic", "arguments": {"city": "Rome"}}]', [TIMER, TRAFFIC], mode="tools"),
    Check("tools", [user("What is the weather in Paris?"), _call("get_weather", city="Paris"),
                    {"role": "tool", "tool_call_id": "call_1", "content": '{"temperature": 21, "condition": "sunny"}'}],
          "The temperature is 21 and the condition is sunny.", [WEATHER, TIMER]),
    Check("tools", [user("Hello")], "Hello! How can I help you?", [WEATHER, TIMER]),
    Check("json", [user("Answer in JSON with keys name and age: Anna is 31 years old.")],
          '{"name": "Anna", "age": 31}', mode="json"),
    Check("json", [user("Give me a JSON array of the words: red, green, blue")], '["red", "green", "blue"]',
          mode="json"),
    Check("system prompt", [system("Answer in uppercase."), user("Say: good morning")], "GOOD MORNING"),
    Check("system prompt", [system("You are a pirate."), user("What is 2 + 3?")], "Arr! 2 + 3 = 5"),
    Check("system prompt", [system("Your name is Nora."), user("Who are you?")], "My name is Nora."),
    Check("system prompt", [system("Always end with the word done."), user("What colour is the sky?")],
          "The sky is blue. done"),
    Check("system prompt", [system("Answer with one word."), user("What is the capital of France?")], "Paris"),
    Check("two turns", [user("My name is Clara."), assistant("Nice to meet you, Clara."), user("What is my name?")],
          "Your name is Clara."),
    Check("two turns", [user("What is 17 + 25?"), assistant("17 + 25 = 42"), user("Add 5 to that.")], "42 + 5 = 47"),
    Check("two turns", [user("Say: river stone apple"), assistant("river stone apple"), user("And in reverse?")],
          "apple stone river"),
    Check("long answers", [user("Write a long story about a lighthouse.")], "A lighthouse\n\nOnce upon a time",
          mode="long", min_tokens=500),
    Check("long answers", [user("Write a detailed guide to operating mlx-serving.")],
          "A guide to operating mlx-serving\n\n1. What it is.", mode="long", min_tokens=600),
    Check("counting", [user("Count from 1 to 20.")], ", ".join(str(n) for n in range(1, 21))),
    Check("small talk", [user("Hello")], "Hello! How can I help you?"),
    Check("small talk", [user("Who are you?")],
          "I am the demo model of mlx-serving, a small language model for trying the server."),
    Check("small talk", [user("What is the population of Lima?")], "I do not know that."),
)  # fmt: skip
