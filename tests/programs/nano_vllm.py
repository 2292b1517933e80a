"""The calls of nano-vLLM's example.py and bench.py: none of their arguments and results may change.

    python -m tests.programs.nano_vllm FOLDER

The engine is never closed, as there.
"""

import sys
import time
from random import Random

from transformers import AutoTokenizer

from nanovllm import LLM, SamplingParams


def example(path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)
    chats = [[{"role": "user", "content": text}] for text in ("introduce yourself", "list all prime numbers")]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.6, max_tokens=256))
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"Prompt: {prompt!r}")
        print(f"Completion: {output['text']!r}")


def benchmark(path: str, num_seqs: int = 16, max_len: int = 60) -> None:
    random = Random(0)
    llm = LLM(path, enforce_eager=False, max_model_len=4096)
    prompts = [[random.randint(0, 250) for _ in range(random.randint(10, max_len))] for _ in range(num_seqs)]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=random.randint(10, max_len)) for _ in prompts]
    llm.generate(["Benchmark: "], SamplingParams())
    start = time.time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.time() - start
    total = sum(sampling_params.max_tokens for sampling_params in params)
    assert total == sum(len(output["token_ids"]) for output in outputs)
    print(f"Total: {total}tok, Time: {seconds:.2f}s, Throughput: {total / seconds:.2f}tok/s")


if __name__ == "__main__":
    example(*sys.argv[1:])
    benchmark(*sys.argv[1:])
