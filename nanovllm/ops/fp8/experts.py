"""Experts with FP8 weights."""

from nanovllm.ops.fp8.reference import experts_fp8_torch

experts_fp8 = experts_fp8_torch
