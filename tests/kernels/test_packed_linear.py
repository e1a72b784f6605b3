"""PackedLinear as a module: moved, cast, copied, saved, traced, and inside a model that generates."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from planish.errors import PlanishError
from planish.formats.gguf import common_scale
from planish.kernels.linear import PackedLinear
from planish.qtensor import QTensor, store_shared


def random_qtensor(out_features, in_features, group=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = (out_features, -(-in_features // group))
    return QTensor(
        codes=torch.randint(0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8),
        scale=(torch.rand(grid, generator=generator) * 0.1 + 0.01).half(),
        zero=torch.randint(0, 16, grid, generator=generator, dtype=torch.uint8),
        bits=4,
        group_size=group,
    )


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


def test_a_frozen_layer_keeps_no_dense_weight_for_its_gradient(layer):
    held = []
    x = torch.randn(20, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y = layer(x)
    assert {t.data_ptr() for t in held} <= {t.data_ptr() for t in layer.buffers()}
    assert torch.equal(y, layer(x.detach()))


def test_scale_and_zero_become_parameters(layer):
    q, x = random_qtensor(16, 64), torch.randn(5, 64)
    before = layer(x)
    made = layer.make_trainable({"scale", "zero"})
    assert dict(layer.named_parameters()) == made == layer.trainable and set(made) == {"scale", "zero"}
    assert all(p.dtype == torch.float32 and p.shape == (16, 2) and p.requires_grad for p in made.values())
    assert torch.equal(layer(x), before) and layer.qtensor().equal(q)
    assert set(layer.state_dict()) == {"codes", "scale", "zero", "bias"}
    assert repr(layer).endswith("trains scale and zero)")
    assert layer.make_trainable(["scale"])["scale"] is made["scale"]
    layer.freeze()
    assert list(layer.parameters()) == [] and layer.qtensor().equal(q) and not layer.trainable
    assert (layer.scale.dtype, layer.zero.dtype) == (torch.float16, torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 20])
def test_columns_in_another_order_multiply_as_the_weight_does(dtype, rows):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).int()
    q = dataclasses.replace(random_qtensor(16, 64), order=order)
    layer, x = PackedLinear.from_qtensor(q, torch.randn(16), dtype), torch.randn(rows, 64).to(dtype)
    expected = functional.linear(x, q.dequantize(dtype), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)
    assert layer.qtensor().equal(q) and set(layer.state_dict()) == {"codes", "scale", "zero", "order", "bias"}
    x.requires_grad_()
    layer.make_trainable(["scale"])
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize(dtype).sum(0).expand_as(x), rtol=2e-2, atol=2e-2)
    layer.freeze()
    assert layer.qtensor().equal(q) and layer.to(torch.bfloat16).order.dtype == torch.int32


def test_is_held_as_records_or_as_codes(layer):
    q, x = random_qtensor(16, 64), torch.randn(3, 64).bfloat16()
    before = layer(x)
    assert layer.to_records() and layer.to_records() and layer.qtensor().equal(q)
    assert set(layer.state_dict()) == {"records", "bias"} and layer.codes is layer.scale is layer.zero is None
    assert torch.equal(layer(x), functional.linear(x, q.dequantize(x.dtype), layer.bias))
    assert (layer.scheme.bits, layer.scheme.symmetric) == (4, False) and repr(layer).endswith("as records)")
    kept = copy.deepcopy(layer)
    layer.to_codes()
    assert layer.records is None and layer.qtensor().equal(q) and torch.equal(layer(x), before)
    layer.load_state_dict(kept.state_dict())
    assert layer.records is not None and layer.qtensor().equal(q)
    layer.load_state_dict(PackedLinear.from_qtensor(random_qtensor(16, 64, seed=1), layer.bias, x.dtype).state_dict())
    assert layer.records is None and layer.qtensor().equal(random_qtensor(16, 64, seed=1))


def test_records_give_gradients_to_x_and_way_to_training(layer):
    q, x = random_qtensor(16, 64), torch.randn(2, 64, requires_grad=True)
    layer.to_records()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand_as(x))
    assert layer.records is not None
    made = layer.make_trainable(["scale", "zero"])
    assert set(made) == {"scale", "zero"} and layer.records is None and not layer.to_records()
    layer.freeze()
    assert layer.qtensor().equal(q)


def test_records_are_cast_and_leave_for_a_device_without_kernels(layer):
    q = random_qtensor(16, 64)
    layer.to_records()
    assert layer.to(torch.float16).records is not None and layer.qtensor().equal(q)
    assert layer.to("meta").records is None and layer.codes.is_meta and layer.scale.dtype == torch.float16


def test_what_no_kernel_lays_out_stays_codes():
    q = random_qtensor(16, 96, group=48)
    layer = PackedLinear.from_qtensor(q, None, torch.bfloat16)
    assert not layer.to_records() and layer.qtensor().equal(q)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("ordered", [False, True])
def test_torch_compile_traces_records_whole(layer, rows, ordered):
    q, x = random_qtensor(16, 64), torch.randn(rows, 64).bfloat16()
    if ordered:
        q = dataclasses.replace(q, order=torch.randperm(64).int())
        layer = PackedLinear.from_qtensor(q, layer.bias, torch.bfloat16)
    layer.to_records()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("slots", [["scale"], ["zero"], ["scale", "zero"]], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_trained_is_what_freezing_keeps(layer, slots, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 64, generator=generator).to(dtype)
    rates = {"scale": 0.002, "zero": 0.2}  # a zero moves by whole levels
    optimizer = torch.optim.Adam({"params": p, "lr": rates[n]} for n, p in layer.make_trainable(slots).items())
    losses = []
    for _ in range(8):
        loss = layer(x).float().square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    few = x[0, :1]
    with torch.no_grad():
        trained, q, one = layer(x), layer.qtensor(), layer(few)
    assert not q.equal(random_qtensor(16, 64)) and torch.equal(q.codes, random_qtensor(16, 64).codes)
    layer.freeze()
    assert layer.qtensor().equal(q) and torch.equal(layer(x), trained)
    torch.testing.assert_close(layer(few), one, rtol=2e-2, atol=2e-2)  # few rows of bf16 have a kernel of their own


def test_a_trained_grid_is_what_can_be_stored(layer):
    layer.make_trainable(["scale", "zero"])
    with torch.no_grad():
        layer.scale[0, 0], layer.scale[0, 1] = 1 / 3, -1e-9
        layer.zero[0, 0], layer.zero[0, 1], layer.zero[1, 0], layer.zero[1, 1] = -3.3, 300.7, 2.5, 7.6
    q = layer.qtensor()
    assert q.scale[0].tolist() == torch.tensor([1 / 3, -1e-5]).half().tolist()
    assert q.zero[:2].flatten().tolist() == [0, 15, 2, 8]
    x = torch.randn(4, 64)
    y = layer(x)
    assert same(layer, x, q, layer.bias)
    y.sum().backward()
    assert layer.scale.grad[0].all() and layer.zero.grad[:2].all()  # straight through, past the ends too


def test_trained_parameters_keep_fp32_when_the_model_is_cast_or_copied(layer):
    made = layer.make_trainable(["scale", "zero"])
    layer(torch.randn(3, 64)).sum().backward()
    model = nn.Sequential(layer).to(torch.bfloat16)
    assert model[0].scale is made["scale"] and made["scale"].dtype == made["scale"].grad.dtype == torch.float32
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.scale.mul_(2)
    assert copied.trainable.keys() == made.keys() and not copied.qtensor().equal(layer.qtensor())
    layer.load_state_dict(copied.state_dict())
    assert layer.scale is made["scale"] and layer.qtensor().equal(copied.qtensor())
    assert model.to("meta")[0].scale.dtype == torch.float32


def test_slots_that_cannot_train_are_refused(layer):
    with pytest.raises(PlanishError, match="can't train 'scales'; did you mean 'scale'"):
        layer.make_trainable(["scales"])
    q = random_qtensor(16, 64)
    symmetric = QTensor(codes=q.codes, scale=q.scale, zero=None, bits=4, group_size=32)
    other = PackedLinear.from_qtensor(symmetric, None, torch.bfloat16)
    with pytest.raises(PlanishError, match="symmetric grid has no zero to train"):
        other.make_trainable(["scale", "zero"])
    assert not other.trainable  # nothing is changed by a call that is refused
    other.make_trainable(["scale"])
    x = torch.randn(3, 64)
    assert torch.equal(other(x), functional.linear(x, symmetric.dequantize()))


def test_torch_compile_traces_a_trained_layer_whole(layer):
    layer.make_trainable(["scale", "zero"])
    x = torch.randn(3, 64)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert all(map(torch.equal, expected, [p.grad for p in layer.parameters()]))


@pytest.mark.parametrize("rows", [1, 20])
def test_torch_compile_traces_it_whole(layer, rows, compiler):
    x = torch.randn(rows, 64).bfloat16()
    compiled = compiler(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), functional.linear(x, layer.qtensor().dequantize(x.dtype), layer.bias))


def test_a_model_generates_with_it(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.bfloat16).eval()
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            linear = getattr(block.mlp, name)
            setattr(
                block.mlp, name, PackedLinear.from_qtensor(random_qtensor(*linear.weight.shape), None, torch.bfloat16)
            )
    prompt = torch.arange(5)[None]
    with torch.no_grad():
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )
    assert tokens.shape == (1, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moves_to_a_gpu_and_back(layer):
    q, x = random_qtensor(16, 64), torch.randn(3, 64, device="cuda").bfloat16()
    moved = copy.deepcopy(layer).to("cuda")
    weight, bias = q.to("cuda").dequantize(torch.float32).double(), moved.bias.double()
    size = x.double().abs() @ weight.abs().T + bias.abs()
    # unlike the reference, a kernel doesn't round the weight before it multiplies
    assert ((moved(x).double() - functional.linear(x.double(), weight, bias)).abs() <= 2**-8 * size).all()
    assert moved.to("cpu").qtensor().equal(q)


def test_scales_that_share_one_are_trained_on_their_grid():
    generator = torch.Generator().manual_seed(0)
    scale = store_shared(torch.randn(8, 32, generator=generator) / 10)
    codes = torch.randint(0, 8, (8, 512), generator=generator, dtype=torch.uint8)
    q = QTensor(codes=codes, scale=scale.half(), zero=None, bits=3, group_size=16)
    layer = PackedLinear.from_qtensor(q, None, torch.float32, shared=True)
    assert str(layer.scheme) == "w3g16k"
    (learned,) = layer.make_trainable(["scale"]).values()
    x = torch.randn(3, 512, generator=generator)
    layer(x).square().sum().backward()
    assert learned.grad is not None and bool((learned.grad != 0).all())
    assert torch.equal(store_shared(learned.detach()), scale)  # what is stored is stored again as it is
    learned.data -= learned.grad * learned.detach().abs().mean() / learned.grad.abs().mean()
    trained = layer(x).detach()
    layer.freeze()
    stored = layer.qtensor()
    assert torch.equal(stored.scale.float(), store_shared(learned.detach())) and not stored.equal(q)
    assert common_scale(stored.scale.unflatten(1, (-1, 16))) is not None
    assert torch.allclose(layer(x), trained, rtol=1e-5, atol=1e-5)
