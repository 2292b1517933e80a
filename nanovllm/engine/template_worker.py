"""Renders chat templates in a process of its own; `template_renderer` starts it.

It is run by its path, so that it does not import nanovllm's package and with it torch.
"""

import json
import math
import resource
import signal
from multiprocessing.connection import Connection
from pathlib import Path


def main(fd: int, cpu_seconds: int, memory: int) -> None:
    """Answer requests until the parent closes the connection.

    Args:
        fd: of the connection to the parent.
        cpu_seconds: CPU time of one request. The kernel ends this process (SIGXCPU) when it takes more.
        memory: bytes that requests may take besides what this program needs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent decides
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    channel, tokenizer = Connection(fd), PreTrainedTokenizerBase()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    lower_limit(resource.RLIMIT_AS, pages * resource.getpagesize() + memory)
    lower_limit(resource.RLIMIT_CORE, 0)
    while True:
        try:
            message = channel.recv_bytes()
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        lower_limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + cpu_seconds)
        channel.send_bytes(answer(tokenizer, message))


def lower_limit(kind: int, value: int) -> None:
    """Set a soft limit, or keep the hard one if that is lower."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def answer(tokenizer, message: bytes) -> bytes:
    """Return the JSON of `{"text": ...}` or `{"variables": ...}`, or of `{"error": ...}` with the reason."""
    try:
        request = json.loads(message)
        if "template" in request:
            return json.dumps({"variables": list(find_variables(request["template"]))}).encode()
        text = tokenizer.apply_chat_template(**request["arguments"], tokenize=False)
        if len(text) > (max_chars := request["max_chars"]):
            return error(f"it made {len(text)} characters, and at most {max_chars} can fit max_model_len")
        return json.dumps({"text": text}).encode()
    except MemoryError:
        return error("it took too much memory")
    except Exception as exception:  # templates are programs, and raise what they like
        return error(str(exception)[:1000] or type(exception).__name__)


def find_variables(template: str) -> set[str]:
    """Return the names of the variables that a template reads. This evaluates the template's constants."""
    from jinja2 import meta, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """Parses `{% generation %}`, by which templates mark answers for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[GenerationTag, loopcontrols])
    return meta.find_undeclared_variables(environment.parse(template))


def error(reason: str) -> bytes:
    return json.dumps({"error": reason}).encode()
