"""The weight slot gives W', the weight that is rounded.

`Fixed` is the weight as it is. A slot is a module built from (weight, scheme) whose forward maps the
layer's weight [out, in] to W' [out, in].
"""

from torch import Tensor, nn

from planish.scheme import Scheme


class Fixed(nn.Module):
    """W' = W: the weight itself isn't trained."""

    def __init__(self, weight: Tensor, scheme: Scheme) -> None:
        super().__init__()

    def forward(self, weight: Tensor) -> Tensor:
        return weight
