"""Answers of transformers, to compare with."""

import functools
from pathlib import Path

import torch


@functools.cache  # transformers takes 15 s to read the default model's GGUF; tests that need it share a worker
def load_reference(path: Path):
    """Return the transformers model of a folder or a GGUF file, float32, on the CPU. It is cached: do not change it."""
    from transformers import AutoModelForCausalLM

    where = {"pretrained_model_name_or_path": path}
    if path.is_file():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()


def reference_greedy(model, prompt: list[int], num_tokens: int) -> list[int]:
    """Return the greedy tokens of one prompt, without padding. Ignore end-of-sequence tokens."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **options)
    return out[0, len(prompt) :].tolist()


def reference_choices(model, prompt: list[int], continuation: list[int]) -> list[int]:
    """Return the greedy choice at each position of `continuation`, given all tokens before it.

    If it equals `continuation`, that is the result of greedy decoding. This takes only one forward.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + continuation[:-1]])).logits[0]
    return logits[len(prompt) - 1 :].argmax(-1).tolist()
