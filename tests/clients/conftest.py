"""Tests with clients of the server and programs written for vLLM: `pip install '.[clients]' && pytest tests/clients`.

`pytest` alone leaves them out, because these packages are large. Without a package its file fails; files of the
server's clients are left out.
"""

import os
from importlib.util import find_spec

# Before anything imports huggingface_hub or ray.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0", LITELLM_LOCAL_MODEL_COST_MAP="True"
)

import pytest

import nanovllm.as_vllm  # noqa: F401
from nanovllm import LLM
from tests.clients.serving import ENGINE, save_model, served
from tests.models.tiny import CHAT_TEMPLATE, save_tiny_with_tokenizer

_CLIENTS = {
    "test_openai.py": "openai",
    "test_anthropic.py": "anthropic",
    "test_litellm.py": "litellm",
    "test_langchain_openai.py": "langchain_openai",
}
collect_ignore = [file for file, package in _CLIENTS.items() if find_spec(package) is None]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny model without a chat template."""
    return str(save_tiny_with_tokenizer(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """The folder of a tiny model with a chat template."""
    return str(save_tiny_with_tokenizer(tmp_path_factory.mktemp("chat_model"), "qwen3", CHAT_TEMPLATE))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server of a tiny model in a process of its own."""
    pytest.importorskip("fastapi")
    with served(save_model(tmp_path_factory.mktemp("served"))) as server:
        yield server


@pytest.fixture(scope="session")
def offline(server):
    """The server's engine in this process."""
    llm = LLM(server.folder, **ENGINE)
    yield llm
    llm.close()
