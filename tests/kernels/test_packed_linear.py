"""PackedLinear as a module: moved, cast, copied, saved, traced, and inside a model that generates."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from planish.kernels.linear import PackedLinear
from planish.qtensor import QTensor


def random_qtensor(out_features, in_features, group=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = (out_features, -(-in_features // group))
    return QTensor(codes=torch.randint(0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8),
                   scale=(torch.rand(grid, generator=generator) * 0.1 + 0.01).half(),
                   zero=torch.randint(0, 16, grid, generator=generator, dtype=torch.uint8),
                   bits=4, group_size=group)


@pytest.fixture
def layer():
    return PackedLinear.from_qtensor(random_qtensor(16, 64), torch.randn(16), torch.bfloat16)


def same(layer, x, q, bias):
    return torch.equal(layer(x), functional.linear(x, q.dequantize(x.dtype), bias.to(x.dtype)))


def test_holds_what_it_was_given(layer):
    assert (layer.in_features, layer.out_features, layer.bits, layer.group_size) == (64, 16, 4, 32)
    assert layer.qtensor().equal(random_qtensor(16, 64))
    assert layer.codes.numel() == 16 * 64 // 2 and layer.bias.dtype == torch.bfloat16
    assert list(layer.parameters()) == []
    assert "bits=4, group_size=32, asymmetric" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_multiplies_in_the_dtype_of_x(layer, dtype):
    x = torch.randn(2, 20, 64).to(dtype)
    assert layer(x).dtype == dtype and same(layer, x, random_qtensor(16, 64), layer.bias)


def test_a_cast_of_the_model_leaves_the_grid_alone(layer):
    model = nn.Sequential(layer).to(torch.float64)
    assert layer.bias.dtype == torch.float64
    assert layer.scale.dtype == torch.float16 and layer.qtensor().equal(random_qtensor(16, 64))
    assert model.bfloat16()[0].scale.dtype == torch.float16
    assert model.to("meta")[0].codes.device.type == "meta"
    assert model.to_empty(device="cpu")[0].scale.dtype == torch.float16


def test_state_dict_copy_and_new_weights(layer):
    x = torch.randn(1, 64).bfloat16()
    before = layer(x)  # fills a kernel's cache
    other = PackedLinear.from_qtensor(random_qtensor(16, 64, seed=1), torch.zeros(16), torch.bfloat16)
    kept, loaded = copy.deepcopy(layer), other(x)
    layer.load_state_dict(other.state_dict())
    assert layer.qtensor().equal(other.qtensor())
    assert torch.equal(layer(x), loaded) and not torch.equal(loaded, before)
    assert torch.equal(kept(x), before)


def test_gradients_pass_through_to_x(layer):
    x = torch.randn(1, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, random_qtensor(16, 64).dequantize().sum(0, keepdim=True))
    few = torch.randn(1, 64).bfloat16().requires_grad_()
    layer(few).sum().backward()
    assert few.grad is not None


@pytest.mark.parametrize("rows", [1, 20])
def test_torch_compile_traces_it_whole(layer, rows):
    x = torch.randn(rows, 64).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), functional.linear(x, layer.qtensor().dequantize(x.dtype), layer.bias))


def test_a_model_generates_with_it(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.bfloat16).eval()
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            linear = getattr(block.mlp, name)
            setattr(block.mlp, name, PackedLinear.from_qtensor(random_qtensor(*linear.weight.shape), None,
                                                               torch.bfloat16))
    prompt = torch.arange(5)[None]
    with torch.no_grad():
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4,
                                do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moves_to_a_gpu_and_back(layer):
    q, x = random_qtensor(16, 64), torch.randn(3, 64, device="cuda").bfloat16()
    moved = copy.deepcopy(layer).to("cuda")
    expected = functional.linear(x, q.to("cuda").dequantize(x.dtype), moved.bias)
    assert torch.equal(moved(x), expected)
    assert moved.to("cpu").qtensor().equal(q)
