"""What the CUDA kernels that read a packed weight share: the text and the constants that each begins with.

cuda_records.cu beside this reads records (gemv_layout.py) and decodes them. Knows nothing of what kernels do with them.
"""

import functools
from pathlib import Path


@functools.cache
def source(*names: str) -> str:
    """The text of .cu files beside this one, after what they share."""
    return "".join(Path(__file__).with_name(f"{name}.cu").read_text() for name in ("cuda_records", *names))


def macros(layout: tuple[int, int, bool], bf16: bool, overlap: bool) -> dict[str, int]:
    """What cuda_records.cu is compiled for; `layout` is bits, group, has_zero."""
    bits, group, has_zero = layout
    return {"BITS": bits, "GROUP": group, "ZERO": int(has_zero), "BF16": int(bf16), "OVERLAP": int(overlap)}


def first(bits: int, bf16: bool) -> int:
    """FIRST of cuda_records.cu: a pair of 2^10 in fp16, or of 2^7 in bf16 where weights are decoded in that."""
    return 0x43004300 if bf16 and bits <= 4 else 0x64006400
