"""The examples of docs/serving.md, run against the default model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.serving import SECONDS, served

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)
COMMAND = re.search(r"^curl .*?(?=\n```)", TEXT, re.S | re.M)


@pytest.fixture(scope="module")
def address():
    """The address of a server whose answers are short."""
    pytest.importorskip("fastapi")
    with served(None, "--max-model-len", "96") as server:
        yield server.url


@pytest.mark.parametrize("code", EXAMPLES, ids=[re.search(r"(?:from|import) (\w+)", code)[1] for code in EXAMPLES])
def test_an_example_prints_an_answer(code, address):
    pytest.importorskip(re.search(r"(?:from|import) (\w+)", code)[1])
    assert ADDRESS in code
    command = [sys.executable, "-c", code.replace(ADDRESS, address)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 10


def test_the_curl_example_prints_an_answer(address):
    command = ["bash", "-c", COMMAND[0].replace(ADDRESS, address)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert '"object":"chat.completion"' in result.stdout
