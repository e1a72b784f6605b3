"""Activations: each token on its own grid, the codes are what the fake quantizer stands for, gradients pass."""

import pytest
import torch
from torch import Tensor, nn

import planish
from planish.errors import UnsupportedScheme
from planish.formats import FORMATS, verify
from planish.kernels.linear import PackedLinear
from planish.quant import QLinear, Quantizer
from planish.quant.activation import fake_quantize_tokens, quantize_tokens
from planish.scheme import Activations, Scheme

HOW = [Activations(bits=bits, symmetric=symmetric) for bits in (4, 5, 6, 7, 8) for symmetric in (True, False)]


def tokens(dtype: torch.dtype) -> Tensor:
    """Ordinary ones, tiny and huge ones, one of zeros, one of a sign."""
    x = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(0))
    x[0, 1] *= 1e-6
    x[0, 2] *= 1e4
    x[1, 0] = 0
    x[1, 1] = x[1, 1].abs() + 3
    return x.to(dtype)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_what_the_fake_quantizer_stands_for(how: Activations, dtype: torch.dtype) -> None:
    x = tokens(dtype)
    given = fake_quantize_tokens(x, how)
    codes, scale, zero = quantize_tokens(x, how)
    assert torch.equal((scale * (codes.float() - zero)).to(dtype).view(x.shape), given) and given.dtype == dtype
    # within half a step of each token, and the rounding of the result
    step = scale.view(2, 4, 1)
    assert bool(((given.float() - x.float()).abs() <= 0.501 * step + 2**-8 * x.float().abs()).all())
    assert bool((given[1, 0] == 0).all()) and int(codes.max()) < 2**how.bits


def test_gradients_pass_straight_through() -> None:
    x = tokens(torch.float32)[1, 1:].requires_grad_()
    how, direction = Activations(bits=8), torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    (fake_quantize_tokens(x, how) * direction).sum().backward()
    assert x.grad is not None
    # the ends of a token carry its grid besides
    assert ((x.grad - direction).abs() < 1e-6).float().mean() > 0.9


@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_packed_layer_computes_what_was_trained(how: Activations) -> None:
    scheme = Scheme(bits=4, group_size=None, activations=how)
    linear = nn.Linear(48, 24)
    trained = QLinear(linear, Quantizer(linear.weight.detach(), scheme), how)
    assert trained.quantizer is not None
    packed = PackedLinear.from_qtensor(trained.quantizer.quantize(linear.weight), linear.bias, torch.float32, how)
    assert packed.scheme == scheme
    x = tokens(torch.float32)
    torch.testing.assert_close(packed(x), trained(x), rtol=1e-5, atol=1e-5 * float(trained(x).abs().max()))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "native"])
@pytest.mark.parametrize("text", ["w4g128a8", "w8a8", "w6g128", "w4a4h", "w8a8kv8"])
def test_formats_that_can_not_say_it_refuse_first(name: str, text: str) -> None:
    if FORMATS[name].activations and text in ("w4g128a8", "w8a8"):
        verify(FORMATS[name], {"x": Scheme.parse(text)}, {"x": (128, 128)})
        return
    with pytest.raises(UnsupportedScheme, match=r"^x: .*; use --format .*native"):
        verify(FORMATS[name], {"x": Scheme.parse(text)}, {"x": (128, 128)})


@pytest.mark.parametrize("text", ["w4a4", "w6a6asym", "w8a8s", "w4g32a8"])
@torch.no_grad()
def test_rtn_stores_and_loads_activations(tmp_path, tiny_llama, text: str) -> None:
    model, ids = tiny_llama(), torch.arange(1, 33).view(1, -1)
    manifest = planish.quantize_to(model, tmp_path / "out", "rtn", text, device="cpu")
    assert manifest.format == "native" and manifest.layers["model.layers.0.mlp.up_proj"] == str(Scheme.parse(text))
    loaded = planish.load(tmp_path / "out", device="cpu")
    layer = loaded.model.layers[0].mlp.up_proj
    assert layer.scheme == Scheme.parse(text)
    other = planish.quantize(model, "rtn", str(Scheme.parse(text)), device="cpu")
    assert torch.equal(loaded(ids).logits, other(ids).logits)
    layer.activations = None
    assert not torch.equal(loaded(ids).logits, other(ids).logits), "activations were rounded"
    planish.register()
    try:
        from transformers import AutoModelForCausalLM

        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(again(ids).logits, other(ids).logits)
    finally:
        from planish.hf import unregister

        unregister()
