"""The choice of each weight's format, by the names of its modules in the checkpoint."""

from typing import NamedTuple

from nanovllm.weights.formats import AllocateExperts, AllocateWeight, Plain, PlainExperts
from nanovllm.weights.quantization import QuantizationScheme


class LayerFormats(NamedTuple):
    """Chooses the formats of a layer's weights by the names of its modules in the checkpoint.

    Attributes:
        scheme: None if no weight is quantized.
        prefix: the name of the layer.
    """

    scheme: QuantizationScheme | None = None
    prefix: str = ""

    def child(self, name: str) -> "LayerFormats":
        """Return the choice of formats for a submodule of the layer."""
        return LayerFormats(self.scheme, f"{self.prefix}.{name}")

    def are_plain(self, *names: str) -> bool:
        """Return whether the weight that merges these modules is plain, because one of them is not quantized.

        Args:
            names: of the modules, and of the one that has them merged in some checkpoints.
        """
        return self.scheme is None or not all(self.scheme.covers(f"{self.prefix}.{name}") for name in names)

    def weight(self, *names: str) -> AllocateWeight:
        """Return the function that allocates the weight that merges these modules; see `are_plain`."""
        if self.scheme is None or self.are_plain(*names):
            return Plain.allocate
        return self.scheme.allocate

    def experts(self) -> AllocateExperts:
        """Return the function that allocates the weights of this layer's experts. Expert 0 decides for all of them."""
        if self.scheme is None or not self.scheme.covers(self.prefix):
            return PlainExperts.allocate
        if self.are_plain("0.gate_proj", "0.up_proj", "0.down_proj"):
            return PlainExperts.allocate
        return self.scheme.allocate_experts


PLAIN_FORMATS = LayerFormats()
