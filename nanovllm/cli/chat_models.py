"""The two ways of `nanovllm chat` to a model: an engine in this process, and a server."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from nanovllm import LLM
from nanovllm.checks import shown
from nanovllm.cli.http_stream import base_url, count_tokens, message_of, public_url
from nanovllm.server.events import Event, Text, Thinking
from nanovllm.server.text_format import TextFormat

_CONNECT_SECONDS = 10.0
# How many tokens at the end of a prompt show whether it opens a thinking tag.
_PROMPT_END = 32


@dataclass
class Counts:
    """How many tokens an answer has, as far as it is known."""

    tokens: int = 0


class ChatModel(Protocol):
    """Answers conversations."""

    name: str

    def answer(self, messages: list[dict], settings: dict[str, Any], counts: Counts) -> Iterator[Text | Thinking]:
        """Yield the pieces of an answer. Leaving the iterator ends it.

        Args:
            settings: sampling parameters that differ from the model's defaults.
            counts: receives the number of tokens.

        Raises:
            ValueError, RuntimeError: the conversation cannot be answered.
        """
        ...

    def __enter__(self) -> "ChatModel": ...

    def __exit__(self, *exception: object) -> None: ...


class EngineModel:
    """A model in this process.

    Args:
        config_options: arguments of `LLM`.

    Raises:
        TypeError, ValueError, RuntimeError: the model cannot be loaded, or has no chat template.
    """

    def __init__(self, config_options: dict[str, Any]):
        self.llm = LLM(**config_options)
        model = config_options.get("model")
        self.name = "SmolLM2-135M-Instruct" if model is None else Path(model).name
        try:
            self.format = TextFormat.detect(_chat_template(self.llm.tokenizer), tool_parser="none")
        except BaseException:
            self.llm.close()
            raise

    def answer(self, messages: list[dict], settings: dict[str, Any], counts: Counts) -> Iterator[Text | Thinking]:
        (prompt,) = self.llm.chat_prompts(messages)
        # An answer may use all of the context.
        params = replace(self.llm.get_default_sampling_params(), **{"max_tokens": None, **settings})
        (parser,) = self.format.parsers(self.llm.tokenizer.decode(prompt[-_PROMPT_END:]), tools=())
        for output in self.llm.stream(prompt, params):
            counts.tokens += len(output.token_ids)
            yield from _shown(parser.feed(output.text))
        yield from _shown(parser.finish())

    def __enter__(self) -> "EngineModel":
        return self

    def __exit__(self, *exception: object) -> None:
        self.llm.close()


def _chat_template(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # by name
        template = template.get("default")
    if not template:
        raise ValueError("the model has no chat template: a chat needs a model that was trained for it")
    return template


def _shown(events: Iterable[Event]) -> Iterator[Text | Thinking]:
    """Leave out tool calls: a chat in the terminal offers no tools."""
    return (event for event in events if isinstance(event, Text | Thinking))


class ServerModel:
    """A model behind a server's /v1/chat/completions.

    Args:
        url: see `base_url`.
        name: the model's name in the API; None takes the first one that the server lists.

    Raises:
        RuntimeError: the server cannot be reached, or lists no model; or the environment names an impossible proxy.
    """

    def __init__(self, url: str, api_key: str | None, name: str | None):
        import httpx

        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # An answer may take as long as it needs.
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        self.url = public_url(base_url(url))
        try:
            self.client = httpx.Client(base_url=base_url(url), headers=headers, timeout=timeout)
        except (httpx.InvalidURL, ImportError, ValueError) as error:
            raise RuntimeError(f"the environment's proxy variables cannot be used: {error}") from error
        self.http_error = httpx.HTTPError
        self.name = name or self._first_name()

    def _first_name(self) -> str:
        try:
            response = self.client.get("/v1/models")
        except self.http_error as error:
            raise RuntimeError(f"cannot reach {self.url}{_by_proxy(self.url)}: {error}") from error
        if response.status_code != 200:
            raise RuntimeError(
                f"{self.url} answered with status {response.status_code}: {message_of(response.content)}"
            )
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise RuntimeError(f"{self.url} lists no models; name one") from None

    def answer(self, messages: list[dict], settings: dict[str, Any], counts: Counts) -> Iterator[Text | Thinking]:
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": self.name, "messages": messages, **stream, **settings}
        is_whole = False
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    message = message_of(response.read())
                    raise RuntimeError(f"the server answered with status {response.status_code}: {message}")
                for line in _lines(response.iter_bytes()):
                    if line.startswith(b"data:"):
                        is_whole = line[5:].strip() == b"[DONE]"
                        if not is_whole:
                            yield from _events(line[5:], counts)
        except self.http_error as error:
            raise RuntimeError(f"the connection to {self.url} failed: {error}") from error
        if not is_whole:
            raise RuntimeError("the server did not end its stream with [DONE]")

    def __enter__(self) -> "ServerModel":
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()


def _by_proxy(url: str) -> str:
    """Return words that name the environment's proxy for a URL, without its password. Without a proxy, return ""."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    return f" through the environment's proxy {public_url(proxy):.100}"


def _lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream. httpx would also split at characters that JSON may have, such as U+2028."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    yield rest


def _events(data: bytes, counts: Counts) -> list[Text | Thinking]:
    """Return the events in a chunk of a streamed chat completion. Set `counts` if the chunk has a number of tokens.

    Raises:
        ValueError, RuntimeError: the server has sent something else, or an error.
    """
    chunk = json.loads(data)
    events = []
    try:
        if chunk.get("error"):
            raise RuntimeError(f"the server could not finish: {message_of(data)}")
        counts.tokens = count_tokens(chunk) or counts.tokens
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            if thinking := delta.get("reasoning_content") or delta.get("reasoning"):
                events.append(Thinking(_encodable(thinking)))
            if text := delta.get("content"):
                events.append(Text(_encodable(text)))
    except (AttributeError, TypeError):
        raise RuntimeError(f"the server sent no chat completion, but {shown(chunk)}") from None
    return events


def _encodable(text: str) -> str:
    """Return text without halves of surrogate pairs, which could be neither printed nor sent back."""
    return text.encode(errors="replace").decode()
