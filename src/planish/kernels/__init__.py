"""Kernels."""

from importlib.util import find_spec

if find_spec("triton"):
    from planish.kernels import fakequant  # noqa: F401
