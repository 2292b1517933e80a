"""The two ends of the model, both split over the vocabulary."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.linear import linear
from nanovllm.layers.parameter import PackedLayer, check_shape, make_parameter
from nanovllm.utils.context import get_context
from nanovllm.utils.parallel import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """Token embedding, each rank holding an equal slice of the vocabulary: ids [T] -> [T, embedding_dim].

    Args:
        num_embeddings: size of the vocabulary. Where the ranks do not divide it, the last slices are padded.
        embedding_dim: size of an embedding.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
    ):
        super().__init__()
        self.tp = tp or TensorParallel.default()
        self.num_embeddings = num_embeddings
        self.size = -(-num_embeddings // self.tp.size)
        self.start = self.tp.rank * self.size
        self.weight = make_parameter(self.size, embedding_dim, dtype=dtype, weight_loader=self.weight_loader)

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: None = None) -> None:
        check_shape(loaded, (self.num_embeddings, *param.shape[1:]))
        rows = loaded[self.start : self.start + self.size]
        param[: len(rows)].copy_(rows)
        param[len(rows) :].zero_()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self.start
        outside = (local < 0) | (local >= self.size)
        x = F.embedding(local.masked_fill(outside, 0), self.weight)
        return self.tp.all_reduce(x.masked_fill(outside.unsqueeze(-1), 0))


class ParallelLMHead(VocabParallelEmbedding, PackedLayer):
    """Hidden states [T, embedding_dim] -> logits [L, num_embeddings] on rank 0, None on the others.

    L is the number of the context's `last_indices`, or T if there are none.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor | None:
        last_indices = get_context().last_indices
        if last_indices is not None:
            x = x[last_indices]
        logits = self.tp.gather(linear(x, self.operand))
        return None if logits is None else logits[:, : self.num_embeddings]
