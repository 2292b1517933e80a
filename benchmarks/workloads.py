"""The requests that engines are measured with, and the figures that each workload gives."""

import importlib.util
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

from nanovllm import StructuredOutputsParams
from nanovllm.models.presets import PRESETS

PROMPT_LEN = 128  # tokens in the prompts of the latency and start workloads


@dataclass(frozen=True)
class Group:
    """Requests that are submitted at once and timed together.

    Args:
        prompts: token ids.
        lens: how many tokens each request asks for.
        temperature: the same for all requests.
        options: further fields of SamplingParams.
    """

    prompts: list[list[int]]
    lens: list[int]
    temperature: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """One number that a workload reports: `amount` per second, or milliseconds divided by `amount`.

    Args:
        unit: milliseconds if it starts with "ms".
        amount: how many tokens, requests, ... the time is for.
        total: picks the figure's part of one value (seconds, bytes, steps, ...) for each group.
    """

    unit: str
    amount: float
    total: Callable[[list[float]], float] = sum

    def value(self, seconds: list[float]) -> float:
        total = self.total(seconds)
        return total / self.amount * 1e3 if self.unit.startswith("ms") else self.amount / total


Workload = tuple[list[Group], list[Figure]]


def random_prompts(rng: Random, count: int, low: int, high: int, vocab_size: int) -> list[list[int]]:
    """Return `count` prompts of low to high random ids, which stay below 10,000 as in nano-vLLM's bench."""
    top = min(10_000, vocab_size - 1)
    return [[rng.randint(0, top) for _ in range(rng.randint(low, high))] for _ in range(count)]


def offline(args: Namespace, vocab_size: int, max_model_len: int) -> Workload:
    """Submit requests of mixed lengths at once; report output tokens/s."""
    rng = Random(0)
    low, high = args.input_len
    prompts = random_prompts(rng, args.num_seqs, low, high, vocab_size)
    lens = [rng.randint(*args.output_len) for _ in range(args.num_seqs)]
    return [Group(prompts, lens, 0.6)], [Figure("tok/s", sum(lens))]


def latency(args: Namespace, vocab_size: int, max_model_len: int) -> Workload:
    """Submit one request at a time, three times; report the time to the first token and the time per token after it.

    Each time has two prompts: one asks for the first token alone, the other for `latency_tokens` more.
    """
    rng = Random(1)
    groups = []
    for _ in range(3):
        short, long = random_prompts(rng, 2, PROMPT_LEN, PROMPT_LEN, vocab_size)
        groups.append(Group([short], [1]))
        groups.append(Group([long], [1 + args.latency_tokens]))

    def first_token(values: list[float]) -> float:
        return statistics.median(values[::2])

    def decoding(values: list[float]) -> float:
        return statistics.median(long - short for short, long in zip(values[::2], values[1::2], strict=True))

    figures = [Figure("ms to first token", 1, first_token), Figure("ms/token", args.latency_tokens, decoding)]
    return groups, figures


def prefill(args: Namespace, vocab_size: int, max_model_len: int) -> Workload:
    """Submit long prompts that ask for one token each; report input tokens/s."""
    length = min(4000, max_model_len - 1)
    prompts = random_prompts(Random(2), args.prefill_seqs, length, length, vocab_size)
    return [Group(prompts, [1] * len(prompts))], [Figure("tok/s in", length * len(prompts))]


def prefix(args: Namespace, vocab_size: int, max_model_len: int) -> Workload:
    """Submit requests that share `prefix_len` ids, add 64 different ones and ask for 64 tokens; report requests/s."""
    rng = Random(3)
    (shared,) = random_prompts(rng, 1, args.prefix_len, args.prefix_len, vocab_size)
    prompts = [shared + suffix for suffix in random_prompts(rng, args.prefix_seqs, 64, 64, vocab_size)]
    return [Group(prompts, [64] * len(prompts))], [Figure("req/s", len(prompts))]


# Features of requests. None of them ends a request before its length. All but the first make the engine count, mask,
# or return more than a token from each step.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-k and top-p": {"top_k": 50, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
    "100 biases": {"logit_bias": dict.fromkeys(range(100), 1.0)},
    "allowed ids": {"allowed_token_ids": range(1000)},
    "1 logprob": {"logprobs": 1},
    "20 logprobs": {"logprobs": 20},
    "prompt logprobs": {"prompt_logprobs": 1},
    "stop strings": {"stop": ["\x00never\x00"]},
    "a grammar": {"structured_outputs": StructuredOutputsParams(regex="[a-z ]{20000}"), "ignore_eos": False},
}


def features(args: Namespace, vocab_size: int, max_model_len: int) -> Workload:
    """Run the offline workload once for each of FEATURES that the model allows; report output tokens/s."""
    rng = Random(5)
    groups: list[Group] = []
    figures = []
    (group,), (figure,) = offline(args, vocab_size, max_model_len)
    for name, options in FEATURES.items():
        if is_allowed(options, args, vocab_size):
            # Different prompts each time, so that none is cached.
            prompts = [random_prompts(rng, 1, len(p), len(p), vocab_size)[0] for p in group.prompts]
            figures.append(Figure(f"tok/s, {name}", figure.amount, itemgetter(len(groups))))
            groups.append(Group(prompts, group.lens, group.temperature, options))
    return groups, figures


def is_allowed(options: dict[str, Any], args: Namespace, vocab_size: int) -> bool:
    """Return whether the model has the tokens, and the tokenizer, that a feature's `options` need."""
    token_ids = options.get("allowed_token_ids") or options.get("logit_bias") or [0]
    if max(token_ids) >= vocab_size:
        return False
    if "stop" not in options and "structured_outputs" not in options:
        return True
    folder = Path(args.model or "")
    has_tokenizer = args.model not in PRESETS and args.load_format != "dummy"
    if args.model and folder.is_dir():
        has_tokenizer = has_tokenizer and any(folder.glob("tokenizer*"))
    return has_tokenizer and importlib.util.find_spec("llguidance") is not None


STANDARD = {"offline": offline, "latency": latency, "prefill": prefill, "prefix": prefix}
WORKLOADS = {**STANDARD, "features": features}
WORKLOAD_NAMES = [*WORKLOADS, "start"]


def chosen_workloads(args: Namespace) -> list[str]:
    """Return the names of the workloads to run. The start of other engines is not measured."""
    if args.workload != "all":
        return [args.workload]
    return [*STANDARD, "start"] if "nanovllm" in args.engine else list(STANDARD)
