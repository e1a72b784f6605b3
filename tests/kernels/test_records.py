"""A weight as records and nothing else: laid out as `gemv_layout` does it, read back exactly, multiplied by."""

import dataclasses
import itertools

import pytest
import torch
from test_kernels import random_qtensor
from torch.nn import functional

from planish.bitstream import Stream
from planish.kernels import gemv_layout
from planish.kernels.pack import Packed
from planish.kernels.records import Records, hold, multiply, reads

GROUPS = [32, 64, 96, 128, 256, 512, None]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_are_laid_out_bit_for_bit_and_read_back(bits, symmetric):
    for group, shape in itertools.product(GROUPS, [(16, 256), (37, 200), (1, 576), (48, 1100)]):
        q = random_qtensor(shape, bits, group, symmetric)
        packed, stream = Packed.from_qtensor(q), Stream.of(q)
        records = Records.of(stream)
        assert records.layout == gemv_layout.layout_of(packed)
        assert torch.equal(records.tiles, gemv_layout.write_records(packed, records.layout)), (group, shape)
        assert records.qtensor().equal(q), (group, shape)
        assert stream.qtensor().equal(q)  # what they are made of stays as it is
    assert torch.equal(Records.of(packed).tiles, Records.of(q).tiles)


def test_keep_an_order_and_refuse_what_no_kernel_reads():
    q = random_qtensor((16, 64), 4, 32)
    ordered = dataclasses.replace(q, order=torch.randperm(64).int())
    assert Records.of(ordered).qtensor().equal(ordered)
    assert Records.of(random_qtensor((16, 96), 4, 48)) is None
    assert Records.of(random_qtensor((16, 96), 4, 32, offset=True)) is None


def test_without_a_gpu_a_weight_is_held_as_codes():
    assert isinstance(hold(Stream.of(random_qtensor((16, 64), 4, 32)), torch.bfloat16), Packed)
    assert not reads(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 16, 17])
def test_multiply_as_the_reference_does(dtype, rows):
    q = random_qtensor((37, 200), 3, 64, False)
    records, x, bias = Records.of(q), torch.randn(1, rows, 200).to(dtype), torch.randn(37)
    y = multiply(x, records.tiles, records.layout, bias)
    assert y.dtype == dtype and torch.equal(y, functional.linear(x, q.dequantize(dtype), bias.to(dtype)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_on_a_gpu_they_are_the_same_and_all_that_is_held(bits):
    q = random_qtensor((112, 1100), bits, 64, False)
    held = hold(Stream.of(q).to("cuda"), torch.float16)
    assert isinstance(held, Records) and torch.equal(held.tiles.cpu(), Records.of(q).tiles)
    assert held.qtensor().to("cpu").equal(q)
    torch.cuda.synchronize()
    for rows in (1, 16, 40):
        x = torch.randn(rows, 1100, device="cuda").half()
        exact = x.double() @ q.to("cuda").dequantize().double().T
        error = (multiply(x, held.tiles, held.layout).double() - exact).norm() / exact.norm()
        assert error < 2**-9
