"""PackedEmbedding gives rows of W_hat, its tied head the products with them."""

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import planish
from planish.errors import PlanishError
from planish.kernels.embedding import PackedEmbedding, PackedHead
from planish.kernels.pack import Packed
from planish.quant import Quantizer
from planish.scheme import Scheme
from planish.tables import quantize_table, table_schemes

IDS = torch.tensor([[3, 0, 7], [7, 7, 1]])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_products(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    q = Quantizer(weight, Scheme(bits=bits, group_size=32)).quantize(weight)
    table = PackedEmbedding(Packed.from_qtensor(q), 1.0, torch.float32).to(dtype)
    wanted = q.dequantize(dtype)
    assert torch.equal(table(IDS), wanted[IDS]) and table.weight.dtype == dtype
    hidden = torch.randn(2, 40).to(dtype)
    assert torch.allclose(PackedHead(table)(hidden), nn.functional.linear(hidden, wanted), rtol=2e-2, atol=2e-2)
    assert set(table.state_dict()) == {"codes", "scale"}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_with_scaled_embeddings_computes_the_same(bits: int) -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    quantized = planish.quantize(model, "rtn", "w8g32", embeddings=bits, device="cpu")
    assert isinstance(quantized.get_input_embeddings(), PackedEmbedding)
    plain = planish.quantize(model, "rtn", "w8g32", device="cpu")
    weight = model.get_input_embeddings().weight.detach()
    table = quantize_table(weight, Scheme(bits=bits, group_size=32)).dequantize(torch.float32)
    plain.get_input_embeddings().weight.data.copy_(table)
    ids = torch.arange(12)[None]
    assert torch.allclose(quantized(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    assert quantized.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_a_head_of_its_own_is_quantized_too() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = planish.quantize(LlamaForCausalLM(config), "rtn", "w8g32", embeddings=8, device="cpu")
    assert str(model.lm_head.scheme) == "w8g32" and model(IDS).logits.isfinite().all()
    with pytest.raises(PlanishError, match="e2e_qp needs the embedding in 16 bits; quantize it last"):
        planish.prepare(model, "e2e_qp")


def test_refusals() -> None:
    shapes = {"model.embed_tokens": (96, 64)}
    with pytest.raises(PlanishError, match="embeddings of 5 bits; use one of 4, 8, 16"):
        table_schemes(5, shapes, "native")
    with pytest.raises(PlanishError, match="model.embed_tokens: gptq holds embeddings in 16 bits only; use --format"):
        table_schemes(8, shapes, "gptq")
    assert table_schemes(16, shapes, "gptq") == {}
