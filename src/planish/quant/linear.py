"""QLinear: an nn.Linear that multiplies by its fake-quantized weight while its quantizer is trained.

Where the scheme says so, what it multiplies is fake-quantized too, token by token.
"""

from torch import Tensor, nn
from torch.nn import functional

from planish.quant.activation import fake_quantize_tokens
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

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.activations is not None:
            x = fake_quantize_tokens(x, self.activations)
        weight = self.weight if self.quantizer is None else self.quantizer(self.weight)
        return functional.linear(x, weight, self.bias)
