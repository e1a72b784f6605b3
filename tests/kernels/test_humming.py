"""Law 3 for Humming within our op: what it is given, when it is taken, and on a GPU its products.

Without a GPU the op's definition stands in for it. On a GPU it is forced, whatever tables choose there.
"""

import copy
import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from test_cuda_gemm import assert_near, each_dtype
from test_cuda_gemv import (
    CARDS,
    activations,
    assert_replays,
    each_bits,
    each_grid,
    make,
    make_on_gpu,
)
from torch import nn

from planish import bitstream
from planish.kernels import cuda_gemm, humming, linear, reference
from planish.kernels.cuda_gemv import DTYPES, Card
from planish.kernels.gemv_layout import STEP, Layout, layout_of, write_records
from planish.kernels.humming import Laid, humming_gemm
from planish.kernels.linear import PackedLinear
from planish.kernels.siblings import Siblings, join
from planish.qtensor import QTensor

A100 = Card((8, 0), 108, 164 * 1024)
GROUPS = [32, 64, 128, 256, None]


def laid_on_a_cpu(records, layout, dtype):
    """What Humming would be given, in the place of what it makes of that."""
    found = humming.parts(records, layout, dtype)
    return Laid(found["weight"], found["weight_scale"], found.get("zero_point"))


@each_bits
@each_grid
@pytest.mark.parametrize("group", GROUPS)
def test_it_is_given_the_very_weight(bits, group, symmetric):
    q, weight = make((256, 512 + 128), bits, group, symmetric)
    signs = 1 - 2 * torch.randint(0, 2, q.scale.shape)
    q, weight = (dataclasses.replace(w, scale=q.scale * signs) for w in (q, weight))
    layout = layout_of(weight)
    records = write_records(weight, layout)
    for dtype in DTYPES:
        given = humming.parts(records, layout, dtype)
        scale = given["weight_scale"]
        assert scale.dtype == dtype and scale.shape == (256, 640 // min(group or 128, 128)) and given["weight"].shape[1]
        zero = None if symmetric else bitstream.unpack(given["zero_point"], bits, 0, 256)
        again = QTensor(codes=bitstream.unpack(given["weight"], bits, 1, 640), scale=scale.half(), zero=zero, bits=bits,
                        group_size=min(group or 128, 128))  # fmt: skip
        assert (scale < 0).any() and torch.equal(again.codes, q.codes)
        rounded = dataclasses.replace(q, scale=q.scale.to(dtype).half())  # in bf16, 8 bits of it
        assert torch.equal(again.dequantize(), rounded.dequantize())
        assert ("zero_point" in given) == (not symmetric)


@each_dtype
@each_grid
def test_the_op_is_the_reference_on_any_device(symmetric, dtype):
    _, weight = make((128, 256), 3, 64, symmetric)
    layout = layout_of(weight)
    records, x, bias = write_records(weight, layout), activations(20, 256, dtype), torch.randn(128).to(dtype)
    laid = laid_on_a_cpu(records, layout, dtype)
    for given in (bias, None):
        expected = reference.matmul(x, weight, given, {})
        assert torch.equal(humming_gemm(x, records, *laid, given, *layout), expected)
    torch.library.opcheck(humming_gemm, (x, records, *laid, bias, *layout))
    compiled = torch.compile(humming_gemm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, records, *laid, None, *layout), expected)


def test_who_takes_many_rows_is_a_table():
    assert cuda_gemm.ways_of((9, 0)) == ("kernel", "passes", "decoded")
    assert all(cuda_gemm.ways_of(capability)[0] == "humming" for capability in CARDS if capability != (9, 0))


