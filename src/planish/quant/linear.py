"""QLinear: an nn.Linear that multiplies by its fake-quantized weight while its quantizer is trained.

Where the scheme says so, what it multiplies is fake-quantized too, token by token. A model whose weights are all
there still is its own float original: `as_float` has it compute as that one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional

from planish.quant.activation import fake_quantize_tokens
from planish.quant.low_rank import LowRank
from planish.quant.quantizer import Quantizer
from planish.scheme import Activations


class QLinear(nn.Module):
    """y = x W_hat^T + b.

    Args:
        linear: the layer it stands for, frozen; where a transform moves its weight, that is quantized as it is
            moved.
        quantizer: gives W_hat from the weight; None if the weight is W_hat already.
        activations: how inputs are rounded.
    """

    def __init__(
        self, linear: nn.Linear, quantizer: Quantizer | None, activations: Activations | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.linear = linear.requires_grad_(False)
        self.quantizer, self.activations = quantizer, activations
        self.rounds = True

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounds:
            return self._float(x)
        if self.activations is not None:
            x = fake_quantize_tokens(x, self.activations)
        if self.quantizer is None:
            return functional.linear(x, self.weight, self.bias)
        return self.quantizer.multiply(x, self.weight, self.bias)

    def _float(self, x: Tensor) -> Tensor:
        """With the weight that the quantizer started from."""
        weight = self.weight
        if self.quantizer is not None and isinstance(self.quantizer.weight, LowRank):
            weight = self.quantizer.weight.held(weight, x.dtype)
        return functional.linear(x, weight, self.bias)


@contextmanager
def as_float(model: nn.Module) -> Iterator[None]:
    """Have a model compute without its quantizers, by the weights that these started from, for a while."""
    layers = [module for module in model.modules() if isinstance(module, QLinear)]
    for layer in layers:
        layer.rounds = False
    try:
        yield
    finally:
        for layer in layers:
            layer.rounds = True
