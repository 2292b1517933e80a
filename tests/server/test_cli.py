"""The command line: flags, the terminal chat and the load generator."""

import asyncio
import base64
import io
import itertools
import json
import resource
import runpy
import signal
import sys
import threading
from dataclasses import fields
from types import ModuleType, SimpleNamespace

import pytest

from benchmarks.workloads import offline
from nanovllm import SamplingParams, __version__
from nanovllm.cli import main as cli
from nanovllm.cli.bench_report import Run, summary, table
from nanovllm.cli.bench_serve import BenchOptions, arrivals, make_requests
from nanovllm.cli.chat import HELP, SETTINGS, Chat, ChatOptions
from nanovllm.cli.chat_models import Counts, EngineModel, ServerModel
from nanovllm.cli.flags import argument_docs, flag, parse_value
from nanovllm.cli.http_stream import Answer, Server, base_url
from nanovllm.cli.main import main
from nanovllm.config import Config
from nanovllm.server.events import Text, Thinking
from nanovllm.server.options import ServerOptions
from nanovllm.server.text_format import TextFormat
from tests.helpers import SOON, assert_nothing_held, finish
from tests.models.tiny import CHAT_TEMPLATE, save_tiny_with_tokenizer
from tests.server.scripted_http import scripted_server

# -- flags -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch):
    """Replace the server; return what it was started with."""
    calls = []
    module = ModuleType("nanovllm.server.app")
    module.serve = lambda config_options, server_options: calls.append((config_options, server_options))
    monkeypatch.setitem(sys.modules, "nanovllm.server.app", module)
    return calls


def help_of(capsys, *argv):
    with pytest.raises(SystemExit, match="0"):
        main([*argv, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["serve", "chat", "bench"]),
        (["serve"], ["MODEL", "--port", "--max-model-len"]),
        (["chat"], ["MODEL", "--url", "--device"]),
        (["bench"], ["serve"]),
        (["bench", "serve"], ["--request-rate", "--goodput"]),
    ],
)
def test_each_level_has_help(argv, words, capsys):
    text = help_of(capsys, *argv)
    assert all(word in text for word in words)


@pytest.mark.parametrize("options", [Config, ServerOptions])
def test_serve_has_a_flag_with_help_for_each_option(options, capsys):
    text = " ".join(help_of(capsys, "serve").split())
    docs = argument_docs(options)
    for declared in fields(options):
        if declared.name != "model":
            assert f"{flag(declared.name)} " in text or f"{flag(declared.name)}," in text
            # argparse may break a line at a hyphen.
            assert "".join(docs[declared.name].split()) in "".join(text.split())


def test_a_model_alone_leaves_all_defaults_to_the_engine(served):
    assert main(["serve", "some/model"]) == 0
    assert served == [({"model": "some/model"}, ServerOptions())]


def test_no_model_is_the_default_one(served):
    assert main(["serve"]) == 0
    assert served == [({}, ServerOptions())]


def test_given_flags_reach_the_engine_and_the_server_with_their_types(served):
    flags = "--port 0 --api-key a,b --drain-seconds 1.5 --tool-parser hermes --salt-prefix-cache"
    flags += " --max-num-seqs 8 --gpu-memory-utilization 0.5 --dtype float32 --no-enable-prefix-caching --enforce-eager"
    assert main(["serve", *flags.split()]) == 0
    ((config_options, server_options),) = served
    assert config_options == {
        "max_num_seqs": 8,
        "gpu_memory_utilization": 0.5,
        "dtype": "float32",
        "enable_prefix_caching": False,
        "enforce_eager": True,
    }
    assert server_options == ServerOptions(
        port=0, api_key="a,b", drain_seconds=1.5, tool_parser="hermes", salt_prefix_cache=True
    )


def test_api_key_comes_from_the_environment_unless_the_flag_is_given(served, monkeypatch):
    monkeypatch.setenv("NANOVLLM_API_KEY", "secret")
    assert main(["serve"]) == main(["serve", "--api-key", "a"]) == 0
    assert [options.api_key for _, options in served] == ["secret", "a"]


