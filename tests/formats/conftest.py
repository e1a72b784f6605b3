"""A random QTensor with everything awkward in it: scales of both signs, zero points at both ends."""

from collections.abc import Callable

import pytest
import torch

from planish.qtensor import QTensor, store_shared
from planish.scheme import Scheme


@pytest.fixture
def random_qtensor() -> Callable[..., QTensor]:
    def make(scheme: Scheme, shape: tuple[int, int], offset: bool = False) -> QTensor:
        generator = torch.Generator().manual_seed(hash((scheme.bits, shape)) % 2**31)
        grid = (shape[0], scheme.groups_in(shape[1]))
        top = 2**scheme.bits
        scale = torch.randn(grid, generator=generator)
        zero = torch.randint(0, top, grid, generator=generator, dtype=torch.uint8)
        zero.view(-1)[0], zero.view(-1)[-1] = 0, top - 1
        return QTensor(
            codes=torch.randint(0, top, shape, generator=generator, dtype=torch.uint8),
            scale=(store_shared(scale) if scheme.shared else scale).half(),
            zero=None if scheme.symmetric else zero,
            offset=torch.randn(grid, generator=generator) if offset else None,
            bits=scheme.bits,
            group_size=scheme.group_in(shape[1]),
        )

    return make
