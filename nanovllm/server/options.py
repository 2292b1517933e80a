"""The options of the server. Those of the engine are `Config`'s."""

import os
import re
from dataclasses import dataclass, replace

from nanovllm.checks import check_fields, one_of, shown, within

_KEY = re.compile(r"[!-~]+")
# As browsers write them in the Origin header. Applications have schemes of their own; "null" is a local file.
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """The flags of `nanovllm serve` that are not fields of `Config`.

    Args:
        host: address to listen on. The default reaches this machine only.
        port: TCP port; 0 takes a free one.
        api_key: keys that clients must send, separated by commas; None lets everybody in. `nanovllm serve` and
            `nanovllm.ray.serve` also take them from the environment variable NANOVLLM_API_KEY, which other users of the
            machine cannot see. Without a key, a server that only this machine reaches refuses names of other machines
            in the Host header.
        served_model_name: names of the model in the API, separated by commas; None is the model's own name.
        max_concurrent_requests: how many samples the engine has at once, whether they run or wait; a request that does
            not fit gets status 429.
        max_body_mib: largest body of a request, in MiB; larger ones get status 413 before they are read.
        max_n: most samples of a request.
        cors_origins: origins whose pages may call the API, such as http://localhost:3000, separated by commas; "*"
            allows all, None none.
        allow_chat_templates: let requests bring a chat template of their own.
        salt_prefix_cache: keep the cached prompts of each API key apart, so that no client can find out by timing what
            another one has sent.
        tool_parser: format of the model's tool calls; "auto" finds it in the chat template.
        reasoning_parser: format of the model's thinking; "auto" finds it in the chat template.
        drain_seconds: how long running requests may take to finish after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = within(0, 65535, default=8000)
    api_key: str | None = None
    served_model_name: str | None = None
    max_concurrent_requests: int = within(1, 1 << 20, default=1024)
    max_body_mib: int = within(1, 1024, default=16)
    max_n: int = within(1, 1024, default=64)
    cors_origins: str | None = None
    allow_chat_templates: bool = False
    salt_prefix_cache: bool = False
    tool_parser: str = one_of("auto", "none", "hermes", "qwen3_coder", "llama3", "mistral")
    reasoning_parser: str = one_of("auto", "none", "think")
    drain_seconds: float = within(0, 3600, default=30)

    def __post_init__(self):
        check_fields(self)
        if self.api_key is not None and not listed(self.api_key):  # such as a variable of a shell that is not set
            raise ValueError(
                f"api_key must have at least one key, got {shown(self.api_key)}; leave it out to need none"
            )
        if not all(_KEY.fullmatch(key) for key in listed(self.api_key)):  # and the message must not show them
            raise ValueError("api_key must have ASCII characters only, without spaces: headers carry no others")
        if self.served_model_name is not None and not listed(self.served_model_name):
            raise ValueError(f"served_model_name must have at least one name, got {shown(self.served_model_name)}")
        for origin in listed(self.cors_origins):
            if not _ORIGIN.fullmatch(origin):
                expected = "cors_origins must be like http://localhost:3000, in lower case and without a path"
                raise ValueError(f"{expected}, got {shown(origin)}")


def with_key(options: ServerOptions) -> ServerOptions:
    """Return options with the API keys of the environment if they have none."""
    return options if options.api_key is not None else replace(options, api_key=os.environ.get("NANOVLLM_API_KEY"))


def listed(text: str | None) -> list[str]:
    """Return the entries of a text with commas."""
    return [entry.strip() for entry in (text or "").split(",") if entry.strip()]
