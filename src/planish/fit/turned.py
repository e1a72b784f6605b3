"""Which linears have their inputs turned when they run (R4 of QuaRot): those that lose less so.

A scheme with an h (w4a4h) asks for it. Each such linear is rounded both ways on some of its own inputs, x W^T against
Q(x) Q(W)^T and Q(x H) Q(W H)^T, and keeps the better (as RoSTE chooses, arXiv 2502.09003, there by the errors
of x and W alone). Turning everything alike can harm: a layer without outliers gains none.
"""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from planish.quant import MinMax, Quantizer
from planish.quant.activation import fake_quantize_tokens
from planish.quant.hadamard import turn
from planish.scheme import Scheme

TOKENS = 2048


class Inputs:
    """While it lasts, the first TOKENS inputs of some linears, by name."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.linears, self.found = linears, dict[str, Tensor]()

    def __enter__(self) -> "Inputs":
        self.handles = [part.register_forward_pre_hook(self._note(name)) for name, part in self.linears.items()]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in self.found:
                self.found[name] = args[0].detach().flatten(0, -2)[:TOKENS].clone()

        return hook


def asked(schemes: Mapping[str, Scheme], linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """The linears whose schemes ask for turned inputs."""
    return {name: linears[name] for name in linears if schemes[name].turned}


@torch.no_grad()
def choose(
    schemes: MutableMapping[str, Scheme], linears: Mapping[str, nn.Linear], inputs: Mapping[str, Tensor]
) -> None:
    """Turn the weights of linears that lose less so, in place; the others' schemes no longer ask for it."""
    for name, linear in linears.items():
        scheme, x = schemes[name], inputs.get(name)
        plain = scheme.unturned()
        turned = turn(linear.weight)
        if x is None or _lost(x, linear.weight, turned, scheme) < _lost(x, linear.weight, linear.weight, plain):
            linear.weight.data = turned
        else:
            schemes[name] = plain


def _lost(x: Tensor, weight: Tensor, seen: Tensor, scheme: Scheme) -> float:
    """|x W^T - Q(x) Q(W)^T|^2, `seen` being the W that is rounded."""
    assert scheme.activations is not None
    rounded = Quantizer(seen, scheme, range_slot=MinMax)(seen)
    given = functional.linear(fake_quantize_tokens(x, scheme.activations), rounded)
    return float((given.float() - functional.linear(x, weight).float()).square().sum())
