"""The chat format: the Jinja template that ships with the model, and the same rendering as pieces for training.

A piece carries whether the model learns to write it and whether it is spelled one character a token.
"""

import json
from typing import NamedTuple

from .corpus import Conversation, Message, Tool

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
MARKUP = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is iterable -%}
        {%- for part in content -%}{{- part.text if part.text is defined else '' -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro tool_list() -%}
    {{- 'Tools:\\n<tools>' -}}
    {%- for tool in tools -%}
        {{- '\\n' + ((tool.function if tool.function is defined else tool) | tojson) -}}
    {%- endfor -%}
    {{- '\\n</tools>' -}}
{%- endmacro -%}
{%- if tools and not (messages and messages[0].role == 'system') -%}
    {{- '<|im_start|>system\\n' + tool_list() + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = text_of(message.content) -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'tool' -%}
        {{- '<tool_response>\\n' + content + '\\n</tool_response>' -}}
    {%- else -%}
        {{- content -}}
    {%- endif -%}
    {%- if message.role == 'system' and loop.first and tools -%}
        {{- ('\\n\\n' if content else '') + tool_list() -}}
    {%- endif -%}
    {%- if message.role == 'assistant' and message.tool_calls -%}
        {%- for call in message.tool_calls -%}
            {%- set tool_call = call.function if call.function is defined else call -%}
            {{- '\\n' if content or not loop.first else '' -}}
            {{- '<tool_call>\\n{"name": ' + (tool_call.name | tojson) + ', "arguments": ' -}}
            {%- if tool_call.arguments is string -%}
                {{- tool_call.arguments -}}
            {%- else -%}
                {{- tool_call.arguments | tojson -}}
            {%- endif -%}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class Piece(NamedTuple):
    """A run of text in a rendered conversation."""

    text: str
    learned: bool = False
    spelled: bool = False


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _tools_text(tools: list[Tool]) -> str:
    lines = "".join(f"\n{_dumps(tool.get('function', tool))}" for tool in tools)
    return f"Tools:\n<tools>{lines}\n</tools>"


def _calls_text(message: Message) -> str:
    lines = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function["arguments"]
        written = arguments if isinstance(arguments, str) else _dumps(arguments)
        lines.append(f'<tool_call>\n{{"name": {_dumps(function["name"])}, "arguments": {written}}}\n</tool_call>')
    return "\n".join(lines)


def body(message: Message) -> str:
    """Return what stands between a turn's first line and its end."""
    content = message.get("content") or ""
    if message["role"] == "tool":
        return f"<tool_response>\n{content}\n</tool_response>"
    calls = _calls_text(message)
    return f"{content}\n{calls}" if content and calls else content or calls


def pieces(sample: Conversation) -> list[Piece]:
    """Render a conversation exactly as the template does, as pieces.

    A spelled answer must be the last turn, because an earlier one is read as ordinary tokens; then only it is learned.
    """
    found: list[Piece] = []
    messages = sample.messages
    if sample.tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    for index, message in enumerate(messages):
        last = index == len(messages) - 1
        text = body(message)
        if index == 0 and sample.tools:
            text += ("\n\n" if text else "") + _tools_text(sample.tools)
        found.append(Piece(f"{TURN_START}{message['role']}\n"))
        learned = message["role"] == "assistant" and (last or not sample.spelled)
        found.append(Piece(text, learned, sample.spelled and last))
        found.append(Piece(TURN_END, learned))
        found.append(Piece("\n"))
    return found


def render(sample: Conversation) -> str:
    """Render a conversation as one text."""
    return "".join(piece.text for piece in pieces(sample))