def test_clients_take_the_first_api_key_of_the_environment_unless_they_have_one(monkeypatch):
    monkeypatch.setenv("NANOVLLM_API_KEY", "secret, other")
    keys = []
    monkeypatch.setattr(cli, "chat", lambda options, _: keys.append(options.api_key) or 0)
    monkeypatch.setattr(cli, "bench_serve", lambda options: keys.append(options.api_key) or 0)
    for command in (["chat"], ["bench", "serve"]):
        main([*command, "--url", "http://h"])
        main([*command, "--url", "http://h", "--api-key", "a"])
        main([*command, "--url", "http://user:password@h"])
    main(["chat"])
    assert keys == ["secret", "a", None] * 2 + [None]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--port", "99999"], "port must be from 0 to 65535, got 99999"),
        (["serve", "--port", "x"], "--port"),
        (["serve", "--max-num-seqs", "0"], "max_num_seqs must be from 1"),
        (["serve", "--dtype", "int4"], "dtype must be one of"),
        (["serve", "--max-num-seq", "4"], "unrecognized arguments: --max-num-seq"),
        (["chat", "--url", "localhost:8000"], "url must be like http://127.0.0.1:8000"),
        (["chat", "--url", "http://u:p@h:99999"], "got 'http://h:99999'"),
        (["bench", "serve", "--url", "http://u:[@h"], "got 'http://h'"),
        (["chat", "--api-key", "k"], "api_key needs a url"),
        (["chat", "--url", "http://u:p@h", "--api-key", "k"], "api_key cannot be sent beside a user in the url"),
        (["bench", "serve", "--url", "http://u:p@h", "--api-key", "k"], "api_key cannot be sent beside a user"),
        (["chat", "--system", "\udcff"], "system must be UTF-8"),
        (["bench", "serve", "--request-rate", "0"], "request_rate must be above 0"),
        (["bench", "serve", "--input-len", "5", "2"], "input_len must be two numbers 1 <= LOW <= HIGH, got 5 2"),
        (["bench", "serve", "--goodput", "ttft"], "got 'ttft'"),
        (["bench", "serve", "--goodput", "ttft:0"], "got 'ttft:0'"),
        (["bench", "serve", "--goodput", "ttft:9", "e2e:9", "ttft:8"], "one goal for each name, got another for ttft"),
        (["bench", "serve", "--json", "/"], "json must be a file in a folder that exists, got '/'"),
        (["bench", "serve", "--goodput", "speed:3"], "the names ttft, tpot, e2e"),
        (["bench", "serve", "--json", "/no/such/folder/x.json"], "json must be a file in a folder that exists"),
        ([], "COMMAND"),
        (["bench"], "COMMAND"),
    ],
)
def test_wrong_usage_ends_with_one_line_and_status_2(argv, message, served, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not served


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(SystemExit, match="2"):
        main(["chat", "--url", "http://127.0.0.1:1"])
    assert capsys.readouterr().err.endswith("httpx is not installed; run: pip install 'nanovllm[server]'\n")


def test_python_m_runs_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanovllm", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("nanovllm", run_name="__main__")
    assert capsys.readouterr().out == f"nanovllm {__version__}\n"


@pytest.mark.usefixtures("served")
def test_process_1_obeys_sigterm_while_it_loads_a_model(monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 1)
    app = sys.modules["nanovllm.server.app"]
    monkeypatch.setattr(app, "serve", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert before is signal.SIG_DFL, "another handler would stay"
    try:
        with pytest.raises(SystemExit) as ended:
            main(["serve", "m"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_is_no_failure(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    monkeypatch.setattr(sys, stream, None)
    with scripted_server(chat=lambda handler, _: handler.stream([delta(content="a"), "[DONE]"])) as server:
        assert main(["chat", "m", "--url", server.url]) == 0


def test_characters_that_the_terminal_lacks_are_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    with scripted_server(chat=lambda handler, _: handler.stream([delta(content="é☃!"), "[DONE]"])) as server:
        assert main(["chat", "m", "--url", server.url]) == 0
    assert sys.stdout.buffer.getvalue() == "é?!\n".encode("latin-1")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_input_is_read_as_utf8_and_lines_of_other_bytes_are_reported(encoding, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO("\xff\n".encode("latin-1") + "é\n".encode()), encoding)
    )
    with scripted_server(chat=lambda handler, _: handler.stream([delta(content="a"), "[DONE]"])) as server:
        assert main(["chat", "m", "--url", server.url]) == 1
        (body,) = server.bodies("/v1/chat/completions")
    assert body["messages"] == [user("é")]
    assert capsys.readouterr().err == "Error: the input is not UTF-8\n"


def test_a_failure_to_start_is_one_line_and_status_1(monkeypatch, capsys):
    module = ModuleType("nanovllm.server.app")

    def serve(*_):
        raise OSError(98, "Address already in use")

    module.serve = serve
    monkeypatch.setitem(sys.modules, "nanovllm.server.app", module)
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == "nanovllm: [Errno 98] Address already in use\n"


@pytest.mark.parametrize(
    ("name", "text", "value"), [("top_k", "5", 5), ("temperature", "0.5", 0.5), ("ignore_eos", "on", True)]
)
def test_text_is_read_as_the_type_of_the_field(name, text, value):
    assert parse_value(SamplingParams, name, text) == value


@pytest.mark.parametrize(("name", "text"), [("top_k", "0.5"), ("temperature", "hot"), ("ignore_eos", "2")])
def test_text_of_another_type_is_refused_by_name(name, text):
    with pytest.raises(ValueError, match=f"{name} must be .*'{text}'"):
        parse_value(SamplingParams, name, text)


# -- chat ------------------------------------------------------------------------------------------------------------


class ScriptedModel:
    """A model that answers with given events; an exception among them is raised."""

    name = "scripted"

    def __init__(self, *answers):
        self.answers = list(answers)
        self.seen = []

    def answer(self, messages, settings, counts):
        self.seen.append(([dict(message) for message in messages], dict(settings)))
        for event in self.answers.pop(0):
            if isinstance(event, BaseException):
                raise event
            yield Text(event) if isinstance(event, str) else event


def talk(model, text, **options):
    """Let a chat read `text` from a pipe. Return it and its exit status."""
    chat = Chat(model, stdin=io.StringIO(text), **options)
    return chat, chat.run()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_lines_of_a_pipe_are_one_conversation(capsys):
    model = ScriptedModel(["Hel", "lo."], ["Bye."])
    _, status = talk(model, "\ufeffHi\n\nSee you\n")  # with a byte order mark, as some editors write
    assert status == 0
    assert capsys.readouterr().out == "Hello.\nBye.\n"
    assert [messages for messages, _ in model.seen] == [
        [user("Hi")],
        [user("Hi"), assistant("Hello."), user("See you")],
    ]


def test_a_last_line_without_a_newline_is_answered():
    model = ScriptedModel(["Hello."])
    talk(model, "Hi")
    assert model.seen == [([user("Hi")], {})]


@pytest.mark.parametrize("text", ["one \\\ntwo\\\nthree\n", '"""\none \ntwo\nthree\n"""\n', '"""\none \ntwo\nthree'])
def test_a_message_may_have_several_lines(text):
    model = ScriptedModel(["ok"])
    talk(model, text)
    assert model.seen[0][0] == [user("one \ntwo\nthree")]


def test_system_and_settings_go_with_each_message_until_they_are_taken_back():
    model = ScriptedModel(["a"], ["b"], ["c"])
    lines = ["/system Be brief.", "/set temperature 0.7", "/set top_k 5", "x", "/system", "/set top_k default", "y"]
    talk(model, "\n".join([*lines, "/set seed 3", "z"]))
    system = {"role": "system", "content": "Be brief."}
    assert model.seen[0] == ([system, user("x")], {"temperature": 0.7, "top_k": 5})
    assert model.seen[1] == ([user("x"), assistant("a"), user("y")], {"temperature": 0.7})
    assert model.seen[2][1] == {"temperature": 0.7, "seed": 3}


def test_regen_answers_a_question_that_had_no_answer():
    model = ScriptedModel(["a"], [RuntimeError("lost")], ["b"], ["c"])
    chat, _ = talk(model, "x\ny\n/regen\n/regen\n")
    assert chat.messages == [user("x"), assistant("a"), user("y"), assistant("c")]
    assert [messages[-1] for messages, *_ in model.seen] == [user("x"), user("y"), user("y"), user("y")]


def test_regen_replaces_the_last_answer_and_new_forgets_all():
    model = ScriptedModel(["a"], ["b"], ["c"], ["d"])
    chat, _ = talk(model, "x\n/regen\ny\n/new\nz\n")
    assert [messages for messages, _ in model.seen] == [
        [user("x")],
        [user("x")],
        [user("x"), assistant("b"), user("y")],
        [user("z")],
    ]
    assert chat.messages == [user("z"), assistant("d")]


def test_an_answer_that_fails_is_reported_and_leaves_the_conversation_as_it_was(capsys):
    model = ScriptedModel(["a"], [ValueError("too long")], [RuntimeError("lost")], ["b"])
    chat, status = talk(model, "x\ny\n/regen\nz\n")
    assert chat.messages == [user("x"), assistant("a"), user("z"), assistant("b")]
    assert capsys.readouterr().err == "Error: too long\nError: lost\n"
    assert status == 1


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys):
    model = ScriptedModel(["one ", "two", KeyboardInterrupt()], ["b"])
    chat, status = talk(model, "x\ny\n")
    assert chat.messages == [user("x"), assistant("one two"), user("y"), assistant("b")]
    assert capsys.readouterr().out == "one two\nb\n"
    assert status == 0


def test_two_interrupts_in_a_row_end_a_list_of_questions():
    model = ScriptedModel([KeyboardInterrupt()], [KeyboardInterrupt()], ["never"])
    _, status = talk(model, "x\ny\nz\n")
    assert status == 130
    assert len(model.seen) == 2


def test_save_writes_the_conversation_and_never_overwrites(tmp_path, capsys):
    path = tmp_path / "chat.json"
    talk(ScriptedModel(["é"]), f"x\n/save {path}\n/save {path}\n/save\n", system="S")
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"role": "system", "content": "S"},
        user("x"),
        assistant("é"),
    ]
    exists, needs = capsys.readouterr().err.splitlines()
    assert "File exists" in exists
    assert needs == "Error: /save needs a file"


def test_save_on_a_full_disk_leaves_no_file(tmp_path, capsys):
    path = tmp_path / "chat.json"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        talk(ScriptedModel(["a long answer"]), f"x\n/save {path}\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Error: [Errno 27]" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nope", "there is no command /nope"),
        ("/set", ""),
        ("/set speed 3", "there is no parameter speed"),
        ("/set temperature", "temperature must be a number, got ''"),
        ("/set temperature -1", "temperature must be from 0"),
        ("/regen", "there is no message"),
        ("/help", ""),
    ],
)
def test_a_wrong_command_is_reported_and_changes_nothing(line, message, capsys):
    chat, status = talk(ScriptedModel(), line)
    captured = capsys.readouterr()
    assert message in captured.err
    assert status == bool(message)
    assert chat.settings == {} and chat.messages == []
    assert message or all(word in captured.out for word in ((HELP,) if line == "/help" else SETTINGS))


