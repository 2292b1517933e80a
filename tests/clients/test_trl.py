"""TRL's GRPO trainer with the engine in its own process (`vllm_mode="colocate"`)."""

import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from nanovllm import LLM
from tests.clients.grpo import figures, make_trainer, prompt_logprobs


@pytest.fixture(autouse=True)
def own_environment():
    """Forget the variables of torchrun that the trainer sets."""
    with mock.patch.dict(os.environ):
        yield


def assert_on_policy(steps):
    """Check that the log-probabilities of engine and trainer agree in two steps."""
    assert len(steps) == 2
    for step in steps:
        assert step["sampling/sampling_logp_difference/max"] < 1e-3
        assert step["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-3)
        assert step["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-3)


def fresh_logprobs(folder):
    """Return the log-probabilities of an engine that has loaded the trained weights."""
    with LLM(folder / "trained", device="cpu", max_model_len=64, max_num_seqs=8, skip_tokenizer_init=True) as llm:
        return prompt_logprobs(llm)


@pytest.mark.parametrize("sleep", [False, True])
def test_grpo_steps_train_the_engine_too(model, tmp_path, sleep):
    trainer = make_trainer(model, tmp_path / "trainer", vllm_enable_sleep_mode=sleep, temperature=0.7)
    generation = trainer.vllm_generation
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.train()

    assert_on_policy(figures(trainer))
    assert all(not torch.equal(param, before[name]) for name, param in trainer.model.named_parameters())

    # The trainer updates the engine before it generates, so not after its last step.
    generation.sync_weights()
    if sleep:
        generation.llm.wake_up(tags=["kv_cache"])
    trainer.model.save_pretrained(tmp_path / "trained")
    assert prompt_logprobs(generation.llm) == fresh_logprobs(tmp_path)
    generation.llm.shutdown()


def test_grpo_steps_of_two_ranks_train_their_common_engine(model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.clients.grpo", model, str(tmp_path)]
    environment = dict(os.environ, PYTHONPATH=os.getcwd())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(line.removeprefix("rank ")) for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert len(ranks) == 2
    wanted = fresh_logprobs(tmp_path)
    for backend, size, steps, logprobs in ranks:
        assert (backend, size) == ("gloo", 2)
        assert_on_policy(steps)
        for row, want in zip(logprobs, wanted, strict=True):
            assert {int(i): logprob for i, logprob in row.items()} == pytest.approx(want, abs=1e-4)
