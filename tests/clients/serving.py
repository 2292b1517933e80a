"""A server in a process of its own, for tests of clients."""

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.models.tiny import CHAT_TEMPLATE, save_tiny_with_tokenizer

SECONDS = 300  # until what does not end is a failure, on a busy machine too
ENGINE = {"device": "cpu", "max_model_len": 512, "num_kvcache_blocks": 256, "kvcache_block_size": 16}
# Prints tools, so that the server finds the format of the calls here.
TEMPLATE = (
    "{% for tool in tools or [] %}<tool_call>{{ tool['function']['name'] }}</tool_call>{% endfor %}" + CHAT_TEMPLATE
)


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Args:
        url: its address, without a path.
        model: the model's name there.
        folder: the model's folder, for the same engine in this process; None for the default model.
    """

    url: str
    model: str
    folder: str | None


def save_model(folder: Path) -> str:
    """Save a tiny model whose tokens are bytes, and whose template takes tools. Return its folder."""
    return str(save_tiny_with_tokenizer(folder, "qwen3", TEMPLATE))


@contextlib.contextmanager
def served(folder: str | None, *flags: str) -> Iterator[Server]:
    """Run `nanovllm serve` on a free port in a `with` block, which ends it with SIGTERM.

    Args:
        folder: the model's; None serves the default model.
    """
    engine = [text for name, value in ENGINE.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "nanovllm", "serve", *([folder] if folder else []), "--port", "0"]
    command += [*engine, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        watchdog = threading.Timer(SECONDS, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            greeting = process.stdout.readline()
            found = re.fullmatch(r"Serving (\S+) at (\S+)\n", greeting)
            assert found, f"the server has not started: {greeting!r}"
            watchdog.cancel()
            yield Server(url=found[2], model=found[1], folder=folder)
            process.terminate()
            assert process.wait(SECONDS) == 0
        finally:
            watchdog.cancel()
            process.kill()