def test_quit_ends_before_the_rest_of_the_input():
    assert talk(ScriptedModel(), "/quit\nx\n")[1] == 0


def test_a_pipe_gets_neither_thinking_nor_control_characters(capsys):
    chat, _ = talk(ScriptedModel([Thinking("hm"), "a\x1b[2Jb\tc\nd\x9b"]), "x\n")
    assert capsys.readouterr().out == "a[2Jb\tc\nd\n"
    assert chat.messages[1] == assistant("a\x1b[2Jb\tc\nd\x9b")


def test_a_terminal_shows_thinking_dimly_and_then_the_answer(capsys):
    chat = Chat(ScriptedModel([Thinking("hm"), Thinking("m"), "yes"]), stdin=io.StringIO())
    chat.is_terminal = True
    chat.handle("x")
    assert capsys.readouterr().out == "\x1b[2mhmm\x1b[0m\n\nyes\n"
    assert chat.messages[1] == assistant("yes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_with_tokenizer(tmp_path_factory.mktemp("cli"), "qwen2", CHAT_TEMPLATE))


class InterruptedModel(EngineModel):
    """A model with which Ctrl-C comes after the first piece of an answer, as long as `interrupts` is set."""

    interrupts = False

    def answer(self, messages, settings, counts):
        for event in super().answer(messages, settings, counts):
            yield event
            if self.interrupts:
                signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def engine_model(folder):
    with InterruptedModel({"model": folder, "device": "cpu", "max_model_len": 128, "kvcache_block_size": 16}) as model:
        yield model


def test_chat_with_an_engine_answers_as_llm_chat_does(folder, engine_model, capsys, monkeypatch):
    lines = "/set temperature 0\n/set max_tokens 8\nHi\nMore\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    flags = ["--device", "cpu", "--max-model-len", "128", "--kvcache-block-size", "16", "--system", "S"]
    assert main(["chat", folder, *flags]) == 0
    shown = capsys.readouterr().out
    messages = [{"role": "system", "content": "S"}]
    params = SamplingParams(temperature=0, max_tokens=8)
    for question in ("Hi", "More"):
        messages.append(user(question))
        text = engine_model.llm.chat(messages, params, use_tqdm=False)[0].text
        messages.append(assistant(text.strip()))
        line = printed(text) + "\n"
        assert shown.startswith(line)
        shown = shown.removeprefix(line)
    assert shown == ""


def printed(text):
    """Return a text as the chat prints it."""
    return "".join(character for character in text if character in "\t\n" or not is_control(character))


def is_control(character):
    return ord(character) < 32 or 127 <= ord(character) < 160


def test_ctrl_c_frees_the_blocks_of_an_engines_answer(engine_model, monkeypatch):
    chat = Chat(engine_model, stdin=io.StringIO())
    monkeypatch.setattr(engine_model, "interrupts", True)
    chat.handle("x")
    assert len(chat.messages) == 2
    assert finish(engine_model.llm, max_steps=3) == []  # the step in flight
    assert_nothing_held(engine_model.llm)
    monkeypatch.setattr(engine_model, "interrupts", False)
    chat.settings = {"max_tokens": 5}
    chat.handle("y")
    assert len(chat.messages) == 4


def test_an_engines_thinking_is_not_part_of_the_answer(engine_model, monkeypatch):
    texts = ["plan</th", "ink>\n\nyes"]
    outputs = [SimpleNamespace(text=text, token_ids=[1]) for text in texts]
    monkeypatch.setattr(engine_model, "format", TextFormat.detect("<think> </think>", "none"))
    monkeypatch.setattr(engine_model.llm, "stream", lambda *_: iter(outputs))
    # The prompt opens the tag.
    monkeypatch.setattr(engine_model.llm, "chat_prompts", lambda _: [engine_model.llm.tokenizer.encode("<think>\n")])
    counts = Counts()
    events = list(engine_model.answer([user("x")], {}, counts))
    assert [event.text for event in events if isinstance(event, Thinking)] == ["plan"]
    assert [event.text for event in events if isinstance(event, Text)] == ["yes"]
    assert counts.tokens == 2


def test_a_model_without_a_chat_template_is_refused_at_once(tmp_path, capsys):
    folder = save_tiny_with_tokenizer(tmp_path, "qwen2")
    assert main(["chat", str(folder), "--device", "cpu"]) == 1
    assert "no chat template" in capsys.readouterr().err


def test_a_conversation_that_is_too_long_is_reported(engine_model, capsys):
    chat, status = talk(engine_model, "x" * 200 + "\n")
    assert status == 1
    assert chat.messages == []
    assert "max_model_len" in capsys.readouterr().err


def delta(**content):
    return {"choices": [{"index": 0, "delta": content}]}


def test_chat_with_a_server_sends_the_conversation_and_streams_the_answer(capsys, monkeypatch):
    def answer(handler, body):
        first = delta(role="assistant", content="")
        usage = {"choices": [], "usage": {"completion_tokens": 3}}
        handler.stream([first, delta(reasoning_content="hm"), delta(content="é"), delta(content="!"), usage, "[DONE]"])

    monkeypatch.setattr(sys, "stdin", io.StringIO("/set top_p 0.5\nx\ny\n"))
    with scripted_server(chat=answer) as server:
        assert main(["chat", "--url", f"{server.url}/v1/", "--api-key", "secret"]) == 0
        first, second = server.bodies("/v1/chat/completions")
    assert capsys.readouterr().out == "é!\né!\n"
    assert first == {
        "model": "scripted",
        "messages": [user("x")],
        "stream": True,
        "stream_options": {"include_usage": True},
        "top_p": 0.5,
    }
    assert second["messages"] == [user("x"), assistant("é!"), user("y")]
    assert {headers["authorization"] for _, headers, _ in map(lowered, server.requests)} == {"Bearer secret"}


def lowered(request):
    path, headers, body = request
    return path, {name.lower(): value for name, value in headers.items()}, body


def test_a_refusal_of_a_server_is_shown_in_words_and_the_chat_goes_on(capsys, monkeypatch):
    script = [
        lambda handler: handler.send({"error": {"message": "too many requests"}}, 429),
        lambda handler: handler.stream([delta(content="a"), {"error": {"message": "the engine failed"}}]),
        lambda handler: handler.stream([delta(content="b"), "[DONE]"]),
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\ny\nz\n"))
    with scripted_server(chat=lambda handler, _: script.pop(0)(handler)) as server:
        assert main(["chat", "named", "--url", server.url]) == 1
        bodies = server.bodies("/v1/chat/completions")
        assert not server.bodies("/v1/models")
    captured = capsys.readouterr()
    assert captured.out == "a\nb\n"
    assert captured.err.splitlines() == [
        "Error: the server answered with status 429: too many requests",
        "Error: the server could not finish: the engine failed",
    ]
    assert bodies[2]["messages"] == [user("y"), assistant("a"), user("z")]
    assert bodies[2]["model"] == "named"


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([[1]], "no chat completion"),
        (["{"], "Expecting property name"),
        ([{"choices": [5]}], "no chat completion"),
        ([{"choices": 5}], "no chat completion"),
        ([{"choices": [{"delta": "x"}]}], "no chat completion"),
        ([delta(content=5)], "no chat completion"),
        ([delta(content=[{"type": "text", "text": "a"}])], "no chat completion"),
        ([delta(content="a")], "did not end its stream"),
        ([], "did not end its stream"),
    ],
)
def test_a_stream_of_another_form_fails_alone(events, message, capsys, monkeypatch):
    script = [[*events, "[DONE]"] if events and "end" not in message else events, [delta(content="b"), "[DONE]"]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\ny\n"))
    with scripted_server(chat=lambda handler, _: handler.stream(script.pop(0))) as server:
        assert main(["chat", "m", "--url", server.url]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line
    assert captured.out.endswith("b\n")


@pytest.mark.parametrize("count", [[1], {"completion_tokens": "x"}, {"completion_tokens": -7}, 5])
def test_counts_that_are_none_do_not_fail_an_answer(count, monkeypatch, capsys):
    answer = [delta(content="a") | {"usage": count}, "[DONE]"]
    with (
        scripted_server(chat=lambda handler, _: handler.stream(answer)) as server,
        ServerModel(server.url, None, "m") as model,
    ):
        chat = Chat(model, stdin=io.StringIO())
        chat.is_terminal = True
        chat.handle("x")
    assert capsys.readouterr() == ("a\n", "")


def test_text_of_a_server_that_cannot_be_encoded_is_replaced(capsys, monkeypatch):
    text = "a\u2028\x85b"  # characters at which str.splitlines splits
    script = [
        [delta(content="\ud83d"), delta(content="\ude00"), "[DONE]"],
        [delta(reasoning="\ud83d"), json.dumps(delta(content=text), ensure_ascii=False), "[DONE]"],
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\ny\n"))
    with scripted_server(chat=lambda handler, _: handler.stream(script.pop(0))) as server:
        assert main(["chat", "m", "--url", server.url]) == 0
        (_, second) = server.bodies("/v1/chat/completions")
    assert second["messages"] == [user("x"), assistant("??"), user("y")]
    assert capsys.readouterr().out == "??\na\u2028b\n"


def test_ctrl_c_leaves_a_servers_stream_so_that_the_server_can_stop(capsys):
    gone = threading.Event()

    def answer(handler, body):
        if len(body["messages"]) > 1:
            handler.stream([delta(content="b"), "[DONE]"])
            return
        handler.start_stream()
        handler.write_chunk(f"data: {json.dumps(delta(content='a'))}\n\n".encode())
        try:
            while not gone.wait(0.01):
                handler.write_chunk(b": ping\n\n")
        except OSError:
            gone.set()

    class InterruptedServerModel(ServerModel):
        def answer(self, messages, settings, counts):
            for event in super().answer(messages, settings, counts):
                yield event
                if len(messages) == 1:
                    signal.raise_signal(signal.SIGINT)

    with scripted_server(chat=answer) as server, InterruptedServerModel(server.url, None, "m") as model:
        chat, _ = talk(model, "x\ny\n")
        assert gone.wait(SOON)
    assert chat.messages == [user("x"), assistant("a"), user("y"), assistant("b")]


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [(401, {"error": {"message": "wrong key"}}, "status 401: wrong key"), (200, {"data": []}, "lists no models")],
)
def test_a_server_without_models_ends_the_chat_with_one_line(status, content, message, capsys):
    with scripted_server(models=lambda handler, _: handler.send(content, status)) as server:
        assert main(["chat", "--url", server.url]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_proxy_variables_that_no_client_can_use_are_an_error_in_one_line(capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "localhost,[::1]")
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("nanovllm: the environment's proxy variables cannot be used: ")


def test_a_proxy_that_cannot_be_reached_is_named_without_its_password(capsys, monkeypatch):
    for scheme in ("http://", ""):
        monkeypatch.setenv("http_proxy", f"{scheme}user:secret@127.0.0.1:1")
        assert main(["chat", "--url", "http://me:mine@192.0.2.1:8000"]) == 1
        error = capsys.readouterr().err
        assert f"cannot reach http://192.0.2.1:8000 through the environment's proxy {scheme}127.0.0.1:1: " in error


@pytest.mark.parametrize(
    "command", [["chat"], ["bench", "serve", "--num-prompts", "1", "--input-len", "1", "1", "--output-len", "1", "1"]]
)
def test_user_and_password_of_a_url_are_sent_and_not_shown(command, capsys, monkeypatch, tmp_path):
    def answer(handler, body):
        usage = {"choices": [], "usage": {"completion_tokens": 1}}
        handler.stream([{"choices": [{"index": 0, "delta": {"content": "x"}, "text": "x"}]}, usage, "[DONE]"])

    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    if command[0] == "bench":
        command = [*command, "--json", str(tmp_path / "figures.json")]
    with scripted_server(chat=answer, completions=answer) as server:
        assert main([*command, "--url", server.url.replace("://", "://me:p%40ss@")]) == 0
    sent = {headers["authorization"] for _, headers, _ in map(lowered, server.requests)}
    assert sent == {"Basic " + base64.b64encode(b"me:p@ss").decode()}
    printed = capsys.readouterr()
    assert "p%40ss" not in printed.out + printed.err + "".join(path.read_text() for path in tmp_path.iterdir())


def test_options_of_an_engine_are_refused_with_a_url(capsys):
    assert main(["chat", "--url", "http://127.0.0.1:1", "--device", "cpu"]) == 1
    assert "not for --url" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://v1", "http://v1"),
        ("http://v1/v1/", "http://v1"),
        ("https://h:8/a/v1", "https://h:8/a"),
        ("http://h/", "http://h"),
    ],
)
def test_a_url_may_end_with_v1(url, base):
    assert base_url(url) == base


def test_chat_options_check_their_types():
    with pytest.raises(ValueError, match="url must be like"):
        ChatOptions(url="ftp://x")


# -- bench serve -----------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_offline_workload():
    args = SimpleNamespace(input_len=(3, 20), output_len=(2, 9), num_seqs=50)
    (group,), _ = offline(args, 10_001, 4096)
    options = BenchOptions(num_prompts=50, input_len=(3, 20), output_len=(2, 9), request_rate=5.0)
    assert make_requests(options) == (group.prompts, group.lens)


def test_arrivals_are_a_poisson_process_of_the_rate():
    options = BenchOptions(num_prompts=20_000, request_rate=8.0, seed=3)
    times = list(arrivals(options))
    gaps = [second - first for first, second in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert times[0] == 0
    assert mean == pytest.approx(1 / 8, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.05)  # as an exponential distribution has
    assert times == list(arrivals(options))
    assert set(arrivals(BenchOptions(num_prompts=9))) == {0.0}


def piece(text):
    return {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": None}]}


def usage(count):
    return {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count}}


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def http(events, chunk=None):
    """Return a whole answer with these events, in one HTTP chunk for each event or in chunks of `chunk` bytes."""
    lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode() for event in events]
    data = b"".join(lines)
    chunks = [data[i : i + chunk] for i in range(0, len(data), chunk)] if chunk else lines
    return STREAM_HEAD + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in chunks) + b"0\r\n\r\n"


