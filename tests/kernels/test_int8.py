"""Integer products compute what rounded activations and weights stand for; on a GPU the definitions' own bits.

Without a GPU the Triton kernels run in Triton's interpreter, in a process of their own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from planish.kernels import int8
from planish.kernels.linear import PackedLinear
from planish.kernels.pack import Packed
from planish.qtensor import QTensor
from planish.quant.activation import fake_quantize_tokens
from planish.scheme import Activations

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_triton = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device or Triton's interpreter"
)
HOW = [Activations(bits=bits, symmetric=symmetric) for bits in (4, 6, 8) for symmetric in (True, False)]


def random_weight(bits: int, symmetric: bool, shape: tuple[int, int] = (40, 136)) -> QTensor:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (shape[0], 1), generator=generator, dtype=torch.uint8)
    scale = ((torch.rand(shape[0], 1, generator=generator) - 0.5) / 2**bits).half()
    return QTensor(codes=codes, scale=scale, zero=None if symmetric else zero, bits=bits, group_size=shape[1])


def inputs(rows: int, columns: int = 136) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) + 0.3
    x[0] *= 1e-5
    x[-1] = 0
    return x


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_law_3_the_product_is_what_the_codes_stand_for(bits: int, symmetric: bool, how: Activations) -> None:
    q, bias = random_weight(bits, symmetric), torch.randn(40)
    weight = Packed.from_qtensor(q)
    for rows in (1, 2, 33):
        x = inputs(rows)
        wanted = functional.linear(fake_quantize_tokens(x, how).double(), q.dequantize().double(), bias.double())
        for given in (x, x.view(1, rows, -1)):
            assert int8.supports(weight, how, given)
            y = int8.matmul(given, weight, how, bias, {})
            assert y.shape == (*given.shape[:-1], 40) and y.dtype == x.dtype
            torch.testing.assert_close(y.view(rows, 40).double(), wanted, rtol=1e-5, atol=1e-6)


def test_what_is_not_supported_goes_the_long_way() -> None:
    how, q = Activations(bits=8), random_weight(4, True)
    x, weight = inputs(2), Packed.from_qtensor(q)
    assert not int8.supports(weight, how, x.requires_grad_())
    grouped = QTensor(codes=q.codes, scale=q.scale.expand(-1, 17).contiguous(), zero=None, bits=4, group_size=8)
    assert not int8.supports(Packed.from_qtensor(grouped), how, x.detach())
    layer = PackedLinear.from_qtensor(q, None, torch.float32, how)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(layer(x.detach()), y.detach(), rtol=1e-5, atol=1e-6)
    assert "int8" in layer._cache
    layer.to(torch.bfloat16)
    assert not layer._cache and layer(x.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.skipif(INTERPRETED or not importlib.util.find_spec("triton"), reason="this is what it starts")
def test_the_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


@pytest.fixture(autouse=INTERPRETED)
def interpreter_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter makes a loop's bounds plain numbers in a way that NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # type: ignore[no-untyped-def]
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_kernels_are_the_definitions(how: Activations, symmetric: bool) -> None:
    from planish.kernels import triton_int8

    shape = (200, 136) if INTERPRETED else (1000, 1160)
    packed = Packed.from_qtensor(random_weight(4, symmetric, shape)).to(DEVICE)
    weight, sums, zeros = int8.widened(packed)
    for rows in (3, 140):
        x = inputs(rows, shape[1]).to(DEVICE)
        found = triton_int8.rows(x, how.bits, how.symmetric)
        wanted = int8.int8_rows._init_fn(x, how.bits, how.symmetric)
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        bias, scale = torch.randn(shape[0], device=DEVICE), packed.scale.flatten()
        y = triton_int8.linear(*found, weight, scale, sums, zeros, bias, torch.float32)
        total = (found[0].float() @ weight.T.float()).int()
        exact = int8.scaled(total, *found[1:], scale, sums, zeros, bias, shape[1], torch.float32)
        torch.testing.assert_close(y, exact, rtol=1e-6, atol=1e-6)
