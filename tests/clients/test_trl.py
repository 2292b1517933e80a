"""TRL's GRPO trainer with the engine in its own process (`vllm_mode="colocate"`)."""

import os
from unittest import mock

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams

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


@pytest.fixture(autouse=True)
def own_environment():
    """Forget the variables of torchrun that the trainer sets."""
    with mock.patch.dict(os.environ):
        yield


def prompt_logprobs(llm):
    outputs = llm.generate([TEXT_IDS], SamplingParams(max_tokens=1, prompt_logprobs=3), use_tqdm=False)
    return [{i: entry.logprob for i, entry in row.items()} for row in outputs[0].prompt_logprobs[1:]]


@pytest.mark.parametrize("sleep", [False, True])
def test_grpo_steps_train_the_engine_too(model, tmp_path, sleep):
    trainer = make_trainer(model, tmp_path / "trainer", vllm_enable_sleep_mode=sleep, temperature=0.7)
    generation = trainer.vllm_generation
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.train()

    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(steps) == 2
    for step in steps:
        assert step["sampling/sampling_logp_difference/max"] < 1e-3
        assert step["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-3)
        assert step["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-3)
    assert all(not torch.equal(param, before[name]) for name, param in trainer.model.named_parameters())

    # The trainer updates the engine before it generates, so not behind its last step.
    generation.sync_weights()
    if sleep:
        generation.llm.wake_up(tags=["kv_cache"])
    trainer.model.save_pretrained(tmp_path / "trained")
    with LLM(tmp_path / "trained", device="cpu", max_model_len=64, max_num_seqs=8, skip_tokenizer_init=True) as fresh:
        assert prompt_logprobs(generation.llm) == prompt_logprobs(fresh)
    generation.llm.shutdown()