def read(pieces):
    """Return an answer that has received these bytes, and then the end of the connection."""

    async def receive():
        answer = Answer(b"")
        for data in pieces:
            answer.data_received(data)
        answer.connection_lost(None)
        await answer.complete
        return answer

    return asyncio.run(receive())


TEXTS = ["a", 'data: [DONE]"error"', "error", "text", '"completion_tokens": 9', "é", "\n\n"]


@pytest.mark.parametrize("chunk", [None, 1, 50])
def test_a_stream_is_read_alike_however_it_is_split(chunk):
    data = http([*map(piece, TEXTS), usage(12), "[DONE]"], chunk)
    for size in (1, 2, 7, 64, len(data)):
        answer = read([data[i : i + size] for i in range(0, len(data), size)])
        assert answer.error is None
        assert answer.num_tokens == 12
        assert 1 <= len(answer.times) <= len(TEXTS)
        assert len(answer.times) == len(TEXTS) or size > 1


def test_the_text_of_one_network_read_is_one_piece_and_the_counts_at_the_end_are_none():
    first, second, end = http([piece("a"), piece("b"), piece("c")])[:-5], http([piece("d")]), http([usage(9), "[DONE]"])
    body = [part.partition(b"\r\n\r\n")[2] for part in (second[:-5], end)]
    assert len(read([first, *body]).times) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (http([piece("a"), piece("b")]), "the stream ended after 1 pieces without [DONE]"),
        (http([piece("a")])[:-9], "the stream ended after"),
        (http([piece("a"), {"error": {"message": "engine failed", "code": 500}}]), "engine failed"),
        (http([{"error": "plain"}]), "plain"),
        (b"", "the server closed the connection without an answer"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "the answer is not HTTP"),
        (b"HTTP/1.1 429 Too Many\r\ncontent-length: 9\r\n\r\ntoo\n many", "status 429: too many"),
        (b'HTTP/1.1 400 Bad\r\n\r\n{"error":{"message":"no such field"}}', "status 400: no such field"),
        (
            b'HTTP/1.1 422 Bad\r\ntransfer-encoding: chunked\r\n\r\n10\r\n{"detail": "no"}\r\n0\r\n\r\n',
            "status 422: no",
        ),
        (b"HTTP/1.1 502 Bad\r\n\r\n", "status 502: no message"),
        (b"HTTP/1.1 500 Bad\r\n\r\n\x1b[31mred", "status 500: [31mred"),
        (b'HTTP/1.1 500 Bad\r\n\r\n{"error": "\\u001b[31mred\\ud83d."}', "status 500: [31mred."),
        (STREAM_HEAD + b"-000000000011\r\n" + b"x" * 64, "the answer is not HTTP"),
        (STREAM_HEAD + b"-5\r\nabc\r\n", "the answer is not HTTP"),
        (STREAM_HEAD + b"1_0\r\nabc\r\n", "the answer is not HTTP"),
        (STREAM_HEAD + b"\r\nabc\r\n", "the answer is not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}", "the answer is not HTTP"),
    ],
)
def test_an_answer_that_is_not_whole_has_the_reason(data, message):
    assert (read([data]).error or "").startswith(message)


