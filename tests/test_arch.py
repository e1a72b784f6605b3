"""Arch is found by structure, in any model, on meta; what it can't hold is refused by name."""

import pytest
import torch
import transformers
from torch import nn

from planish.arch import discover, linears
from planish.errors import PlanishError

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 64, "head_dim": 16}


def _on_meta(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma3Text", "Phi3"])
def test_decoder_families(family: str) -> None:
    model = _on_meta(getattr(transformers, f"{family}Config")(**TINY, pad_token_id=0))
    arch = discover(model)
    assert (arch.blocks, arch.num_blocks) == ("model.layers", 3)
    assert (arch.embedding, arch.head) == ("model.embed_tokens", "lm_head")
    assert set(arch.outside) >= {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}
    assert arch.block(2) == "model.layers.2"


def test_linears_are_those_of_the_blocks_in_order() -> None:
    model = _on_meta(transformers.LlamaConfig(**TINY))
    found = linears(discover(model), model)
    one = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
           "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
           "mlp.down_proj": (32, 48)}
    expected = [(f"model.layers.{i}.{name}", shape) for i in range(3) for name, shape in one.items()]
    assert list(found.items()) == expected


def test_opt_has_its_blocks_elsewhere() -> None:
    config = transformers.OPTConfig(vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
                                    num_hidden_layers=2, num_attention_heads=2)
    arch = discover(_on_meta(config))
    assert arch.blocks == "model.decoder.layers" and arch.embedding == "model.decoder.embed_tokens"
    assert "model.decoder.embed_positions" in arch.outside


def test_multimodal_chooses_the_language_model() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config={**TINY, "num_hidden_layers": 2}, vision_config=vision)
    model = _on_meta(config)
    arch = discover(model)
    assert arch.blocks == "model.language_model.layers"
    covered = {name for part in arch.outside for name, _ in model.get_submodule(part).named_parameters(part)}
    covered |= {name for name, _ in model.get_submodule(arch.blocks).named_parameters(arch.blocks)}
    assert {name for name, _ in model.named_parameters()} <= covered


def test_a_larger_vision_tower_is_not_chosen() -> None:
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**TINY),
                                      vision_config=transformers.CLIPVisionConfig(**vision))
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    arch = discover(model)
    tower, language = model.model.vision_tower, model.model.language_model
    assert sum(p.numel() for p in tower.parameters()) > sum(p.numel() for p in language.parameters())
    assert (arch.blocks, arch.num_blocks, arch.head) == ("model.language_model.layers", 3, "lm_head")
    assert arch.decoder == "model.language_model"
    assert set(arch.around) == {f"{arch.decoder}.{name}" for name in ("embed_tokens", "norm", "rotary_emb")}
    assert {"model.vision_tower", "model.multi_modal_projector", "lm_head"} == set(arch.outside) - set(arch.around)


def test_a_tower_as_near_as_the_blocks_reads_pixels() -> None:
    # GIT keeps its image encoder beside the text's layers, in the module that holds the embedding
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    arch = discover(_on_meta(transformers.GitConfig(**text, vision_config=vision)))
    assert arch.blocks == "git.encoder.layer" and arch.num_blocks == 2


def test_packed_layers_stand_for_linears() -> None:
    class Packed(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.out_features, self.in_features = layer.out_features, layer.in_features

    model = _on_meta(transformers.LlamaConfig(**TINY))
    expected = discover(model)
    for name in linears(expected, model):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, Packed(layer))
    assert discover(model, packed=Packed) == expected and linears(expected, model) == {}
    with pytest.raises(PlanishError, match="no recognisable blocks"):
        discover(model)


def test_a_convolution_is_no_expert() -> None:
    settings = TINY | {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    config = transformers.Lfm2Config(**settings)
    assert discover(_on_meta(config)).num_blocks == 2


def test_no_blocks_names_the_class() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])

    with pytest.raises(PlanishError, match="Flat has no recognisable blocks"):
        discover(Flat())  # type: ignore[arg-type]


def test_blocks_without_linears_are_no_blocks() -> None:
    model = _on_meta(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64))  # Conv1D
    with pytest.raises(PlanishError, match="GPT2LMHeadModel has no recognisable blocks"):
        discover(model)
