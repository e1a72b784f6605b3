"""Siblings: one product for layers that are given the same x, and never a stale one."""

import copy
import dataclasses

import pytest
import torch
from test_kernels import random_qtensor
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from planish.kernels import siblings
from planish.kernels.linear import PackedLinear, packed_layers
from planish.kernels.siblings import Merge, Siblings, join, merging
from planish.qtensor import QTensor

OUTS = (32, 16, 48)


def layers(count=3, biased=False, order=None, bits=3):
    made = []
    for index, out in enumerate(OUTS[:count]):
        q = dataclasses.replace(random_qtensor((out, 64), bits, 32, False, seed=index), order=order)
        made.append(PackedLinear.from_qtensor(q, torch.randn(out) if biased else None, torch.bfloat16))
        assert made[-1].to_records()
    return made


@pytest.fixture
def calls(monkeypatch):
    """Outputs of each product that siblings make."""
    made, real = [], siblings.multiply

    def count(x, records, layout, bias=None):
        made.append(layout.out_features)
        return real(x, records, layout, bias)

    monkeypatch.setattr(siblings, "multiply", count)
    return made


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("rows", [1, 20])
def test_one_product_gives_all_of_them(calls, biased, ordered, rows):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).int() if ordered else None
    members, x = layers(biased=biased, order=order), torch.randn(2, rows, 64).bfloat16()
    apart, weights = [member(x) for member in members], [member.qtensor() for member in members]
    Siblings(members)
    for member, expected, weight in zip(members, apart, weights, strict=True):
        # a bias is added to what was rounded
        assert (member(x) - expected).abs().max() <= (2**-7 * expected.abs().max() if biased else 0)
        assert member.qtensor().equal(weight)
    assert calls == [sum(OUTS)] and members[0].siblings._product is None
    assert len({member.records.untyped_storage().data_ptr() for member in members}) == 1


def test_nothing_is_stale(calls):
    q, k, v = members = layers()
    x, other = torch.randn(1, 64).bfloat16(), torch.randn(1, 64).bfloat16()
    expected = {(m, t): m(t) for m in members for t in (x, other)}
    Siblings(members)
    assert torch.equal(q(x), expected[q, x]) and torch.equal(k(other), expected[k, other])
    assert torch.equal(v(x), expected[v, x]) and torch.equal(v(other), expected[v, other])
    q(x)
    x.mul_(2)  # written into between two members
    assert torch.equal(k(x), 2 * expected[k, x])
    q(x)
    x[:, 3:].zero_()
    assert torch.equal(v(x), v(x.clone()))
    assert torch.equal(q(x), q(x)) and torch.equal(q(x.clone()), q(x))  # asked twice, or with an equal one


def test_what_a_member_gave_may_be_written_into():
    q, k, v = members = layers()
    x = torch.randn(1, 64).bfloat16()
    expected = k(x)
    Siblings(members)
    q(x).zero_()
    assert torch.equal(k(x), expected)


def test_an_error_midway_leaves_no_trace(calls, monkeypatch):
    q, k, v = members = layers()
    x = torch.randn(1, 64).bfloat16()
    expected = k(x)
    Siblings(members)

    def fail(*_):
        raise RuntimeError("midway")

    with monkeypatch.context() as broken:
        broken.setattr(siblings, "multiply", fail)
        with pytest.raises(RuntimeError, match="midway"):
            q(x)
    assert torch.equal(k(x), expected)


def test_gradients_and_inference_mode_go_around(calls):
    q, k, v = members = layers()
    x = torch.randn(1, 64).bfloat16()
    expected = k(x)
    Siblings(members)
    q(x)
    before = len(calls)
    learned = x.requires_grad_()
    assert torch.equal(k(learned), expected) and len(calls) == before
    k(learned).sum().backward()
    assert learned.grad is not None
    with torch.no_grad():
        q(learned)
    with torch.inference_mode():
        assert torch.equal(k(torch.clone(x)), expected) and calls[-1] == OUTS[1]


