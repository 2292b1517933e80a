"""A tiny model whose tokens are bytes, for servers. Without the packages of a server nothing here is collected."""

from importlib.util import find_spec

import pytest

from nanovllm import AsyncLLM
from tests.models.tiny import CHAT_TEMPLATE, save_tiny_with_tokenizer

if not all(map(find_spec, ("fastapi", "uvicorn", "prometheus_client", "httpx"))):
    collect_ignore_glob = ["test_*.py"]

OPTIONS = dict(
    device="cpu",
    kvcache_block_size=16,
    num_kvcache_blocks=128,
    max_model_len=512,
    max_num_seqs=8,
    max_num_batched_tokens=512,
)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return the folder of a tiny model."""
    return save_tiny_with_tokenizer(tmp_path_factory.mktemp("model"), "qwen3", CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def llm(model):
    """Return an engine that tests share. Each test uses it in an event loop of its own."""
    llm = AsyncLLM(model, **OPTIONS)
    yield llm
    llm.close()


@pytest.fixture
def own_llm(model):
    """Return an engine that a test may close or break."""
    llm = AsyncLLM(model, **OPTIONS)
    yield llm
    llm.close()
