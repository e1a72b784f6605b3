"""Decoding: the tokens that transformers' own generate gives, by steps of ours; ends, sampling, and who can't."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
)

import planish
from planish.decode import Decoder, decodes, generate
from planish.kernels.linear import packed_layers

# the compiler's own use of torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def folder(tiny_llama, tmp_path):
    planish.quantize_to(tiny_llama(), tmp_path / "q4", "rtn", "w4g32", device="cpu")
    return tmp_path / "q4"


@pytest.fixture
def dense(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.bfloat16).eval()


PROMPTS = torch.arange(14).view(2, 7)


def theirs(model, new, **options):
    return model.generate(
        PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )


def test_gives_what_transformers_gives(dense, folder):
    for model in (dense, planish.load(folder, device="cpu")):
        model.generation_config.eos_token_id = None
        assert decodes(model) and torch.equal(planish.generate(model, PROMPTS, new_tokens=40), theirs(model, 40))
        assert torch.equal(generate(model, PROMPTS, new_tokens=1), theirs(model, 1))


def test_gives_the_same_as_records(folder, held_as_records):
    model = planish.load(folder, device="cpu")
    layers = packed_layers(model).values()
    assert all(layer.records is not None and layer.codes is None for layer in layers)
    assert sum(layer.siblings is not None for layer in layers) == 10
    model.generation_config.eos_token_id = None
    assert torch.equal(generate(model, PROMPTS, new_tokens=12), theirs(model, 12))


def test_compiled_blocks_are_compiled_once_for_all(dense, folder, held_as_records):
    torch._dynamo.reset()
    for model in (planish.load(folder, device="cpu"), dense):
        model.generation_config.eos_token_id = None
        plain, compiled = Decoder(model, 2, 20), Decoder(model, 2, 20, compiled=True)
        logits, before = [], torch._dynamo.utils.counters["stats"]["unique_graphs"]
        blocks = list(model.model.layers)
        for decoder in (plain, compiled):
            decoder.start(PROMPTS)
            decoder._picked = lambda found, kept=logits: kept.append(found) or torch.full((2, 1), 5)
            decoder.advance(3)
        torch.testing.assert_close(torch.stack(logits[3:]), torch.stack(logits[:3]), rtol=0.05, atol=0.05)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1  # of two blocks
        assert list(model.model.layers) == blocks


def test_rows_end_by_themselves(dense):
    dense.generation_config.eos_token_id = None
    free = generate(dense, PROMPTS, new_tokens=60)
    first, second = free[0, 7 + 3].item(), free[1, 7 + 9].item()
    dense.generation_config.eos_token_id, dense.generation_config.pad_token_id = [first, second], 7
    assert torch.equal(
        generate(dense, PROMPTS, new_tokens=60),
        dense.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_new_tokens=60, do_sample=False),
    )


def test_sampling_repeats_by_its_seed_and_follows_the_chances(dense):
    dense.generation_config.eos_token_id = None
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(generate(dense, PROMPTS, new_tokens=12, temperature=1.5))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])
    decoder = Decoder(dense, 1, 8, temperature=0.5)
    logits = torch.tensor([[0.0, 0.5, -1e9, 1.0]]).expand(20_000, -1)
    found = torch.bincount(decoder._picked(logits)[:, 0], minlength=4) / 20_000
    torch.testing.assert_close(found, torch.softmax(logits[0] / 0.5, 0), rtol=0, atol=0.02)


def test_a_decoder_takes_one_prompt_after_another(dense):
    for compiled in (False, True):
        decoder = Decoder(dense, 2, 30, compiled=compiled)
        answers = []
        for prompts in (PROMPTS, PROMPTS + 3, PROMPTS):
            decoder.start(prompts)
            decoder.advance(5)
            answers.append(decoder.tokens[:, :6].clone())
        assert torch.equal(answers[0], answers[2]) and not torch.equal(answers[0], answers[1])


def test_models_without_a_plain_cache_go_through_their_own_generate():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": None}
    attention = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
                 "sliding_window": 4}  # fmt: skip
    torch.manual_seed(0)
    for model in (
        Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **attention, layer_types=["sliding_attention", "full_attention"])),
        MambaForCausalLM(MambaConfig(**sizes, state_size=4)),
    ):
        model.eval()
        assert not decodes(model) and not decodes(model, compiled=True)
        assert torch.equal(generate(model, PROMPTS, new_tokens=4)[:, :7], PROMPTS)


def test_transformers_compiles_a_model_of_records_whole(folder, held_as_records):
    model = planish.load(folder, device="cpu")
    model.generation_config.eos_token_id = None
    config = CompileConfig(backend="aot_eager", fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = theirs(model, 6, cache_implementation="static", compile_config=config)
    assert torch.equal(found, theirs(model, 6))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_is_one_graph_on_a_gpu(folder, dense, compiled):
    for model in (planish.load(folder, device="cuda"), dense.cuda()):
        prompts = PROMPTS.cuda()
        model.generation_config.eos_token_id = None
        decoder = Decoder(model, 2, 40, compiled=compiled)
        for _ in range(2):
            decoder.start(prompts)
            decoder.advance(20)
            found = torch.cat([prompts, decoder.tokens[:, :21]], 1)
        assert decoder.captured
        expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=21, do_sample=False)
        assert (found == expected)[:, :10].float().mean() >= 0.9  # near ties may fall the other way


@pytest.mark.gpu
@needs_gpu
def test_overlap_changes_nothing_on_a_gpu(tiny_llama, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 64, "num_attention_heads": 16}
    planish.quantize_to(tiny_llama(**sizes), tmp_path / "q", "rtn", "w4g32", device="cpu")
    model = planish.load(tmp_path / "q", device="cuda")
    model.generation_config.eos_token_id = None
    for one_query in (False, True):
        answers = []
        for overlap in (False, True, True):
            decoder = Decoder(model, 2, 200, compiled=True, overlap=overlap, one_query=one_query)
            decoder.start(PROMPTS.cuda())
            decoder.advance(150)
            assert decoder.captured
            answers.append(decoder.tokens.clone())
        assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