def test_copies_moves_and_new_weights(calls):
    members, x = layers(), torch.randn(1, 64).bfloat16()
    Siblings(members)
    model = nn.ModuleList(members)
    expected, weights = [m(x) for m in model], [m.qtensor() for m in model]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model[0].records.zero_()
    assert all(torch.equal(m(x), y) for m, y in zip(copied, expected, strict=True))
    assert copied[0].siblings is copied[2].siblings is not model[0].siblings
    model.load_state_dict(copied.state_dict())
    assert model[0].siblings is not None and all(torch.equal(m(x), y) for m, y in zip(model, expected, strict=True))
    model.load_state_dict(copied.state_dict(), assign=True)
    assert model[0].siblings is None and all(torch.equal(m(x), y) for m, y in zip(model, expected, strict=True))
    assert copied.to(torch.float16)[0].siblings is not None  # records are no floats
    moved = copied.to("meta")
    assert moved[0].records is None and moved[0].siblings is None and moved[0].codes.is_meta
    model[1].to_codes()
    assert all(m.qtensor().equal(w) for m, w in zip(model, weights, strict=True))


def packed_llama(**overrides):
    torch.manual_seed(0)
    sizes = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes | overrides)).bfloat16().eval().requires_grad_(False)
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            q = random_qtensor((linear.out_features, linear.in_features), 4, 32, False, seed=len(name))
            q = QTensor(codes=q.codes, scale=(q.scale / 16).half(), zero=q.zero, bits=4, group_size=32)
            model.model.layers.set_submodule(name, PackedLinear.from_qtensor(q, None, torch.bfloat16))
    for layer in packed_layers(model).values():
        layer.to_records()
    return model


def test_are_found_by_what_they_are_given(calls):
    model, ids = packed_llama(), torch.arange(5)[None]
    before = model(ids).logits
    join(model)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        assert attention.q_proj.siblings is attention.k_proj.siblings is attention.v_proj.siblings is not None
        assert mlp.gate_proj.siblings is mlp.up_proj.siblings not in (None, attention.q_proj.siblings)
        assert attention.o_proj.siblings is None and mlp.down_proj.siblings is None
    assert torch.equal(model(ids).logits, before) and calls == [128, 256] * 2
    known = model.model.layers[0].mlp.up_proj.siblings
    join(model)
    assert model.model.layers[0].mlp.up_proj.siblings is known


def test_only_those_that_agree_and_fill_whole_tiles():
    model = packed_llama(num_key_value_heads=1, head_dim=8)  # k and v have 8 outputs
    up = PackedLinear.from_qtensor(random_qtensor((128, 64), 2, 32), None, torch.bfloat16)
    up.to_records()
    model.model.layers[0].mlp.up_proj = up
    join(model)
    assert model.model.layers[0].self_attn.q_proj.siblings is None and up.siblings is None
    assert model.model.layers[1].mlp.up_proj.siblings is not None


def test_a_model_that_cannot_run_without_numbers_is_joined_as_far_as_it_comes():
    model = packed_llama()
    model.model.layers[1].mlp.act_fn = nn.Tanh()  # no other block stands for it
    model.model.layers[1].register_forward_pre_hook(lambda _, args: bool(args[0].sum()))
    join(model)
    assert [block.mlp.up_proj.siblings is not None for block in model.model.layers] == [True, False]


def test_one_of_the_blocks_that_are_alike_is_run():
    model = packed_llama(num_hidden_layers=6)
    layers, ran = model.model.layers, []
    layers[2].mlp.act_fn = nn.Tanh()
    layers[3].self_attn.k_proj = nn.Linear(64, 32, dtype=torch.bfloat16)
    for index, block in enumerate(layers):  # the copy's hook is this one
        block.register_forward_pre_hook(lambda _, args, index=index: ran.append(index))
    join(model)
    assert ran == [0, 2, 3]
    for index, block in enumerate(layers):
        q, k, v = (getattr(block.self_attn, f"{part}_proj") for part in "qkv")
        assert q.siblings is v.siblings is not None and block.mlp.gate_proj.siblings is block.mlp.up_proj.siblings
        assert index == 3 or k.siblings is q.siblings
    assert len({block.self_attn.q_proj.siblings for block in layers}) == 6


def products(model, ids, pass_=None):
    """Names of the ops in what is compiled of a model, after a pass."""
    found = []

    def compiler(graph, _):
        if pass_ is not None:
            pass_(graph.graph)
        found.extend(str(node.target) for node in graph.graph.nodes if "packed" in str(node.target))
        graph.recompile()
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    return compiled(ids).logits, found


def test_traced_whole_and_merged_by_the_pass():
    model, ids = packed_llama(), torch.arange(5)[None]
    join(model)
    with torch.no_grad():
        expected = model(ids).logits
        apart, found = products(model, ids)
        assert torch.equal(apart, expected) and len(found) == 14
        with merging(model):
            merged, found = products(model, ids, Merge())
        assert torch.equal(merged, expected) and len(found) == 8
    assert not model.model.layers[0].mlp.up_proj.siblings.merging
