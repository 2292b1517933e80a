"""The embedding and the LM head. Both are split over the vocabulary."""

import torch
from torch import nn

from nanovllm.arithmetic import ceil_div
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.linear import LinearLayer
from nanovllm.layers.residual import Normed, Residual, as_normed
from nanovllm.ops.inputs.embedding import embedding
from nanovllm.weights.formats import Plain
from nanovllm.weights.parameter import CheckpointTensor, check_shape, make_parameter


class VocabParallelEmbedding(nn.Module):
    """Token embedding: ids [T] -> [T, embedding_dim]. Each rank holds an equal slice of the vocabulary.

    Args:
        num_embeddings: size of the vocabulary. The last slices are padded if the ranks do not divide it.
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
        self.size = ceil_div(num_embeddings, self.tp.size)
        self.start = self.tp.rank * self.size
        self.weight = make_parameter(self.size, embedding_dim, dtype=dtype, weight_loader=self.weight_loader)

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: None = None) -> None:
        check_shape(loaded, (self.num_embeddings, *param.shape[1:]))
        rows = loaded[self.start : self.start + self.size]
        param[: len(rows)].copy_(rows)
        param[len(rows) :].zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.residual(x).sum()

    def residual(self, input_ids: torch.Tensor) -> Residual:
        """Start the residual stream with the embeddings. Its first norm all-reduces them."""
        return Residual.from_summand(embedding(input_ids, self.weight, self.start), self.tp)

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        return {f"{prefix}.weight": CheckpointTensor(self.weight, (self.num_embeddings, *self.weight.shape[1:]))}

    def differs(self, loaded: torch.Tensor) -> torch.Tensor:
        """Return whether the weight has other values than `loaded`, as a bool on the weight's device."""
        check_shape(loaded, (self.num_embeddings, *self.weight.shape[1:]))
        rows = loaded[self.start : self.start + self.size]
        # Compare in chunks: a GPU may lack memory for another copy of all rows.
        chunks = zip(self.weight[: len(rows)].split(4096), rows.split(4096), strict=True)
        return torch.stack([(current != new.to(current)).any() for current, new in chunks]).any()


class ParallelLMHead(VocabParallelEmbedding, LinearLayer):
    """LM head: hidden states [L, embedding_dim] -> logits [S, num_embeddings] of this rank's slice of the L rows.

    Args:
        num_embeddings, embedding_dim: as in VocabParallelEmbedding.
        bias: must be False; it is here for code written for nano-vLLM.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
    ):
        if bias:
            raise ValueError("bias=True is not supported: ParallelLMHead has no bias")
        super().__init__(num_embeddings, embedding_dim, dtype=dtype, tp=tp)
        self.set_format(Plain(self.weight))

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        """Use the embedding's parameter as the weight."""
        self.set_format(Plain(embedding.weight, is_shared=True))

    def forward(self, x: torch.Tensor | Normed) -> torch.Tensor:
        x, norm = as_normed(x)
        return self.tp.all_to_all(self.format.linear(x, norm=norm))[:, : self.num_embeddings]