@pytest.mark.parametrize("capability", CARDS, ids=str)
def test_it_is_taken_where_it_is_installed_and_the_table_says_so(monkeypatch, capability):
    records, layout = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0)), Layout(2, 64, True, 8192, 8192)
    monkeypatch.setattr(humming, "card_of", lambda _: A100._replace(capability=capability))
    monkeypatch.setattr(humming, "lay_out", lambda *given: given)
    monkeypatch.setattr(humming, "installed", lambda: True)
    found = humming.hold(records, layout, torch.float16)
    assert found == (None if capability == (9, 0) else (records, layout, torch.float16))
    ragged = layout._replace(out_features=8200), layout._replace(in_features=8256)
    for other in (*ragged, layout._replace(out_features=2048)):  # the last is small
        assert humming.hold(records, other, torch.float16) is None
    assert humming.hold(records, layout, torch.float32) is None
    monkeypatch.setattr(humming, "installed", lambda: False)
    assert humming.hold(records, layout, torch.float16) is None


def test_one_that_fails_is_said_and_done_without(monkeypatch):
    records, layout = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0)), Layout(2, 64, True, 8192, 8192)
    monkeypatch.setattr(humming, "card_of", lambda _: A100)
    monkeypatch.setattr(humming, "installed", lambda: True)
    monkeypatch.setattr(humming, "lay_out", lambda *_: exec("raise RuntimeError('no compiler')"))
    with pytest.warns(UserWarning, match="go without it: no compiler"):
        assert humming.hold(records, layout, torch.float16) is None


@pytest.fixture
def taken(monkeypatch):
    """Rows of each product by Humming; layers are laid out for it on a CPU."""
    rows, real = [], linear.multiply

    def count(x, tiles, layout, bias=None, laid=None):
        rows.extend([] if laid is None else [x.numel() // layout.in_features])
        return real(x, tiles, layout, bias, laid)

    monkeypatch.setattr(linear, "multiply", count)
    monkeypatch.setattr(humming, "hold", laid_on_a_cpu)
    return rows


def layers(count=2):
    made = [PackedLinear.from_qtensor(make((128, 256), 4, 64, False, seed)[0], torch.randn(128), torch.bfloat16)
            for seed in range(count)]  # fmt: skip
    assert all(layer.to_records() for layer in made)
    model = nn.ModuleList(made)
    model.register_parameter("dtype", nn.Parameter(torch.zeros(1).bfloat16(), requires_grad=False))
    return model


def test_a_layer_so_laid_out_gives_it_many_rows_and_no_others(taken):
    model, many, few = layers(), torch.randn(5, 8, 256).bfloat16(), torch.randn(32, 256).bfloat16()
    expected, before = [[layer(x) for x in (many, few)] for layer in model], dict(model.state_dict())
    Siblings(list(model))
    join(model)
    for layer, (of_many, of_few) in zip(model, expected, strict=True):
        assert torch.equal(layer(many), of_many)
        assert (layer(few) - of_few).abs().max() <= 2**-7 * of_few.abs().max()  # with siblings: a bias comes later
        assert layer(many.half()).dtype == torch.float16  # laid out for another dtype
    assert taken == [40, 40]  # each by its own weight
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_forgotten_with_its_weight(taken):
    model, x = layers(1), torch.randn(40, 256).bfloat16()
    join(model)
    expected, copied = model[0](x), copy.deepcopy(model)
    assert torch.equal(copied[0](x), expected) and taken == [40, 40]
    other = layers(2)[1]
    model[0].load_state_dict(other.state_dict())
    assert model[0].laid is None and torch.equal(model[0](x), other(x))
    join(model)
    assert torch.equal(model[0](x), other(x)) and taken == [40] * 3
    assert model.half()[0].laid is not None and model.to("meta")[0].laid is None
    copied[0].to_codes()
    assert copied[0].laid is None and copied[0](x).shape == expected.shape


def test_torch_traces_it(taken, compiler):
    model, found = layers(1)[0], []
    model.lay_out(torch.bfloat16)

    def backend(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes if "humming" in str(node.target))
        return graph.forward

    compiled = compiler(model, fullgraph=True, backend=backend, dynamic=False)
    for rows in (40, 300):
        x = torch.randn(rows, 256).bfloat16()
        assert torch.equal(compiled(x), model(x))
    assert len(found) == 2


SHAPE, ROWS = (640, 1280), (17, 33, 200)
CASES = [
    (bits, group, symmetric, dtype, ROWS[number % 3])
    for number, (bits, group, symmetric, dtype) in enumerate(
        itertools.product((2, 3, 4, 8), (32, 64, 128, None), (True, False), DTYPES)
    )
]
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not humming.installed(), reason="needs humming-kernels: pip install 'planish[cuda]'"),
    pytest.mark.filterwarnings("ignore"),  # of Humming, of torch.compile, and of what they import
]


