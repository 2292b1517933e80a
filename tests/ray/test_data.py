"""Ray Data: rows get answers or errors, also when an actor is lost."""

import asyncio
import json
import os
import signal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray

from nanovllm import SamplingParams
from nanovllm.ray.data import AnswerRows
from tests.helpers import greedy, sampled
from tests.ray.conftest import OPTIONS

pytestmark = pytest.mark.xdist_group("ray")

NEW_COLUMNS = ["generated_text", "generated_token_ids", "finish_reason", "error"]
PARAMS = SamplingParams(temperature=1.0, max_tokens=4, ignore_eos=True)


def answer_rows(dataset, model, params=PARAMS, cls=AnswerRows, num_actors=1, **options):
    """Answer a dataset."""
    return dataset.map_batches(
        cls,
        fn_constructor_kwargs={"model": model, "sampling_params": params, **OPTIONS},
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=1,
        **options,
    )


def row(i):
    """Return a row with one of the kinds of prompts, or in one of 500 with none."""
    kinds = {
        "prompt": f"Row {i}",
        "messages": [{"role": "user", "content": f"Row {i}"}],
        "prompt_token_ids": [i % 200, 3, 4],
    }
    kind = None if i % 500 == 7 else list(kinds)[i % 3]
    return {"id": i, "seed": i} | {name: value if name == kind else None for name, value in kinds.items()}


class AnswerRowsAndDie(AnswerRows):
    """One of the actors kills itself in its third batch."""

    num_batches = 0

    async def __call__(self, batch):
        self.num_batches += 1
        if self.num_batches == 3:
            try:
                os.close(os.open(os.environ["DIE_ONCE"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return await super().__call__(batch)


def test_rows_are_answered_once_each_though_an_actor_is_killed(cluster, model, one, tmp_path):
    rows = [row(i) for i in range(5000)]
    dataset = ray.data.from_items(rows, override_num_blocks=25)
    flag = tmp_path / "killed"
    options = {"runtime_env": {"env_vars": {"DIE_ONCE": str(flag)}}, "batch_size": 100, "num_actors": 2}
    found = answer_rows(dataset, model, cls=AnswerRowsAndDie, **options).take_all()
    assert flag.exists()
    answers = {answer["id"]: answer for answer in found}
    assert len(found) == 5000 and answers.keys() == set(range(5000))
    for i, answer in answers.items():
        assert (answer["error"] is None) == (i % 500 != 7) == (len(answer["generated_token_ids"] or []) == 4)
    assert "prompt_token_ids, messages or prompt" in answers[7]["error"]
    for i in range(0, 5000, 100):
        prompt = rows[i]["prompt"] or rows[i]["prompt_token_ids"] or one.chat_prompts(rows[i]["messages"])[0]
        (want,) = one.generate(prompt if isinstance(prompt, str) else [prompt], sampled(4, seed=i), use_tqdm=False)
        assert answers[i]["generated_token_ids"] == want.token_ids and answers[i]["generated_text"] == want.text


def test_jsonl_becomes_parquet_with_types_and_what_is_done_is_not_done_again(cluster, model, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(40)))
    out = tmp_path / "out"
    params = greedy(3, n=2)

    def run():
        dataset = ray.data.read_json(str(tmp_path / "in.jsonl"), lines=True, override_num_blocks=4)
        if out.exists():
            done = pq.read_table(out, columns=["id"])["id"].combine_chunks()
            dataset = dataset.map_batches(
                lambda table: table.filter(pc.invert(pc.is_in(table["id"], done))), batch_format="pyarrow"
            )
        answer_rows(dataset, model, params).write_parquet(str(out), mode=ray.data.SaveMode.APPEND)

    run()
    table = pq.read_table(out)
    assert sorted(table["id"].to_pylist()) == list(range(40))
    assert str(table.schema.field("generated_token_ids").type).count("list") == 2  # n is 2
    assert table["error"].null_count == 39
    min(out.iterdir()).unlink()  # as if the run had been interrupted
    assert 0 < pq.read_table(out).num_rows < 40
    run()
    assert sorted(pq.read_table(out)["id"].to_pylist()) == list(range(40))


def test_parameters_of_a_wrong_type_are_refused_by_name(model):
    with pytest.raises(TypeError, match="sampling_params must be SamplingParams, got"):
        AnswerRows(str(model), {"max_tokens": 3})


def test_a_second_pass_replaces_the_columns_of_the_first(model):
    answer = AnswerRows(model, greedy(3), **OPTIONS)
    rows = pa.table({"prompt": ["x", None], "error": ["old", "old"], "x": ["y", "z"]})
    once = asyncio.run(answer(rows))
    twice = asyncio.run(answer(once))
    assert once.equals(twice)
    assert sorted(once.column_names) == sorted({"prompt", "x", *NEW_COLUMNS})
    first, second = once["error"].to_pylist()
    assert first is None and "prompt_token_ids, messages or prompt" in second


def test_columns_that_python_cannot_read_stay_as_they_are(model):
    times = pa.array([1 << 62], pa.timestamp("s"))
    answered = asyncio.run(AnswerRows(model, greedy(3), **OPTIONS)(pa.table({"prompt": ["x"], "time": times})))
    assert answered["error"].to_pylist() == [None]
    assert answered["time"].combine_chunks().equals(times)


def test_batches_of_arrays_are_refused_by_name(cluster, model):
    with pytest.raises(Exception, match='batch_format="pyarrow"'):
        ray.data.from_items([row(0)]).map_batches(
            AnswerRows,
            fn_constructor_kwargs={"model": model, **OPTIONS},
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1,
        ).take_all()
