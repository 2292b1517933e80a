"""The command line: `nanovllm serve`, `nanovllm chat` and `nanovllm bench serve`."""

import argparse
import codecs
import io
import logging
import os
import signal
import sys
from dataclasses import replace
from typing import NoReturn, TypeVar

import nanovllm
from nanovllm.cli.bench_serve import BenchOptions, bench_serve
from nanovllm.cli.chat import ChatOptions, chat
from nanovllm.cli.flags import add_flags, given
from nanovllm.config import Config
from nanovllm.server.options import ServerOptions, listed, with_key
from nanovllm.utils.logs import log_to_stderr

Options = TypeVar("Options")
Client = TypeVar("Client", ChatOptions, BenchOptions)

_INTERRUPTED = 130  # exit status of a program that Ctrl-C ended
_SERVER_PACKAGES = ("fastapi", "httptools", "httpx", "prometheus_client", "pydantic", "starlette", "uvicorn")
_MODEL = "a local folder, a .gguf file or a hub id (default: SmolLM2-135M-Instruct, which is fetched once)"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands. Each sets `command`, the function that runs it, and `parser`, its own."""
    parser = argparse.ArgumentParser(prog="nanovllm", description="A small LLM inference engine.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"nanovllm {nanovllm.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_chat(commands)
    bench = commands.add_parser("bench", help="measure a server", description="Measure a server.")
    _add_bench_serve(bench.add_subparsers(metavar="COMMAND", required=True))
    return parser


def _add_command(
    commands: argparse._SubParsersAction, name: str, summary: str, *, usage: str, text: str
) -> argparse.ArgumentParser:
    """Add a command with many flags: its usage does not list them. They cannot be abbreviated: new ones may come."""
    return commands.add_parser(name, help=summary, usage=f"nanovllm {usage}", description=text, allow_abbrev=False)


def _add_serve(commands: argparse._SubParsersAction) -> None:
    text = "Serve a model over HTTP, for clients of OpenAI and Anthropic, with a chat page at /."
    parser = _add_command(commands, "serve", "serve a model over HTTP", usage="serve [MODEL] [FLAGS]", text=text)
    parser.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL)
    add_flags(parser.add_argument_group("server"), ServerOptions)
    add_flags(parser.add_argument_group("engine"), Config, without=["model"])
    parser.set_defaults(command=_serve, parser=parser)


def _serve(args: argparse.Namespace) -> int:
    _checked(args, Config)
    server_options = with_key(_checked(args, ServerOptions))
    from nanovllm.server.app import serve

    serve(given(args, Config), server_options)
    return 0


def _add_chat(commands: argparse._SubParsersAction) -> None:
    text = "Chat in the terminal, with a model in this process or, with --url, with a server."
    parser = _add_command(commands, "chat", "chat in the terminal", usage="chat [MODEL] [FLAGS]", text=text)
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{_MODEL}; with --url, the model's name there")
    add_flags(parser.add_argument_group("chat"), ChatOptions, without=["model"])
    add_flags(parser.add_argument_group("engine, without --url"), Config, without=["model"])
    parser.set_defaults(command=_chat, parser=parser)


def _chat(args: argparse.Namespace) -> int:
    _checked(args, Config)
    return chat(_with_client_key(_checked(args, ChatOptions)), given(args, Config))


def _add_bench_serve(commands: argparse._SubParsersAction) -> None:
    text = (
        "Send streamed completions to a server, of random token ids as in the offline workload of bench.py. Report "
        "throughput, time to the first token, time per token, and goodput."
    )
    parser = _add_command(commands, "serve", "measure a server under load", usage="bench serve [FLAGS]", text=text)
    add_flags(parser, BenchOptions)
    parser.set_defaults(command=_bench_serve, parser=parser)


def _bench_serve(args: argparse.Namespace) -> int:
    return bench_serve(_with_client_key(_checked(args, BenchOptions)))


def _with_client_key(options: Client) -> Client:
    """Return a client's options with the environment's first API key, unless they have one or no use for it."""
    keys = listed(os.environ.get("NANOVLLM_API_KEY"))
    if options.api_key is not None or not keys or options.url is None or "@" in options.url:
        return options
    return replace(options, api_key=keys[0])


def _checked(args: argparse.Namespace, options: type[Options]) -> Options:
    """Return the options that the flags give. If one is wrong, exit with the message that the dataclass gives."""
    try:
        return options(**given(args, options))
    except (TypeError, ValueError) as error:
        _exit(args.parser, str(error))


def _exit(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """End because of a wrong flag or a missing package."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")


def _make_streams_usable() -> None:
    """Open standard streams that the caller has closed. Let stdout replace characters that its encoding lacks.

    Bytes that stdin's encoding lacks become half characters, which `nanovllm chat` reports. The C locale's is ASCII,
    but its programs write UTF-8.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="surrogateescape")


def _obey_sigterm() -> None:
    """Let SIGTERM end this process if it is process 1, as in a container. Linux gives that one no default action.

    The server replaces this once its model is loaded.
    """
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0, 1 for a failure, 130 for Ctrl-C; wrong usage exits with 2."""
    _make_streams_usable()
    _obey_sigterm()
    args = make_parser().parse_args(argv)
    is_verbose = args.command is _serve or getattr(args, "log_steps", False)
    log_to_stderr(logging.INFO if is_verbose else logging.WARNING)
    try:
        status = args.command(args)
        sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        if error.name not in _SERVER_PACKAGES:
            raise
        _exit(args.parser, f"the package {error.name} is not installed; run: pip install 'nanovllm[server]'")
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of the output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            print(f"nanovllm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
