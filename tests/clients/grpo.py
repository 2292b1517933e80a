"""TRL's GRPO trainer on a tiny model. As a program, one rank of a trainer whose engine has them all.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.clients.grpo MODEL FOLDER

Each rank prints one line of JSON: its figures, and its engine's log-probabilities after the last step.
"""

import json
import sys
from pathlib import Path

import nanovllm.as_vllm  # noqa: F401  # before trl

# isort: split
import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

from nanovllm import SamplingParams

PROMPTS = ["One", "Two and", "Three or more", "Four"]
TEXT_IDS = list(range(40, 90))


def reward_of_even_tokens(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make_trainer(model, folder, **options):
    config = trl.GRPOConfig(
        output_dir=str(folder),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        max_completion_length=12,
        per_device_train_batch_size=4,
        num_generations=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        seed=1,
        **options,
    )
    return trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward_of_even_tokens,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 2}),
    )


def prompt_logprobs(llm):
    outputs = llm.generate([TEXT_IDS], SamplingParams(max_tokens=1, prompt_logprobs=3), use_tqdm=False)
    return [{i: entry.logprob for i, entry in row.items()} for row in outputs[0].prompt_logprobs[1:]]


def figures(trainer):
    """Return what the trainer logged of each step."""
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def main(model, folder):
    trainer = make_trainer(
        model, Path(folder) / "trainer", vllm_tensor_parallel_size=2, vllm_enable_sleep_mode=True, temperature=0.7
    )
    trainer.train()
    generation = trainer.vllm_generation
    generation.sync_weights()
    generation.llm.wake_up(tags=["kv_cache"])
    logprobs = prompt_logprobs(generation.llm)
    if dist.get_rank() == 0:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(Path(folder) / "trained")
    line = json.dumps([dist.get_backend(), generation.llm.config.tensor_parallel_size, figures(trainer), logprobs])
    # One write, as the ranks share the pipe.
    sys.stdout.write(f"rank {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
