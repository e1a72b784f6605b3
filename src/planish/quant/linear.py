"""QLinear: an nn.Linear that multiplies by its fake-quantized weight while its quantizer is trained."""

from torch import Tensor, nn
from torch.nn import functional

from planish.quant.quantizer import Quantizer


class QLinear(nn.Module):
    """y = x W_hat^T + b.

    Args:
        linear: the layer it stands for; its weight and bias are shared and frozen.
        quantizer: gives W_hat from the weight.
    """

    def __init__(self, linear: nn.Linear, quantizer: Quantizer) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.quantizer(self.weight), self.bias)
