"""QLinear: an nn.Linear that multiplies by its fake-quantized weight while its quantizer is trained."""

from torch import Tensor, nn
from torch.nn import functional

from planish.quant.quantizer import Quantizer


class QLinear(nn.Module):
    """y = x W_hat^T + b.

    Args:
        linear: the layer it stands for, frozen; where a transform moves its weight, that is quantized as it is
            moved.
        quantizer: gives W_hat from the weight; None if the weight is W_hat already.
    """

    def __init__(self, linear: nn.Linear, quantizer: Quantizer | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.linear = linear.requires_grad_(False)
        self.quantizer = quantizer

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.quantizer is None else self.quantizer(self.weight)
        return functional.linear(x, weight, self.bias)
