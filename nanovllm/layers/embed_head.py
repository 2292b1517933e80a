"""The two ends of the model, both split over the vocabulary."""

import torch
from torch import nn

from nanovllm.kernels.embedding import embedding
from nanovllm.kernels.linear import linear
from nanovllm.layers.layernorm import RMSNorm
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
        return self.tp.all_reduce(embedding(input_ids, self.weight, self.start))


class ParallelLMHead(VocabParallelEmbedding, PackedLayer):
    """Hidden states [T, embedding_dim] -> logits [L, num_embeddings] on rank 0, None on the others.

    L is the number of the context's `last_indices`, or T if there are none. A `norm` comes first, of those L alone.
    """

    def forward(self, x: torch.Tensor, norm: RMSNorm | None = None) -> torch.Tensor | None:
        last_indices = get_context().last_indices
        if last_indices is not None:
            x = x[last_indices]
        logits = self.tp.gather(linear(x, self.operand, None, norm and (norm.weight, norm.eps)))
        return None if logits is None else logits[:, : self.num_embeddings]
