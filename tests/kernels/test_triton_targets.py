"""Triton's kernels compile for every GPU that is meant, and fit its shared memory; without a GPU.

Each launcher is called on the CPU, its launches are recorded instead of run, and compiled with the same arguments.
"""

import pytest
import torch

from planish.kernels.pack import Packed
from planish.qtensor import QTensor

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from planish.kernels import fakequant, merged, tokens, triton_loss, triton_train  # noqa: E402

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB that a block may have
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int8: "i8",
         torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@pytest.fixture
def launches(monkeypatch):
    """What was launched: kernels and their arguments by name."""
    found = []

    def record(self, *args, grid, warmup, **kwargs):
        names = [parameter.name for parameter in self.params]
        given = dict(zip(names, args, strict=False)) | {key: kwargs[key] for key in names if key in kwargs}
        found.append((self, given, {key: kwargs[key] for key in OPTIONS if key in kwargs}))

    monkeypatch.setattr(JITFunction, "run", record)
    return found


def source(kernel, given):
    """What the compiler is given for such arguments."""
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature, fixed = {}, {}
    for name, value in given.items():
        if name in constants or value is None:
            signature[name], fixed[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(fn=kernel, signature=signature, constexprs=fixed)


def packed(bits, group, columns=256):
    codes = torch.randint(0, 2**bits, (128, columns), dtype=torch.uint8)
    grid = 128, columns // group
    scale, zero = torch.rand(grid).half(), torch.zeros(grid, dtype=torch.uint8)
    return Packed.from_qtensor(QTensor(codes=codes, scale=scale, zero=zero, bits=bits, group_size=group))


def training(bits, group, dtype=torch.bfloat16):
    weight, x, grad = packed(bits, group), torch.zeros(1024, 256, dtype=dtype), torch.zeros(1024, 128, dtype=dtype)
    triton_train.multiply(x, weight, None, False)
    triton_train.multiply_back(grad, weight, False)
    triton_train.grid_gradients(grad, x, weight, True)
    triton_train.dense(weight, dtype)


def rounding(group):
    weight, grid = torch.zeros(4, 2, group, dtype=torch.bfloat16), torch.ones(4, 2, 1)
    fakequant.forward(weight, weight.float(), grid, grid, 4, torch.bfloat16)
    fakequant.backward(weight, weight, weight.float(), grid, grid, 4, True)


def factors(rank, group, int8):
    base, grid = torch.zeros(64, 256, dtype=torch.int8 if int8 else torch.bfloat16), torch.ones(64, 256 // group, 1)
    parts = base, grid if int8 else None, torch.zeros(rank, 256), torch.zeros(64, rank), 1.0, group
    merged.add(*parts)
    merged.add_round(*parts, grid, grid, 4, torch.bfloat16)
    merged.add_backward(torch.zeros(64, 256, dtype=torch.bfloat16), *parts, grid, grid, 4)


def rounded_tokens():
    x = torch.zeros(4, 576, dtype=torch.bfloat16)
    tokens.forward(x, 4, False)
    tokens.backward(x, x, 4, False)


def next_tokens():
    logits, labels = torch.zeros(4, 49152, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
    triton_loss.forward(logits, labels, logits, 0.5)
    triton_loss.forward(logits, labels, None, 0.0)


CASES = {
    "training, w3g128": lambda: training(3, 128),
    "training in fp32, w4g32": lambda: training(4, 32, torch.float32),
    "fake quantizer": lambda: rounding(128),
    "rounded tokens": rounded_tokens,
    "loss of next tokens": next_tokens,
    "factors, int8": lambda: factors(4, 64, True),
}


@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_and_fit(launches, case, target):
    CASES[case]()
    assert launches
    for kernel, given, options in launches:
        made = triton.compile(source(kernel, given), target=GPUTarget("cuda", target, 32), options=options)
        assert made.metadata.shared <= 1024 * SHARED[target], kernel.fn.__name__
