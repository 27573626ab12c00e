"""The model that ships with the package answers its own questions through the whole product."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from inference.demo_model.corpus import Check
from inference.demo_model.questions import CHECKS
from tests.system.deployments import Site


def _for_api(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with tool call arguments as JSON text, as OpenAI's API has them."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else message


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.ability}-{check.messages[-1]['content']}"[:50])
def test_question_is_answered_correctly(site: Site, check: Check) -> None:
    client = openai.OpenAI(base_url=f"{site.base_url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {"tools": check.tools} if check.tools else {}
    answer = client.chat.completions.create(
        model=site.model,
        messages=[_for_api(message) for message in check.messages],  # type: ignore[misc]  # plain dictionaries
        temperature=0,
        **options,
    )
    message = answer.choices[0].message
    assert answer.usage is not None

    if check.mode == "tools":
        assert answer.choices[0].finish_reason == "tool_calls"
        calls = [
            {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
            for call in message.tool_calls or ()
            if call.type == "function"
        ]
        assert calls == json.loads(check.expected)
    elif check.mode == "json":
        assert json.loads(message.content or "") == json.loads(check.expected)
    elif check.mode == "long":
        assert (message.content or "").startswith(check.expected)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens >= check.min_tokens
    else:
        assert message.content == check.expected
