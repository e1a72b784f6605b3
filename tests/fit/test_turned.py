"""Inputs are turned where that loses less: an outlier is spread, what lies on the grid already is left."""

import torch
from torch import nn

from planish.fit.turned import Inputs, asked, choose
from planish.quant.hadamard import turn
from planish.scheme import Scheme

SCHEME = Scheme.parse("w4a4h")


def test_each_linear_is_measured_both_ways() -> None:
    generator = torch.Generator().manual_seed(0)
    linears = {name: nn.Linear(64, 32, bias=False) for name in ("outlier", "on the grid", "unseen")}
    signs = 1.0 - 2 * torch.randint(0, 2, (32, 64), generator=generator)
    linears["on the grid"].weight.data = signs.clone()
    schemes = dict.fromkeys(linears, SCHEME)
    wide = torch.randn(16, 64, generator=generator)
    wide[:, 7] *= 100
    with Inputs(asked(schemes, linears)) as inputs:
        for _ in range(2):  # the first batch is enough
            linears["outlier"](wide)
            linears["on the grid"](signs[:16])
    assert torch.equal(inputs.found["outlier"], wide) and "unseen" not in inputs.found
    before = linears["outlier"].weight.clone()
    choose(schemes, linears, inputs.found)
    assert asked(schemes, linears).keys() == {"outlier", "unseen"}
    assert torch.equal(linears["outlier"].weight, turn(before)) and torch.equal(linears["on the grid"].weight, signs)
    assert str(schemes["on the grid"]) == "w4pca4"
