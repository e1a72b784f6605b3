"""Repeatable: training on a GPU that gives the same bits each time.

    with repeatable(model, device):
        ...                             forward and backward passes

torch's attention adds its gradients up in whatever order blocks of threads arrive, unless all of torch is told to keep
an order. Then what can't keep one is refused, which a mixture of experts may need: it trains as torch would have it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import deterministic as switch

from planish.experts import has_experts

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # torch asks for it before it multiplies in a fixed order


@contextmanager
def repeatable(model: nn.Module, device: torch.device) -> Iterator[None]:
    """For as long as it lasts, kernels add in a fixed order; on a CPU, which they do anyway, it does nothing."""
    if device.type != "cuda" or has_experts(model):
        yield
        return
    deterministic: Any = switch  # a module whose one attribute has no type
    was, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, workspace = deterministic.fill_uninitialized_memory, os.environ.get(WORKSPACE)
    try:
        os.environ.setdefault(WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        deterministic.fill_uninitialized_memory = False  # it is for finding mistakes, and takes a pass over memory
        yield
    finally:
        deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(was, warn_only=warns)
        if workspace is None:
            del os.environ[WORKSPACE]
