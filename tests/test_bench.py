"""The bench: counts what a step reads, says which kernel multiplies, and measures on any device."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import planish
from planish.bench import bandwidth_of, bench, bytes_read, dense, kinds
from planish.errors import PlanishError
from planish.kernels.linear import PackedLinear, packed_layers


@pytest.fixture
def packed(tiny_llama, tmp_path):
    planish.quantize_to(tiny_llama(), tmp_path / "q4", "rtn", "w4g32", device="cpu", layers=("down_proj=w8g32",))
    return planish.load(tmp_path / "q4", device="cpu")


def test_measures_and_says_what(packed):
    found = bench(packed, batches=(1, 2), prompt=4, new=3, speed_of_memory=1e9)
    assert [speed.batch for speed in found.speeds] == [1, 2] and not found.captured
    for speed in found.speeds:
        assert speed.first > 0 and speed.rate > 0
        assert speed.share == pytest.approx(speed.rate / speed.batch * found.weights / 1e9)
    lines = found.lines()
    assert any("q_proj" in line and "64 x 64" in line and "w4g32" in line for line in lines)
    assert any("tokens/s" in line and line.startswith("batch   2") for line in lines) and "peak memory" in lines[-1]
    assert found.figures()["speeds"][0]["batch"] == 1 and "torch" in found.figures()["versions"]


def test_a_kind_of_layer_is_one_line_with_its_kernel(packed):
    lines = kinds(packed, 1)
    assert len(lines) == 8 and lines[0].startswith("   2 x self_attn.q_proj")
    assert lines[0].split()[-1] in ("cpu", "reference")
    assert lines[-1].split()[-2:] == ["bfloat16", "dense"]
    for layer in packed_layers(packed).values():
        layer.to_records()
    assert kinds(packed, 1)[0].endswith("cuda_gemv") and kinds(packed, 32)[0].endswith("cuda_gemm")


def test_what_a_step_reads(packed, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.bfloat16)
    every = sum(parameter.nbytes for parameter in model.parameters())
    looked_up = model.model.embed_tokens.weight.nbytes
    assert bytes_read(model) == every - looked_up + sum(buffer.nbytes for buffer in model.buffers())
    model.tie_weights()
    model.lm_head.weight = model.model.embed_tokens.weight
    assert bytes_read(model) >= every - looked_up
    held = sum(buffer.nbytes for layer in packed_layers(packed).values() for buffer in layer.buffers())
    assert bytes_read(packed) > held


def test_the_same_model_in_16_bits(packed):
    ids = torch.arange(6)[None]
    expected = packed(ids).logits
    made = dense(packed)
    assert made is packed and not any(isinstance(part, PackedLinear) for part in made.modules())
    torch.testing.assert_close(made(ids).logits, expected, rtol=0.05, atol=0.05)


def test_bandwidth_is_positive():
    assert bandwidth_of(torch.device("cpu")) > 1e8


def test_refusals(packed):
    for wrong in ({"batches": (0,)}, {"prompt": 0}, {"new": 1}):
        with pytest.raises(PlanishError, match="count from 1, and --new from 2"):
            bench(packed, **wrong)
