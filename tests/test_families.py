"""Families of models, tiny and random: their edges are found without naming one, and the laws hold for each.

Law 4: a transform preserves the model. Laws 1, 2 and 5: what OmniQuant fits is what is written, loaded and run, and
no fit is worse than where it started.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import planish
from planish.arch import discover
from planish.edges import find_edges, proposals
from planish.errors import PlanishError
from planish.experts import unfuse
from planish.log import Event
from planish.quant.hadamard import turn
from planish.source import open_source
from planish.stream import record
from planish.transform import Rotate, Smooth

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64}
GEMMA = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EVERY = ["norm", "norm", "query", "value"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# family -> settings, and the kinds of edges that its blocks have
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": ({}, EVERY),
    "mistral": ({}, EVERY),
    "qwen2": ({}, EVERY),
    "qwen3": ({"head_dim": 16}, EVERY),
    "gemma3_text": (GEMMA, EVERY),
    "phi3": ({}, EVERY),
    "opt": (OPT, EVERY),
    "falcon": ({"alibi": False}, ["norm", "query", "value"]),
    "gpt_neox": ({"rotary_pct": 0.5}, ["norm", "norm", "value"]),
    "mixtral": ({"num_local_experts": 4}, EVERY),
    "qwen2_moe": ({**MOE, "shared_expert_intermediate_size": 64}, EVERY),
    "qwen3_moe": ({**MOE, "head_dim": 16}, EVERY),
}
IDS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(family: str, **settings: Any) -> Any:
    """A tiny random model, norms and biases too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, ({}, []))[0], **settings})
    how = {"attn_implementation": "sdpa", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)


def apart(family: str, **settings: Any) -> Any:
    """The same with fused experts taken apart, as a source gives it."""
    return unfuse(tiny(family, **settings))


def run(block: nn.Module, hidden: Tensor, **arguments: Any) -> Tensor:
    output = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def edges_of(model: Any, index: int = 0) -> tuple[nn.Module, list]:
    arch = discover(model)
    blocks = model.get_submodule(arch.blocks)
    hidden, arguments = record(model.get_submodule(arch.decoder), blocks, IDS[:1], every_block=True)
    return blocks[index], find_edges(blocks[index], hidden, arguments[index], run)


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_are_discovered(family: str) -> None:
    for index in range(2):
        _, edges = edges_of(apart(family), index)
        assert sorted(edge.kind for edge in edges) == FAMILIES[family][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_are_proposed_without_weights(family: str) -> None:
    model = apart(family)
    arch = discover(model)
    blocks = model.get_submodule(arch.blocks)
    hidden, arguments = record(model.get_submodule(arch.decoder), blocks, IDS[:1, :2], every_block=True)
    found = proposals(copy.deepcopy(blocks[0]).to("meta"), hidden.to("meta"), arguments[0], run)
    # half-rotated queries are proposed, and held against the block they would fall
    fallen = ["query"] if family == "gpt_neox" else []
    assert sorted(choices[0].kind for choices in found) == sorted(FAMILIES[family][1] + fallen)


@pytest.mark.parametrize("family", FAMILIES)
def test_law_4_smoothing_preserves_the_model(family: str) -> None:
    model = apart(family).double()
    start = model(IDS, use_cache=False).logits
    extremes = {
        name: (-torch.rand(part.in_features), 3 * torch.rand(part.in_features))
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear)
    }
    arch = discover(model)
    for index in range(arch.num_blocks):
        block, edges = edges_of(model, index)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        smoothed = Smooth(always=True).attach(arch.block(index), block, edges, extremes)
        with torch.no_grad():
            for parameter in smoothed.parameters:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        seen = model(IDS, use_cache=False).logits
        folded = smoothed.fold()
        assert any(name.endswith("norm.weight") or "layernorm" in name for name in folded)
        assert torch.equal(model(IDS, use_cache=False).logits, seen), "folded as it was seen"
        # norms compute in fp32 inside
        torch.testing.assert_close(seen, start, rtol=1e-5, atol=1e-5 * float(start.abs().max()))
        assert all(bool((value != before[name]).any()) for name, value in folded.items() if name.endswith("weight"))


def test_grouped_queries_share_and_rope_ties_pairs() -> None:
    _, edges = edges_of(tiny("llama"))
    sizes = {edge.kind: edge.size for edge in edges if edge.kind != "norm"}
    assert sizes == {"value": 32, "query": 16}
    _, edges = edges_of(tiny("qwen3"))
    (query,) = (edge for edge in edges if edge.kind == "query")
    assert query.size == 8 and {move.module for move in query.moves} == {"self_attn.q_norm", "self_attn.k_norm"}
    _, edges = edges_of(tiny("opt"))
    assert all(edge.shifts for edge in edges if edge.kind != "query") and {64} == {edge.size for edge in edges}


