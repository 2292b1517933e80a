"""A chat in the terminal: `nanovllm chat`. It also reads questions from a pipe and prints the answers."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TextIO

from nanovllm import SamplingParams
from nanovllm.checks import check_fields
from nanovllm.cli.chat_models import ChatModel, Counts, EngineModel, ServerModel
from nanovllm.cli.flags import argument_docs, parse_value
from nanovllm.cli.http_stream import base_url, check_key
from nanovllm.server.events import Text, Thinking

# The sampling parameters that /set knows: those that engines and servers both have.
SETTINGS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
HELP = """\
/system TEXT       set the system message; without TEXT: remove it
/set NAME VALUE    set a sampling parameter, such as temperature 0.7; VALUE default: take it back
/set               show the parameters
/regen             answer the last message again
/new               start a new conversation
/save FILE         write the conversation as JSON into a new file
/quit              end, as Ctrl-D does
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one; so does all between two lines of \"\"\".
A message that starts with / needs a space before it."""
_BLOCK = '"""'
_INTERRUPTED = 130  # exit status
_DIM = "\x1b[2m"
_PLAIN = "\x1b[0m"
# Control characters in a text could change the terminal's state or what it shows.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """The arguments of `nanovllm chat` besides those of `Config`. None is the default of each.

    Args:
        model: as in `Config`; with `url`, the model's name in the API, and None is the server's first one.
        url: the address of a server to chat with.
        api_key: sent to the server as a Bearer token; by default the first key in NANOVLLM_API_KEY.
        system: the system message.
    """

    model: str | None = None
    url: str | None = None
    api_key: str | None = None
    system: str | None = None

    def __post_init__(self):
        check_fields(self)
        if self.system is not None and not _is_text(self.system):
            raise ValueError("system must be UTF-8")
        if self.url is not None:
            base_url(self.url)
        if self.api_key is not None:
            if self.url is None:
                raise ValueError("api_key needs a url: only a server asks for one")
            check_key(self.api_key, self.url)


def chat(options: ChatOptions, config_options: dict[str, Any]) -> int:
    """Chat until the input ends. Return 0, or 1 if the input was no terminal and an answer failed.

    Args:
        config_options: arguments of `LLM`, with the model.
    """
    if options.url is not None:
        extra = sorted(config_options.keys() - {"model"})
        if extra:
            raise ValueError(f"the engine's options are not for --url, whose engine runs already: {', '.join(extra)}")
        model: ChatModel = ServerModel(options.url, options.api_key, options.model)
    else:
        model = EngineModel(config_options)
    with model:
        return Chat(model, options.system).run()


class Chat:
    """A conversation with a model.

    Args:
        system: the system message.

    Attributes:
        messages: the conversation after the system message.
        unanswered: the last question, if no answer came.
        settings: sampling parameters that differ from the model's defaults.
    """

    def __init__(self, model: ChatModel, system: str | None = None, *, stdin: TextIO | None = None):
        self.model = model
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.unanswered: dict[str, str] | None = None
        self.settings: dict[str, Any] = {}
        self.stdin = stdin or sys.stdin
        self.is_terminal = self.stdin.isatty() and sys.stdout.isatty()
        self.has_failed = False
        self.num_interrupts = 0  # answers in a row that Ctrl-C has stopped
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(HELP),
            "/system": self._set_system,
            "/set": self._set,
            "/regen": self._regenerate,
            "/new": self._start_again,
            "/save": self._save,
        }

    # -- input -------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Read and answer until the input ends. Return the exit status."""
        if self.is_terminal:
            _import_line_editing()
            print(f"{self.model.name.translate(_CONTROLS)}   /help shows the commands, Ctrl-D ends.")
        while True:
            try:
                message = self._read()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self.is_terminal:
                    return _INTERRUPTED
                print("\n(Ctrl-D or /quit ends.)")
                continue
            if message.strip() == "/quit":
                return int(self.has_failed)
            self.handle(message)
            # Else each Ctrl-C would stop one answer of a long list of questions, but not the chat.
            if self.num_interrupts > 1 and not self.is_terminal:
                return _INTERRUPTED
        if self.is_terminal:
            print()
        return int(self.has_failed)

    def _read(self) -> str:
        """Return the next message, which may have several lines. Raise EOFError at the end."""
        line = self._read_line("> ")
        if line.strip() == _BLOCK:
            lines = []
            while (line := self._read_more()) is not None and line.strip() != _BLOCK:
                lines.append(line)
            return "\n".join(lines)
        lines = []
        while line is not None and line.endswith("\\"):
            lines.append(line[:-1])
            line = self._read_more()
        return "\n".join([*lines, line or ""])

    def _read_more(self) -> str | None:
        """Return a further line of a message, or None at the end of the input."""
        try:
            return self._read_line("  ")
        except EOFError:
            return None

    def _read_line(self, prompt: str) -> str:
        if self.is_terminal:
            return input(prompt)
        line = self.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removeprefix("\ufeff")  # a byte order mark starts some files

    def handle(self, message: str) -> None:
        """Run a command, or answer a message."""
        if not message.strip():
            return
        if not _is_text(message):
            self._report("the input is not UTF-8")
            return
        if not message.startswith("/"):
            self._ask({"role": "user", "content": message.strip()})
            return
        name, _, argument = message.strip().partition(" ")
        try:
            if name not in self.commands:
                raise ValueError(f"there is no command {name:.50}; /help shows them")
            self.commands[name](argument.strip())
        except (TypeError, ValueError, OSError) as error:
            self._report(error)

    def _report(self, error: object) -> None:
        self.has_failed = self.has_failed or not self.is_terminal
        sys.stdout.flush()
        print(f"Error: {error}", file=sys.stderr, flush=True)

    # -- answers -----------------------------------------------------------------------------------------------------

    def _ask(self, question: dict[str, str]) -> None:
        """Answer a question. Keep it for /regen if no answer comes."""
        self.unanswered = question
        if answer := self._answer([*self.messages, question]):
            self.messages += [question, answer]
            self.unanswered = None

    def _answer(self, messages: list[dict[str, str]]) -> dict[str, str] | None:
        """Print the answer as it comes. Return it as a message, even if it was cut off, or None if it has no text."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        counts = Counts()
        start = time.perf_counter()
        pieces: list[str] = []
        try:
            self._show(self.model.answer([*system, *messages], self.settings, counts), pieces)
            self.num_interrupts = 0
        except KeyboardInterrupt:
            self.num_interrupts += 1
            print(" (stopped)" if self.is_terminal else "", flush=True)
        except (RuntimeError, ValueError, OSError) as error:
            if pieces:
                print(flush=True)
            self._report(error)
        else:
            seconds = time.perf_counter() - start
            if self.is_terminal and counts.tokens:
                print(f"{_DIM}{counts.tokens} tokens, {counts.tokens / seconds:.1f} tok/s{_PLAIN}")
        return {"role": "assistant", "content": "".join(pieces).strip()} if pieces else None

    def _show(self, events: Iterator[Text | Thinking], pieces: list[str]) -> None:
        """Print events. Thinking is dim on a terminal, and is not part of the answer.

        Args:
            pieces: receives the answer's text.
        """
        is_thinking = False
        try:
            for event in events:
                if isinstance(event, Thinking) != is_thinking:
                    is_thinking = not is_thinking
                    self._write_style(_DIM if is_thinking else f"{_PLAIN}\n\n")
                if isinstance(event, Text):
                    pieces.append(event.text)
                if self.is_terminal or isinstance(event, Text):
                    print(event.text.translate(_CONTROLS), end="", flush=True)
        finally:
            if is_thinking:
                self._write_style(_PLAIN)
        print(flush=True)

    def _write_style(self, style: str) -> None:
        if self.is_terminal:
            print(style, end="", flush=True)

    # -- commands ----------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        """Confirm a command on a terminal."""
        if self.is_terminal:
            print(text)

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self._say("The system message is set." if text else "There is no system message now.")

    def _set(self, argument: str) -> None:
        name, _, text = argument.partition(" ")
        if not name:
            docs = argument_docs(SamplingParams)
            for each in SETTINGS:
                print(f"{each:20} {self.settings.get(each, 'default')!s:10} {docs.get(each, ''):.80}")
            return
        if name not in SETTINGS:
            raise ValueError(f"there is no parameter {name:.50}; the parameters are {', '.join(SETTINGS)}")
        if text.strip() == "default":
            self.settings.pop(name, None)
        else:
            settings = self.settings | {name: parse_value(SamplingParams, name, text.strip())}
            SamplingParams(**settings)  # checks the bounds
            self.settings = settings
        self._say(f"{name} is {self.settings.get(name, 'default')}.")

    def _regenerate(self, _: str) -> None:
        if self.unanswered is not None:
            self._ask(self.unanswered)
            return
        if not self.messages:
            raise ValueError("there is no message to answer again")
        if answer := self._answer(self.messages[:-1]):
            self.messages[-1] = answer

    def _start_again(self, _: str) -> None:
        self.messages.clear()
        self.unanswered = None
        self._say("A new conversation.")

    def _save(self, path: str) -> None:
        if not path:
            raise ValueError("/save needs a file")
        system = [{"role": "system", "content": self.system}] if self.system else []
        content = json.dumps([*system, *self.messages], indent=2, ensure_ascii=False).encode()
        with open(path, "xb") as file:  # never overwrites
            try:
                file.write(content)
                file.flush()
            except OSError:  # a full disk
                os.unlink(path)
                raise
        self._say(f"Saved {len(system + self.messages)} messages.")


def _is_text(text: str) -> bool:
    """Return whether text can be encoded. Bytes that stdin could not decode are lone surrogates, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _import_line_editing() -> None:
    """Let `input` edit lines and recall former ones, where Python has the module for it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


assert set(SETTINGS) <= {declared.name for declared in fields(SamplingParams)}
