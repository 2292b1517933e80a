"""What transformers says."""

from pathlib import Path

import torch


def reference_greedy(path: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' greedy tokens in float32 on the CPU, one prompt at a time, without padding."""
    from transformers import AutoModelForCausalLM

    where = {"pretrained_model_name_or_path": path}
    if path.is_file():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()