def test_a_server_without_tls_is_not_reported_as_an_error_of_the_system():
    with scripted_server() as server:
        tls_server = Server(server.url.replace("http:", "https:"))
        answer = asyncio.run(tls_server.send(tls_server.request("GET", "/")))
    assert "SSL" in answer.error and "not permitted" not in answer.error


def answered(start, times, num_tokens, end=None):
    async def make():
        return Answer(b"")

    answer = asyncio.run(make())
    answer.start, answer.end = start, end or times[-1]
    answer.times.extend(times)
    answer._usage = b"data: " + json.dumps(usage(num_tokens)).encode()
    return answer


def test_figures_are_those_of_the_times():
    # Time to first token 100 and 300 ms; 4 tokens in 3 pieces, 50 ms for each further token; then one token only.
    answers = [answered(10.0, [10.1, 10.15, 10.25], 4), answered(10.0, [10.3], 1, end=12.0)]
    failed = answered(10.0, [10.5], 3)
    failed.error = "status 429: full"
    run = Run([*answers, failed], [5, 6, 7], [4, 2, 3], start=10.0, cpu_seconds=0.5, late=[])
    figures = summary(run, {"ttft": 0.2, "tpot": 0.06})
    assert figures["completed"] == 2 and figures["errors"] == {"status 429: full": 1}
    assert figures["shorter_than_asked"] == 1
    assert figures["output_tok_s"] == pytest.approx(5 / 2)
    assert figures["input_tok_s"] == pytest.approx(11 / 2)
    assert figures["tokens_per_piece"] == pytest.approx(5 / 4)
    assert figures["ttft_ms"]["mean"] == pytest.approx(200)
    assert figures["ttft_ms"]["p99"] == pytest.approx(298)
    assert figures["tpot_ms"]["p50"] == pytest.approx(50)
    assert figures["itl_ms"]["mean"] == pytest.approx(75)
    assert figures["e2e_ms"]["max"] == pytest.approx(2000)
    assert figures["goodput_requests_per_s"] == pytest.approx(0.5)
    assert figures["client_cpu"] == pytest.approx(0.25)
    assert "33%, ttft:200 tpot:60" in table(figures)
    assert "warning" not in table(figures)
    assert "warning" in table(figures | {"client_cpu": 0.9})


