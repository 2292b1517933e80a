"""POST /v1/completions."""

import asyncio
import threading

import pytest
from tokenizers import processors

from nanovllm import LLM, AsyncLLM, SamplingParams
from nanovllm.server import completions, streaming
from nanovllm.server.app import _greeting
from nanovllm.server.completions import _by_name
from tests.engine.test_text import save_with_tokenizer, sentencepiece_like
from tests.server.conftest import OPTIONS
from tests.server.serving import call, error_of, events_of, make_server, post, with_client

PATH = "/v1/completions"
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def offline(model):
    with LLM(model, **OPTIONS) as offline:
        yield offline


def params(**options):
    return SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, **options)


def test_prompts_in_all_forms_get_the_offline_answers(llm, offline):
    ids = [[20, 30, 40], [50, 60, 70, 80]]
    for prompt, prompts in (("hello", ["hello"]), (["a", "bc"], ["a", "bc"]), (ids[0], ids[:1]), (ids, ids)):
        answer = post(llm, PATH, {"prompt": prompt, **GREEDY})
        expected = offline.generate(prompts, params(), use_tqdm=False)
        assert [choice["text"] for choice in answer["choices"]] == [output.text for output in expected]
        assert [choice["index"] for choice in answer["choices"]] == [*range(len(prompts))]
        num_prompt = sum(len(output.prompt_token_ids) for output in expected)
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (num_prompt, 8 * len(prompts))
        assert usage["total_tokens"] == num_prompt + 8 * len(prompts)
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}


@pytest.mark.parametrize("echo", [False, True])
def test_joined_stream_equals_the_whole_answer(llm, echo):
    body = {"prompt": ["hello", "é😀"], "n": 3, "seed": 7, "max_tokens": 30, "temperature": 1.5, "echo": echo}
    body |= {"logprobs": 2, "ignore_eos": True}
    whole = post(llm, PATH, body)
    answer = call(llm, "POST", PATH, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = events_of(answer.text)
    assert last["choices"] == [] and last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    joined = {}
    for event in events:
        assert event["usage"] is None and len({event["id"], last["id"]}) == 1
        (choice,) = event["choices"]
        parts = joined.setdefault(choice["index"], {"text": "", "finish_reason": None, "logprobs": {}})
        assert parts["finish_reason"] is None, "there is something after the end"
        parts["text"] += choice["text"]
        parts["finish_reason"] = choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            parts["logprobs"].setdefault(name, []).extend(values)
    for choice in whole["choices"]:
        parts = joined[choice["index"]]
        for name in ("text", "finish_reason"):
            assert parts[name] == choice[name]
        for name in ("tokens", "text_offset"):
            assert parts["logprobs"][name] == choice["logprobs"][name]
        assert parts["logprobs"]["token_logprobs"][1:] == pytest.approx(
            choice["logprobs"]["token_logprobs"][1:], abs=1e-4
        )


def test_echo_of_token_ids_scores_them_as_lm_eval_reads_it(llm, offline):
    prompts = [[20, 30, 40], [50, 60, 70, 80]]
    body = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234, "temperature": 0}
    answer = post(llm, PATH, body)
    expected = offline.generate(prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1), use_tqdm=False)
    for choice, output in zip(answer["choices"], expected, strict=True):
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        assert len(logprobs["token_logprobs"]) == len(output.prompt_token_ids) + 1
        rows = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        scores = [row[token_id].logprob for token_id, row in rows]
        assert logprobs["token_logprobs"][1:-1] == pytest.approx(scores, abs=1e-4)
        tops = [max(entry.logprob for entry in row.values()) for row in output.prompt_logprobs[1:]]
        assert [max(top.values()) for top in logprobs["top_logprobs"][1:-1]] == pytest.approx(tops, abs=1e-4)
        # The sampled token is the most likely one, by exactly the same number.
        assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())


def test_log_probabilities_that_fill_the_memory_are_refused(llm, monkeypatch):
    monkeypatch.setattr(streaming, "MAX_RESPONSE_LOGPROBS", 100)
    body = {"prompt": [5] * 20, "max_tokens": 1, "logprobs": 3, "echo": True}
    assert call(llm, "POST", PATH, body).status_code == 200
    num_steps = llm.llm_engine.core.num_steps
    answer = call(llm, "POST", PATH, {**body, "n": 2})
    assert answer.status_code == 400 and "more than 100 log-probabilities" in error_of(answer)
    assert llm.llm_engine.core.num_steps == num_steps  # nothing was computed
    # A stream holds those of one choice.
    assert len(events_of(call(llm, "POST", PATH, {**body, "n": 2, "stream": True}).text)) == 2
    assert "more than 100 log-probabilities" in call(llm, "POST", PATH, {**body, "logprobs": 4, "stream": True}).text


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_of_tokens_index_the_text_also_after_characters_of_several_tokens(llm, stream):
    body = {"prompt": "a🌱b\U0001f600é", "echo": True, "logprobs": 0, "max_tokens": 8, "seed": 1, "stream": stream}
    answer = call(llm, "POST", PATH, body)
    choices = [event["choices"][0] for event in events_of(answer.text)] if stream else answer.json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    logprobs = [choice["logprobs"] for choice in choices]
    tokens, offsets = ([x for each in logprobs for x in each[name]] for name in ("tokens", "text_offset"))
    assert offsets[:12] == [0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4]  # a token is a byte
    for token, offset in zip(tokens[12:], offsets[12:], strict=True):
        assert token.startswith(("bytes:", "token_id:")) or text[offset] == token