def on_gpu(test):
    for mark in ON_GPU:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def ahead():
    """All that CASES need, compiled in parallel."""
    keys = {
        (Layout(bits, group or STEP, not symmetric, *SHAPE), dtype, cuda_gemm.rows_of(rows), 0)
        for bits, group, symmetric, dtype, rows in CASES
    }
    first, *others = keys
    humming.compiled(*first)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: humming.compiled(*key), others))


def multiply(x, records, laid, bias):
    torch.full((4 * len(x), SHAPE[0]), float("nan"), device="cuda")  # what the allocator gives next
    return humming_gemm(x, records.tiles, *laid, bias, *records.layout)


@on_gpu
@pytest.mark.parametrize("bits, group, symmetric, dtype, rows", CASES, ids=str)
def test_on_a_gpu(ahead, bits, group, symmetric, dtype, rows):
    q, records = make_on_gpu(SHAPE, bits, group, symmetric)
    assert (q.scale < 0).any()
    laid = humming.lay_out(records.tiles, records.layout, dtype)
    torch.cuda.synchronize()
    x, bias = activations(rows, SHAPE[1], dtype).cuda(), torch.randn(SHAPE[0], device="cuda").to(dtype)
    y = multiply(x, records, laid, None)
    # its own W_hat, whose scales are rounded in bf16, as strictly as our kernel's; the reference's within TOLERANCE
    assert_near(y, x, dataclasses.replace(q, scale=q.scale.to(dtype).half()), None)
    weight = q.dequantize().double()
    off = (y.double() - x.double() @ weight.T).abs() / (x.double().abs() @ weight.abs().T)
    assert off.max().item() <= humming.TOLERANCE
    assert torch.equal(multiply(x, records, laid, bias), y + bias)
    assert all(torch.equal(multiply(x, records, laid, None), y) for _ in range(5))


@on_gpu
@pytest.mark.parametrize("rows", [*ROWS, 1000])
def test_rows_on_a_gpu(rows):
    q, records = make_on_gpu((1024, 4096), 4, 128, False)  # long enough to be cut where it may be
    laid = humming.lay_out(records.tiles, records.layout, torch.float16)
    x = activations(rows, 4096, torch.float16).cuda()
    y = humming_gemm(x, records.tiles, *laid, None, *records.layout)
    assert_near(y, x, q, None)
    found = [humming_gemm(x, records.tiles, *laid, None, *records.layout) for _ in range(20)]
    assert all(torch.equal(again, y) for again in found)


@on_gpu
def test_a_chain_of_layers_in_a_cuda_graph():
    held = [make_on_gpu((512, 512), bits, 64, False)[1] for bits in (2, 4)] * 3
    laid = [humming.lay_out(records.tiles, records.layout, torch.bfloat16) for records in held]
    x = activations(100, 512, torch.bfloat16).cuda()

    def chain():
        y = x
        for records, made in zip(held, laid, strict=True):
            y = humming_gemm(y, records.tiles, *made, None, *records.layout)
            y = y / y.float().norm().to(y.dtype)
        return y

    assert_replays(chain)


@on_gpu
def test_torch_compile_makes_cuda_graphs_of_it(monkeypatch):
    monkeypatch.setattr(humming, "hold", humming.lay_out)
    layer = PackedLinear(make_on_gpu((512, 512), 2, 64, False)[1], torch.randn(512, device="cuda").bfloat16())
    layer.lay_out(torch.bfloat16)
    torch.cuda.synchronize()
    x = activations(100, 512, torch.bfloat16).cuda()
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
        assert all(torch.equal(compiled(x), expected) for _ in range(4))
