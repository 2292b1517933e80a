"""The 8-bit float of weights, activations, keys and values: e4m3."""

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest number