@pytest.mark.parametrize("skipped", [True, False])
def test_offsets_count_special_tokens_only_if_they_are_in_the_text(llm, skipped):
    special = llm.tokenizer.all_special_ids[0]
    name = llm.tokenizer.convert_ids_to_tokens(special)
    body = {
        "prompt": [special, *llm.tokenizer.encode("ab", add_special_tokens=False)],
        "echo": True,
        "logprobs": 0,
        "max_tokens": 2,
        "min_tokens": 2,
    }
    body |= {"allowed_token_ids": [special], "ignore_eos": True, "skip_special_tokens": skipped}
    (choice,) = post(llm, PATH, body)["choices"]
    start = len(name)
    assert choice["text"] == name + "ab" + ("" if skipped else 2 * name)
    ends = [start + 2, start + 2] if skipped else [start + 2, 2 * start + 2]
    assert choice["logprobs"]["text_offset"] == [0, start, start + 1, *ends]


def test_a_start_token_that_the_tokenizer_adds_is_not_in_the_text(llm):
    backend, special = llm.llm_engine.input_processor.codec.backend, llm.tokenizer.all_special_ids[0]
    name, before = llm.tokenizer.convert_ids_to_tokens(special), backend.post_processor
    backend.post_processor = processors.TemplateProcessing(f"{name} $A", special_tokens=[(name, special)])
    try:
        (choice,) = post(llm, PATH, {"prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 0})["choices"]
        assert (choice["text"], choice["logprobs"]["tokens"]) == ("ab", [name, "a", "b"])
        assert choice["logprobs"]["text_offset"] == [0, 0, 1]
    finally:
        backend.post_processor = before


def test_a_space_that_the_tokenizer_adds_is_not_in_the_text(tmp_path):
    llm = AsyncLLM(save_with_tokenizer(tmp_path, sentencepiece_like()), **OPTIONS)
    try:
        body = {"prompt": "yes no yes", "echo": True, "logprobs": 0, **GREEDY}
        (choice,) = post(llm, PATH, body)["choices"]
        assert choice["logprobs"]["text_offset"][:3] == [0, 3, 6] and choice["text"].startswith("yes no yes")
        (same,) = post(llm, PATH, {**body, "prompt": llm.tokenizer.encode(body["prompt"])})["choices"]
        assert same["logprobs"]["text_offset"] == choice["logprobs"]["text_offset"]
        (choice,) = post(llm, PATH, {**body, "prompt": " yes no"})["choices"]
        assert choice["logprobs"]["text_offset"][:3] == [0, 0, 4]
    finally:
        llm.close()


def test_each_event_has_the_usage_so_far_if_asked(llm):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "hello", **GREEDY, "stream": True, "stream_options": options}
    *events, last = events_of(call(llm, "POST", PATH, body).text)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"] > counts[0] > 0


def test_a_long_event_of_a_stream_has_the_same_content(llm, monkeypatch):
    body = {"prompt": [5] * 20, "max_tokens": 1, "logprobs": 3, "echo": True, "stream": True, "temperature": 0}
    (want,) = events_of(call(llm, "POST", PATH, body).text)
    monkeypatch.setattr(completions, "LONG_LOGPROBS", 5)
    (event,) = events_of(call(llm, "POST", PATH, body).text)
    assert event["choices"] == want["choices"]


def test_echo_without_max_tokens_gives_the_prompt_alone(llm):
    answer = post(llm, PATH, {"prompt": "hello", "echo": True, "max_tokens": 0, "logprobs": 0})
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "length")
    assert choice["logprobs"]["tokens"] == list("hello") and choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    assert answer["usage"]["completion_tokens"] == 0


