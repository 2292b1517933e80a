"""Tests of the Ray layer: `pip install '.[clients]' && pytest tests/ray`. Without Ray nothing here is collected.

All share one local cluster in one worker: a head and a second host, each a raylet of its own. Engines are tiny models
on the CPU.
"""

import os
from importlib.util import find_spec

# Before anything imports ray.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DATA_DISABLE_PROGRESS_BARS="1", HF_HUB_OFFLINE="1")

import pytest

from nanovllm import LLM
from tests.models.tiny import CHAT_TEMPLATE, save_tiny_with_tokenizer

if find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]

OPTIONS = dict(
    device="cpu",
    kvcache_block_size=16,
    num_kvcache_blocks=256,
    max_model_len=512,
    max_num_seqs=16,
    max_num_batched_tokens=512,
)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="runs in which a replica is killed at a random time")


@pytest.fixture(scope="session")
def cluster():
    """A cluster of two hosts with four CPUs each, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 4, "object_store_memory": 150 << 20}
    head = {**node, "include_dashboard": False, "_system_config": {"health_check_period_ms": 1000}}  # in place of 3000
    # A worker finds the modules that this process finds.
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny model whose tokens are bytes."""
    return str(save_tiny_with_tokenizer(tmp_path_factory.mktemp("model"), "qwen3", CHAT_TEMPLATE))


@pytest.fixture(scope="session")
def one(model):
    """One engine in this process."""
    with LLM(model, **OPTIONS) as llm:
        yield llm