def test_without_edges_the_block_is_named() -> None:
    model = tiny("llama")
    block, edges = edges_of(model)
    with pytest.raises(PlanishError, match="model.layers.0: no norm is found that feeds linears only"):
        Smooth().attach("model.layers.0", block, [], {})
    assert Smooth(strict=False).attach("model.layers.0", block, [], {}).parameters == []
    with pytest.raises(PlanishError, match="no edge 'nrom': did you mean 'norm'"):
        Smooth(sites=("nrom",))
    with pytest.raises(PlanishError, match="alpha=2 isn't a share"):
        Smooth(alpha=2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w3g32", "w4a4asym"])
def test_laws_1_2_and_5_hold_for_the_family(tmp_path: Path, family: str, scheme: str) -> None:
    model, events = tiny(family), list[Event]()
    ids = torch.randint(1, 64, (12, 16), generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"data": ids, "samples": 12, "seqlen": 16, "device": "cpu", "steps": 12, "holdout": 3}
    asked |= {"let": True, "span": 1, "alpha": 0.5}  # random models have no outliers
    made = planish.quantize(model, "omniquant", scheme, progress=events.append, **asked)
    fitted = [(event.before, event.after) for event in events if event.before is not None]
    assert len(fitted) == 2 and all(after <= before for before, after in fitted if after is not None)
    planish.save(made, tmp_path / "saved")
    planish.quantize_to(model, tmp_path / "written", "omniquant", scheme, **asked)
    wanted = made(IDS, use_cache=False).logits
    for folder in ("saved", "written"):
        loaded: Any = planish.load(tmp_path / folder, device="cpu")
        assert torch.equal(loaded(IDS, use_cache=False).logits, wanted)
    # what the fit measured is what the model computes: hidden states of the last block would be nearer, logits do
    start = planish.quantize(model, "rtn", scheme, device="cpu")
    given, was, truth = (m(ids, use_cache=False).logits for m in (made, start, model))
    assert (given - truth).square().mean() < (was - truth).square().mean()
    generated = [m.generate(IDS[:1], max_new_tokens=4, do_sample=False) for m in (made, loaded)]
    assert torch.equal(*generated)


TURN = {"llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen2_moe", "qwen3_moe"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_law_4_rotation_preserves_the_model_or_is_refused(family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    if family not in TURN:
        with pytest.raises(PlanishError, match="can't be rotated|and one is needed to rotate"):
            Rotate().of(open_source(model))
        return
    source = Rotate().of(open_source(model.double()))
    assert source.turns.rows, "each head's values are turned, in a fused linear too"
    turned = source.skeleton()
    source.load(turned, "", "cpu", torch.float64)
    wanted = model(IDS, use_cache=False).logits
    torch.testing.assert_close(turned(IDS).logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    arch = discover(turned)
    before, after = (m.get_parameter(f"{arch.embedding}.weight") for m in (model, turned))
    assert not torch.equal(before, after) and ("no longer tied" in source.note) == tied


def test_rotation_goes_before_any_recipe(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    ids = torch.randint(1, 64, (12, 16), generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"data": ids, "samples": 12, "seqlen": 16, "device": "cpu", "steps": 8}
    made = planish.quantize(model, "rotate+omniquant", "w4a4", rotation_seed=3, **asked)
    planish.quantize_to(model, tmp_path / "out", "rotate+omniquant", "w4a4", rotation_seed=3, **asked)
    loaded: Any = planish.load(tmp_path / "out", device="cpu")
    assert torch.equal(loaded(IDS).logits, made(IDS).logits) and not loaded.config.tie_word_embeddings
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(PlanishError, match="rounds nothing; let another follow it, as rotate[+]rtn"):
        planish.quantize(model, "rotate", "w4a4", device="cpu")


@pytest.mark.parametrize("size", [1, 2, 16, 12, 28, 72, 576, 896, 1536, 5120, 43 * 8])
def test_turning_is_orthogonal(size: int) -> None:
    eye = torch.eye(size, dtype=torch.float64)
    matrix = turn(eye)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-9)
    if size != 43 * 8:  # no core is known: blocks of 8 are turned
        assert float(matrix.abs().max() - matrix.abs().min()) < 1e-9


def test_turned_inputs_are_stored_and_loaded(tmp_path: Path) -> None:
    model = tiny("llama")
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    ids = torch.randint(1, 64, (12, 16), generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"data": ids, "samples": 12, "seqlen": 16, "device": "cpu"}
    asked["layers"] = ["down_proj=w4a4h"]
    planish.quantize_to(model, tmp_path / "out", "rtn", "w4a4", search=True, **asked)
    loaded: Any = planish.load(tmp_path / "out", device="cpu")
    assert any(loaded.get_submodule(name).activations.turned for name in names)
    made = planish.quantize(model, "rtn", "w4a4", search=True, **asked)
    assert torch.equal(made(IDS).logits, loaded(IDS).logits)