BENCH = ["--num-prompts", "6", "--input-len", "2", "4", "--output-len", "2", "5"]


def test_bench_reports_the_streams_of_a_server(tmp_path, capsys):
    def answer(handler, body):
        # Two tokens in the first event.
        count = body["max_tokens"]
        handler.stream([*[piece("x")] * (count - 1), usage(count), "[DONE]"])

    path = tmp_path / "figures.json"
    with scripted_server(completions=answer) as server:
        flags = ["--url", server.url, "--json", str(path), "--goodput", "ttft:60000", "e2e:60000", "--api-key", "k"]
        assert main(["bench", "serve", *BENCH, *flags, "--request-rate", "1000"]) == 0
        _, *bodies = server.bodies("/v1/completions")
        assert main(["bench", "serve", *BENCH, *flags, "--json", "/dev/full"]) == 1
    prompts, lens = make_requests(BenchOptions(num_prompts=6, input_len=(2, 4), output_len=(2, 5)))
    assert sorted((body["prompt"], body["max_tokens"]) for body in bodies) == sorted(zip(prompts, lens, strict=True))
    assert all(body["ignore_eos"] and body["stream"] and body["temperature"] == 0.6 for body in bodies)
    assert {body["model"] for body in bodies} == {"scripted"}
    figures = json.loads(path.read_text())
    assert figures["completed"] == 6 and figures["good"] == 6
    assert figures["output_tokens"] == sum(lens)
    assert figures["input_tokens"] == sum(map(len, prompts))
    assert figures["options"]["num_prompts"] == 6 and "api_key" not in figures["options"]
    shown = capsys.readouterr()
    assert "6 requests answered" in shown.out and "time to first token, ms" in shown.out
    assert "/dev/full cannot be written: [Errno 28]" in shown.err


