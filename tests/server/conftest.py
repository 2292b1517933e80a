"""A server on a tiny model whose tokens are bytes."""

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package)


if find_spec("nanovllm.server.formats") is None:  # until that branch is merged

    class TextFormat:
        @classmethod
        def detect(cls, *args):
            return cls()

    stand_in = ModuleType("nanovllm.server.formats")
    stand_in.TextFormat = TextFormat
    sys.modules["nanovllm.server.formats"] = stand_in
