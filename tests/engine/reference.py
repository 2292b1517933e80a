"""What transformers says."""

from pathlib import Path

import torch


def load_reference(path: Path):
    """The transformers model of a folder or a GGUF file, float32, on the CPU."""
    from transformers import AutoModelForCausalLM

    where = {"pretrained_model_name_or_path": path}
    if path.is_file():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()


def reference_greedy(model, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of one prompt, without padding; end-of-sequence tokens are ignored."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **options)
    return out[0, len(prompt) :].tolist()