def test_bench_never_has_more_requests_at_once_than_asked_for():
    lock, now, most = threading.Lock(), 0, 0
    both = threading.Event()

    def answer(handler, body):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == 2:
                both.set()
        if len(server.bodies("/v1/completions")) > 1:  # not the first request, which is alone
            assert both.wait(SOON)
        with lock:
            now -= 1
        handler.stream([piece("x"), usage(2), "[DONE]"])

    with scripted_server(completions=answer) as server:
        assert main(["bench", "serve", *BENCH, "--url", server.url, "--max-concurrency", "2"]) == 0
    assert most == 2


def test_bench_counts_requests_that_fail_and_goes_on(capsys):
    seen = []

    def answer(handler, body):
        seen.append(body)
        if len(seen) % 2:
            handler.stream([piece("x"), piece("y"), usage(2), "[DONE]"])
        else:
            handler.send({"error": {"message": "the queue is full"}}, 429)

    with scripted_server(completions=answer) as server:
        assert main(["bench", "serve", *BENCH, "--url", server.url, "--max-concurrency", "1"]) == 0
    shown = capsys.readouterr().out
    assert "3 requests answered" in shown
    assert "3 x status 429: the queue is full" in shown


@pytest.mark.parametrize("count", [-7, 10**400, "x", None], ids=["negative", "huge", "text", "null"])
def test_bench_counts_a_stream_with_an_impossible_number_of_tokens_as_failed(count, capsys):
    counts = iter([2, 2, count, 2, 2, 2, 2])

    def answer(handler, body):
        handler.stream([piece("x"), piece("y"), {"usage": {"completion_tokens": next(counts)}}, "[DONE]"])

    with scripted_server(completions=answer) as server:
        assert main(["bench", "serve", *BENCH, "--url", server.url, "--max-concurrency", "1"]) == 0
    shown = capsys.readouterr().out
    assert "5 requests answered" in shown
    assert "1 x the stream had no tokens, or did not count them" in shown


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda handler, _: handler.send({"error": {"message": "no field ignore_eos"}}, 400), "no field ignore_eos"),
        (lambda handler, _: handler.stream([piece("x"), "[DONE]"]), "does not count the tokens"),
        (lambda handler, _: handler.send({"choices": []}), "does not count the tokens"),
    ],
)
def test_bench_ends_with_one_line_if_the_server_refuses(answer, message, capsys):
    with scripted_server(completions=answer) as server:
        assert main(["bench", "serve", "--url", server.url, "--model", "m"]) == 1
        assert len(server.requests) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_bench_names_a_server_that_does_not_listen(capsys):
    with scripted_server() as server:
        url = server.url
    assert main(["bench", "serve", "--url", url]) == 1
    assert "Connection refused" in capsys.readouterr().err
