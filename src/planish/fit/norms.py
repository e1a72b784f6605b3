"""The norms of some blocks as trainables: fp32 masters that the forward pass sees in the model's own dtype.

EfficientQAT's Block-AP trains them beside the weights (arXiv 2407.11062). A step of 1e-5 is lost on a bf16
weight near 1, so the master is fp32; what is kept in the end is rounded once. Knows nothing of quantizers.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Master(nn.Module):
    """Sees an fp32 parameter in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, original: Tensor) -> Tensor:
        return original.to(self.dtype)

    def right_inverse(self, value: Tensor) -> tuple[Tensor]:
        # of a tuple torch lets the dtype change
        return (value.float(),)


def norms_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules whose weight is a vector, by full name: the norms of the blocks given by theirs."""
    return {f"{block}.{path}": norm for block, module in modules.items() for path, norm in _norms(module)}


def _norms(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in block.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 1:
            yield path, module


def free(norms: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """Make their weights trainable; the fp32 masters."""
    masters: list[nn.Parameter] = []
    for norm in norms.values():
        assert isinstance(norm.weight, Tensor)
        parametrize.register_parametrization(norm, "weight", Master(norm.weight.dtype), unsafe=True)
        master = norm.get_parameter("parametrizations.weight.original0")
        master.requires_grad_(True)
        masters.append(master)
    return masters


def settle(norms: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Put what was trained in their place, rounded once; by the name of the weight."""
    for norm in norms.values():
        if parametrize.is_parametrized(norm):
            parametrize.remove_parametrizations(norm, "weight", leave_parametrized=True)
        norm.requires_grad_(False)
    return {f"{name}.weight": norm.get_parameter("weight").detach() for name, norm in norms.items()}
