"""A step's own attention: the same logits as sdpa's, for families; no mask where none is needed; put back after."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import and_masks, causal_mask_function

from planish import attend
from planish.decode import Decoder

# the compiler's own use of torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
PROMPTS = torch.arange(14).view(2, 7)
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture
def anywhere(monkeypatch):
    """As on a GPU, but by the op's definition."""
    monkeypatch.setattr(attend, "supports", lambda *given: True)


def tiny(family, **others):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | others)).eval()


def logits_of(model, steps=4, **ways):
    """Of some steps, whose tokens are given; the decoder too."""
    decoder, logits = Decoder(model, 2, 20, compiled=True, **ways), []
    decoder.start(PROMPTS)
    decoder._picked = lambda found: logits.append(found) or torch.full((2, 1), 5)
    decoder.advance(steps)
    return torch.stack(logits), decoder


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "granite"])
def test_families_give_the_same(family, anywhere):
    torch._dynamo.reset()
    model = tiny(family, **({"sliding_window": None} if family in ("mistral", "phi3") else {}))
    expected, decoder = logits_of(model, one_query=False)
    kept, before = decoder.cache, torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found, decoder = logits_of(model)
    assert decoder._compiled._own
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1  # of two blocks
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32, sums in another order
    assert model.config._attn_implementation == "sdpa"
    for layer, other in zip(decoder.cache.layers, kept.layers, strict=True):
        assert layer.cumulative_length.item() == other.cumulative_length.item() == 7 + 4
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-5)


def test_a_mask_that_is_not_plainly_causal_is_kept(anywhere, monkeypatch):
    model = tiny("llama")
    given = {"batch_size": 1, "q_length": 1, "kv_length": 8, "q_offset": 5, "allow_is_causal_skip": False}
    assert attend._mask(mask_function=causal_mask_function, **given) is None
    late = and_masks(causal_mask_function, lambda batch, head, query, key: key >= 3)
    assert attend._mask(mask_function=late, **given).flatten().tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    # a model that asks for such a one gives what it gives by sdpa
    torch._dynamo.reset()
    expected, _ = logits_of(model, one_query=False)
    monkeypatch.setattr(attend, "causal_mask_function", late)  # so that none is known as plain
    torch._dynamo.reset()
    found, _ = logits_of(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_taken_only_where_it_can_be(anywhere):
    for implementation, taken in (("sdpa", True), ("eager", False)):
        model = tiny("llama")
        model.set_attn_implementation(implementation)
        _, decoder = logits_of(model, 1)
        assert decoder._compiled._own is taken and model.config._attn_implementation == implementation


def test_not_taken_without_a_kernel():
    assert logits_of(tiny("llama"), 1)[1]._compiled._own is False
