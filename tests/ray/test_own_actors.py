"""Engines in Ray's actors, and in the tasks of Ray Data, without `nanovllm.ray`."""

import numpy as np
import pytest
import ray

from nanovllm import LLM, SamplingParams
from tests.models.tiny import save_tiny

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("cluster")]

OPTIONS = dict(device="cpu", kvcache_block_size=16, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64)
PARAMS = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
TEXTS = ["Once", "upon a", "time there was"]


class Engine:
    """An engine that an actor owns. It is also what Ray Data calls for each batch of rows."""

    def __init__(self, model, **options):
        self.llm = LLM(model, **OPTIONS, **options)

    def generate(self, prompts):
        return [list(out.outputs[0].token_ids) for out in self.llm.generate(prompts, PARAMS, use_tqdm=False)]

    def update_weights(self, folder):
        return self.llm.update_weights(folder)

    def close(self):
        self.llm.close()

    def __call__(self, batch):
        ids, texts = batch["ids"], batch["text"]
        assert isinstance(ids, np.ndarray) and isinstance(texts, np.ndarray)
        return {"row": batch["row"], "tokens": self.generate(ids), "of_text": self.generate(texts)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two sets of weights of a model."""
    return [str(save_tiny(tmp_path_factory.mktemp("model"), "qwen2", seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def wants_of_text(model):
    engine = Engine(model)
    results = engine.generate(PROMPTS), engine.generate(TEXTS)
    engine.close()
    return results


@pytest.fixture(scope="module")
def wants(models):
    results = []
    for model in models:
        engine = Engine(model)
        results.append(engine.generate(PROMPTS))
        engine.close()
    return results


def test_two_actors_have_an_engine_each(models, wants):
    actors = [ray.remote(Engine).options(num_cpus=1).remote(models[0]) for _ in range(2)]
    assert ray.get([actor.generate.remote(PROMPTS) for actor in actors]) == [wants[0]] * 2
    assert ray.get(actors[1].update_weights.remote(models[1])) == 1
    assert ray.get([actor.generate.remote(PROMPTS) for actor in actors]) == wants
    ray.get([actor.close.remote() for actor in actors])
    for actor in actors:
        ray.kill(actor)


def test_an_actor_has_an_engine_of_two_ranks(models, wants):
    actor = ray.remote(Engine).remote(models[0], tensor_parallel_size=2)
    assert ray.get(actor.generate.remote(PROMPTS)) == wants[0]
    ray.get(actor.close.remote())
    ray.kill(actor)


def test_ray_data_answers_a_dataset_of_prompts(model, wants_of_text):
    rows = [{"row": i, "ids": PROMPTS[i % 3], "text": TEXTS[i % 3]} for i in range(10)]
    pool = ray.data.ActorPoolStrategy(size=1)
    answers = (
        ray.data.from_items(rows)
        .map_batches(Engine, fn_constructor_args=[model], batch_size=4, num_cpus=1, compute=pool)
        .take_all()
    )
    assert sorted(int(answer["row"]) for answer in answers) == list(range(10))
    for answer in answers:
        for name, want in zip(("tokens", "of_text"), wants_of_text, strict=True):
            assert list(map(int, answer[name])) == want[answer["row"] % 3]