def test_stop_string_ends_the_text_before_it(llm):
    text = post(llm, PATH, {"prompt": "hello", **GREEDY})["choices"][0]["text"]
    stop = next(char for char in text[1:] if char.isascii())
    (choice,) = post(llm, PATH, {"prompt": "hello", **GREEDY, "stop": [stop]})["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_logprobs_name_parts_of_characters_by_their_bytes(llm):
    body = {"prompt": "aé", "echo": True, "max_tokens": 0, "logprobs": 5}
    logprobs = post(llm, PATH, body)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    for i in (1, 2):
        row = logprobs["top_logprobs"][i]
        assert row[logprobs["tokens"][i]] == logprobs["token_logprobs"][i] and len(row) in (5, 6)


def test_logprobs_without_a_tokenizer_name_tokens_by_their_ids(model):
    with LLM(model, **OPTIONS) as offline:
        (output,) = offline.generate([[5, 6]], params(logprobs=2), use_tqdm=False)
    llm = AsyncLLM(model, skip_tokenizer_init=True, **OPTIONS)
    try:
        (choice,) = post(llm, PATH, {"prompt": [5, 6], **GREEDY, "logprobs": 2})["choices"]
        greeting = _greeting(make_server(llm)[0], "127.0.0.1", 80)
    finally:
        llm.close()
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token_id}" for token_id in output.token_ids]
    names = [{f"token_id:{token_id}" for token_id in row} for row in output.outputs[0].logprobs]
    assert [set(row) for row in logprobs["top_logprobs"]] == names
    assert '"prompt": [1, 2, 3]' in greeting


def test_logprobs_of_minus_infinity_are_json(llm):
    body = {"prompt": "hello", **GREEDY, "logprobs": 3, "allowed_token_ids": [40]}
    assert len(post(llm, PATH, body)["choices"][0]["logprobs"]["top_logprobs"]) == 8


def test_answers_carry_the_request_id_and_the_model(llm):
    body = {"prompt": "a", **GREEDY, "model": "other"}
    answer = call(llm, "POST", PATH, body, {"x-request-id": "mine"}, served_model_name="tiny,other")
    assert answer.headers["x-request-id"] == "mine"
    assert (answer.json()["id"], answer.json()["model"]) == ("cmpl-mine", "tiny")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], 2]}, "prompt"),
        ({"prompt": [5000]}, "prompt"),
        ({"prompt": [[5000]], "echo": True}, "prompt"),
        ({"prompt": "x" * 600}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[5], [5000]]}, "prompt"),
        ({"prompt": "a\ud800b"}, None),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "temprature": 1}, "temprature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "n": 65}, "n"),
        ({"prompt": ["a"] * 40, "n": 32}, None),
        ({"prompt": "a", "logprobs": 1000}, "logprobs"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "store": True}, "store"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"more": True}}, "stream_options.more"),
        ({"prompt": "a", "structured_outputs": {"json": {"type": "nothing"}}}, "structured_outputs"),
        ({"prompt": "a", "structured_outputs": {}}, "structured_outputs"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_request_gets_400_that_names_the_fault(llm, body, param, stream):
    if stream and "stream_options" in body and "stream" not in body:
        return
    answer = call(llm, "POST", PATH, {**body, "stream": True} if stream else body)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)
    assert answer.json()["error"]["param"] == param


def test_fields_without_effect_are_accepted(llm):
    body = {"prompt": "a", **GREEDY, "user": "me", "metadata": {"a": "b"}, "store": False, "suffix": None, "best_of": 1}
    assert post(llm, PATH, body)["choices"][0]["text"]


def test_unknown_model_gets_404(llm):
    answer = call(llm, "POST", PATH, {"prompt": "a", "model": "gpt-9"})
    assert answer.status_code == 404 and "tiny" in error_of(answer)
    assert answer.json()["error"]["code"] == "model_not_found"


def test_concurrent_answers_equal_those_alone(llm):
    prompts = [f"prompt {i}" for i in range(24)]
    alone = [post(llm, PATH, {"prompt": prompt, **GREEDY})["choices"][0]["text"] for prompt in prompts]

    async def use(client, state):
        bodies = [{"prompt": prompt, **GREEDY, "stream": i % 2 == 0} for i, prompt in enumerate(prompts)]
        return await asyncio.gather(*(client.post(PATH, json=body) for body in bodies))

    for i, answer in enumerate(with_client(llm, use)):
        if i % 2 == 0:
            text = "".join(event["choices"][0]["text"] for event in events_of(answer.text))
        else:
            text = answer.json()["choices"][0]["text"]
        assert text == alone[i]


def test_log_probabilities_of_long_prompts_are_written_outside_the_event_loop(llm, monkeypatch):
    writers = set()

    def noted(*args):
        writers.add(threading.current_thread() is threading.main_thread())
        return _by_name(*args)

    monkeypatch.setattr("nanovllm.server.completions._by_name", noted)
    monkeypatch.setattr(completions, "LONG_LOGPROBS", 3)  # a token has 4 here
    for stream in (False, True):
        body = {"prompt": "abc", "max_tokens": 2, "echo": True, "logprobs": 3, "stream": stream}
        assert call(llm, "POST", PATH, body).status_code == 200
    assert writers == {False}
