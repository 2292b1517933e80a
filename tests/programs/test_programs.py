"""Programs as users write them around the engine, run as they would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovllm import LLM
from nanovllm.checkpoints.model_source import open_model
from tests.engine.reference import load_reference
from tests.models.tiny import CHAT_TEMPLATE, save_tiny, save_tiny_with_tokenizer
from tests.programs.evaluate import loglikelihoods

FOLDER = Path(__file__).parent


def run(*command):
    environment = dict(os.environ, PYTHONPATH=os.getcwd())
    result = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_evaluation_client_scores_the_default_model():
    counts = re.search(r"acc (\d+)/(\d+) match (\d+)/(\d+)", run(FOLDER / "evaluate.py")).groups()
    right, of, found, questions = map(int, counts)
    assert right >= of - 1 and found == questions


@pytest.mark.xdist_group("default model")
def test_loglikelihoods_equal_transformers():
    source = open_model(None)
    with LLM(max_model_len=64, dtype="float32") as llm:  # in 4 and 8 bits they differ a little
        pairs = [("The sky is", " blue and the grass is green"), ("One two three", " four"), ("A", "\n\nxyzzy")]
        got = loglikelihoods(llm, pairs)
        ids = [(llm.tokenizer.encode(a), llm.tokenizer.encode(a + b)) for a, b in pairs]
    model = load_reference(source.path)
    for (total, greedy), (context, whole) in zip(got, ids, strict=True):
        with torch.inference_mode():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        want = sum(logprobs[i - 1, whole[i]].item() for i in range(len(context), len(whole)))
        assert total == pytest.approx(want, abs=0.01)
        assert greedy == all(logprobs[i - 1].argmax() == whole[i] for i in range(len(context), len(whole)))


def test_training_loop_learns_and_logprobs_of_engine_and_trainer_agree(tmp_path):
    output = run(FOLDER / "grpo.py", save_tiny(tmp_path, "qwen3"), 8)
    steps = re.findall(r"step \d+ reward ([\d.]+) gap (\S+)", output)
    rewards, gaps = zip(*((float(reward), float(gap)) for reward, gap in steps), strict=True)
    assert len(steps) == 8 and max(gaps) < 1e-3
    assert rewards[-1] > rewards[0] + 0.15


def test_calls_of_nano_vllms_scripts_run_unchanged(tmp_path):
    output = run(FOLDER / "nano_vllm.py", save_tiny_with_tokenizer(tmp_path, "qwen3", CHAT_TEMPLATE))
    assert len(re.findall(r"^Prompt: '<user>.+<assistant>'\nCompletion: ['\"].*['\"]$", output, re.MULTILINE)) == 2
    assert re.search(r"Total: \d{3}tok, Time: .*s, Throughput: .*tok/s", output)
