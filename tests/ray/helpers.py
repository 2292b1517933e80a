"""Helpers for tests of replicas."""

import os
import random
import signal
import threading
import time

import ray

from nanovllm import SamplingParams
from nanovllm.ray import Replicas
from tests.helpers import all_end, wait_until
from tests.ray.conftest import OPTIONS


def make_replicas(model, num_replicas=2, **options):
    """Return replicas with small engines, which take one CPU each and are spread over the hosts."""
    options = {"actor_options": {"scheduling_strategy": "SPREAD"}, **OPTIONS, **options}
    return Replicas(num_replicas, model, **options)


def pid_of(replica):
    """Return the process id of a replica's actor."""
    return ray.get(replica.actor.__ray_call__.remote(lambda actor: os.getpid()))


def kill(replica):
    """Kill a replica's process."""
    pid = pid_of(replica)
    os.kill(pid, signal.SIGKILL)
    assert all_end([pid])


def set_step_time(replica, seconds):
    """Let each step of a replica's engine take longer, so that its requests last longer than a test may be held up."""

    def set_hook(actor):
        actor.llm_engine.on_step = lambda stats: time.sleep(seconds)

    ray.get(replica.actor.__ray_call__.remote(set_hook))


def stop_after(replica, num_steps):
    """Let a replica's engine stop for ever after some steps."""

    def set_hook(actor):
        steps = iter(range(num_steps))
        actor.llm_engine.on_step = lambda stats: next(steps, None) is None and threading.Event().wait()

    ray.get(replica.actor.__ray_call__.remote(set_hook))


def all_run(replicas, number):
    """Return whether so many replicas run soon. Those that were killed before do not count."""
    return wait_until(lambda: replicas.metrics() and len(replicas._replicas) == number)


def mixed_requests(number, seed=0):
    """Return prompts, as texts and as ids, and parameters: greedy, sampled and of two samples, of several lengths."""
    rng = random.Random(seed)
    prompts, params = [], []
    for i in range(number):
        text = f"Request {i}: {rng.random()}" * rng.randrange(1, 4)
        prompts.append(text if i % 2 else {"prompt_token_ids": [2 + ord(letter) % 128 for letter in text]})
        options = {"max_tokens": rng.randrange(1, 24), "ignore_eos": True}
        if i % 3:
            options |= {"temperature": 1.0, "seed": i, "n": 1 + i % 2}
        else:
            options |= {"temperature": 0.0, "logprobs": 1}
        params.append(SamplingParams(**options))
    return prompts, params


def samples(outputs):
    """Return what was generated: the tokens, texts, reasons and log-probabilities of all samples."""
    return [
        [(one.token_ids, one.text, one.finish_reason, _rounded(one.logprobs)) for one in output.outputs]
        for output in outputs
    ]


def _rounded(logprobs):
    """Return log-probabilities that do not depend on the batch."""
    return logprobs and [{token_id: round(each.logprob, 3) for token_id, each in row.items()} for row in logprobs]
