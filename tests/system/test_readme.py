"""What the README shows a reader works as it stands there, but for the port."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.support import ROOT, Demo

README = (ROOT / "README.md").read_text()


def block(language: str, marker: str) -> str:
    """Return the code block of this language that holds the marker."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return next(text for text in blocks if marker in text)


def run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=120).stdout


def test_the_openai_client_streams(demo: Demo) -> None:
    program = block("python", "from openai").replace("127.0.0.1:8000", f"127.0.0.1:{demo.port}")
    assert "pip install mlx-serving" in run([sys.executable, "-c", program])


def test_the_schema_is_followed(demo: Demo) -> None:
    client = block("python", "from openai").split("stream =")[0].replace("127.0.0.1:8000", f"127.0.0.1:{demo.port}")
    answer = json.loads(run([sys.executable, "-c", client + block("python", "json_schema")]))
    assert answer == {"name": "Anna", "age": 31}


def test_the_curl_command_answers(demo: Demo) -> None:
    command = block("sh", "curl").replace("127.0.0.1:8000", f"127.0.0.1:{demo.port}")
    assert "42" in json.loads(run(["bash", "-c", command]))["choices"][0]["message"]["content"]


@pytest.mark.parametrize("name", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_a_linked_file_is_there(name: str) -> None:
    assert (ROOT / name).is_file()


def test_the_settings_table_agrees_with_the_code() -> None:
    from mlx_serving.conf import Settings

    rows = re.findall(r"^\| `([A-Z_]+)` \| ([^|]+) \|", README, re.MULTILINE)
    assert rows
    defaults = Settings()
    for name, shown in rows:
        default = getattr(defaults, name)
        if isinstance(default, bool):
            assert shown == f"`{default}`", name
        elif isinstance(default, int | float):
            number = int(shown.removesuffix(" MiB")) * (2**20 if shown.endswith("MiB") else 1)
            assert number == default, name
