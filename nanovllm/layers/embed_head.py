"""The two ends of the model, both split over the vocabulary."""

import torch
from torch import nn

from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.parameter import PackedLayer, check_shape, make_parameter
from nanovllm.layers.residual import Residual
from nanovllm.ops.inputs.embedding import embedding
from nanovllm.ops.linear.linear import linear


class VocabParallelEmbedding(nn.Module):
    """Token embedding, each rank holding an equal slice of the vocabulary: ids [T] -> [T, embedding_dim].

    Args:
        num_embeddings: size of the vocabulary. Where the ranks do not divide it, the last slices are padded.
        embedding_dim: size of an embedding.
        reduce_results: False leaves each rank its summand: the result is a `Residual`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        reduce_results: bool = True,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
    ):
        super().__init__()
        self.tp = tp or TensorParallel.default()
        self.reduce_results = reduce_results
        self.num_embeddings = num_embeddings
        self.size = -(-num_embeddings // self.tp.size)
        self.start = self.tp.rank * self.size
        self.weight = make_parameter(self.size, embedding_dim, dtype=dtype, weight_loader=self.weight_loader)

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: None = None) -> None:
        check_shape(loaded, (self.num_embeddings, *param.shape[1:]))
        rows = loaded[self.start : self.start + self.size]
        param[: len(rows)].copy_(rows)
        param[len(rows) :].zero_()

    def differs(self, loaded: torch.Tensor) -> torch.Tensor:
        """Whether the weight has other values than `loaded`, as a bool on the weight's device."""
        check_shape(loaded, (self.num_embeddings, *self.weight.shape[1:]))
        rows = loaded[self.start : self.start + self.size]
        # In pieces: on a GPU there may be no room for another copy.
        pairs = zip(self.weight[: len(rows)].split(4096), rows.split(4096), strict=True)
        return torch.stack([(own != new.to(own)).any() for own, new in pairs]).any()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor | Residual:
        x = Residual.of(embedding(input_ids, self.weight, self.start), self.tp)
        return x.sum() if self.reduce_results else x


class ParallelLMHead(VocabParallelEmbedding, PackedLayer):
    """Hidden states x [L, embedding_dim], or norm(x) -> logits [S, num_embeddings] of this rank's share of the rows.

    A residual stream has a norm.

    Args:
        num_embeddings, embedding_dim: as of the embedding.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, dtype=dtype, tp=tp)

    def forward(self, x: torch.Tensor | Residual, norm: RMSNorm | None = None) -> torch.Tensor:
        x, norm = (x, None) if norm is None else norm.split(x)
        return self.tp.all_to_all(linear(x, self.operand, norm=norm))[:, : self.num_embeddings]
