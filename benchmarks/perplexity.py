"""Perplexity of a model on a fixed text, as it is and with weights, keys and values in FP8.

    python -m benchmarks.perplexity [--model MODEL] [--device cpu] [--dtype float32] [--variants plain weights kv both]

The text is `perplexity.txt`, next to this file. It is cut into windows that start without context. All tokens of a
window but the first are scored. Every variant scores the same tokens, so the differences of their log-probabilities
have a standard error.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.fp8_kv import use_fp8_kv
from nanovllm import LLM, SamplingParams

TEXT = Path(__file__).with_name("perplexity.txt")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"quantization": "fp8"},
    "kv": {"kv_cache_dtype": "fp8"},
    "both": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}


class Comparison(NamedTuple):
    """How a variant's log-probabilities of the text differ from those of the first variant.

    Attributes:
        perplexity: exp of the mean negative log-probability of a token.
        increase: of the mean negative log-probability, in nats.
        error: standard error of `increase`.
        distance: mean absolute difference of a token's log-probability.
    """

    perplexity: float
    increase: float
    error: float
    distance: float

    @classmethod
    def of(cls, logprobs: Sequence[float], first: Sequence[float]) -> "Comparison":
        """Compare the log-probabilities of the same tokens."""
        count = len(logprobs)
        differences = [theirs - mine for mine, theirs in zip(logprobs, first, strict=True)]
        mean = sum(differences) / count
        variance = sum((difference - mean) ** 2 for difference in differences) / count
        distance = sum(map(abs, differences)) / count
        return cls(math.exp(-sum(logprobs) / count), mean, math.sqrt(variance / count), distance)


def windows_of(token_ids: list[int], size: int) -> list[list[int]]:
    """Cut a text into windows of `size` tokens. The last one may be shorter, but has at least 2."""
    windows = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
    return [window for window in windows if len(window) > 1]


def score(llm: LLM, text: str, window: int) -> list[float]:
    """Return the log-probability of each token of the text but the first one of each window."""
    windows = windows_of(llm.tokenizer.encode(text), window)
    outputs = llm.generate(windows, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    return [
        scores[token_id].logprob
        for token_ids, output in zip(windows, outputs, strict=True)
        for token_id, scores in zip(token_ids, output.prompt_logprobs or [], strict=True)
        if scores is not None  # the first token has no context
    ]


def compare(
    model: str | Path | None, text: str, window: int, variants: Sequence[str], **options: Any
) -> dict[str, Comparison]:
    """Run the variants one after the other, and compare each with the first.

    Args:
        options: of `LLM`, for all variants.
    """
    logprobs: dict[str, list[float]] = {}
    on_cpu = options.get("device") == "cpu" or not torch.cuda.is_available()
    for variant in variants:
        chosen = dict(VARIANTS[variant])
        has_fp8_kv = on_cpu and chosen.pop("kv_cache_dtype", None) is not None
        with LLM(model, max_model_len=window + 1, **options, **chosen) as llm:
            if has_fp8_kv:
                use_fp8_kv(llm)
            logprobs[variant] = score(llm, text, window)
    first = logprobs[variants[0]]
    return {variant: Comparison.of(values, first) for variant, values in logprobs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, .gguf file or hub id; the default model if not given")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window")
    parser.add_argument(
        "--variants", nargs="+", default=["plain", "weights"], choices=VARIANTS, help="the first is the reference"
    )
    args = parser.parse_args()
    if args.window < 2:
        parser.error(f"--window must be at least 2, got {args.window}")
    text = TEXT.read_text()
    try:
        results = compare(args.model, text, args.window, args.variants, device=args.device, dtype=args.dtype)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    print("| variant | perplexity | nats per token more | mean change of a log-probability |")
    print("|---|---|---|---|")
    for variant, result in results.items():
        increase = f"{result.increase:+.4f} ± {result.error:.4f}"
        print(f"| {variant} | {result.perplexity:.3f} | {increase} | {result.distance:.4f} |")


if __name__ == "__main__":
    main()
