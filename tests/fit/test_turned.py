"""Inputs are turned where that loses less: an outlier is spread, what lies on the grid already is left."""

import torch
from torch import nn

from planish.fit.turned import Inputs, asked, choose
from planish.quant.hadamard import turn
from planish.scheme import Scheme

SCHEME = Scheme.parse("w4a4h")


def test_each_linear_is_measured_both_ways() -> None:
    generator = torch.Generator().manual_seed(0)
    linears = {name: nn.Linear(256, 32, bias=False) for name in ("outlier", "on the grid", "unseen")}
    levels = torch.randint(0, 16, (32, 256), generator=generator).float()
    levels[:, 0], levels[:, 1] = 0, 15
    linears["on the grid"].weight.data = levels - 8
    schemes = dict.fromkeys(linears, SCHEME)
    wide = torch.randn(16, 256, generator=generator)
    wide[:, 7] *= 10
    with Inputs(asked(schemes, linears)) as inputs:
        for _ in range(2):  # the first batch is enough
            linears["outlier"](wide)
            linears["on the grid"](levels[:16])
    assert torch.equal(inputs.found["outlier"], wide) and "unseen" not in inputs.found
    before = linears["outlier"].weight.clone()
    choose(schemes, linears, inputs.found)
    assert asked(schemes, linears).keys() == {"outlier", "unseen"}
    assert torch.equal(linears["outlier"].weight, turn(before))
    assert torch.equal(linears["on the grid"].weight, levels - 8)
    assert str(schemes["on the grid"]) == "w4pca4"
