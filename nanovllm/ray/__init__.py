"""Data parallelism on Ray: `Replicas` here, `nanovllm.ray.data` for Ray Data, `nanovllm.ray.serve` for Ray Serve."""

from nanovllm.ray.replicas import Replicas

__all__ = ["Replicas"]
