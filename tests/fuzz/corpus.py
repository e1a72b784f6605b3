"""Corpus: tiny valid checkpoints that the fuzzer mutates, one of every format that Planish writes, and others."""

import json
import warnings
from pathlib import Path

import gguf
import numpy
import torch
import transformers
from tokenizers import Tokenizer, models

import planish
from planish.errors import PlanishError
from planish.formats import FORMATS
from planish.log import RunManifest

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "max_position_embeddings": 64,
}
SCHEMES = {"native": "w3g24asym", "gptq": "w4g32", "auto_round": "w2g32asym"}
MANIFEST = RunManifest(
    model="it",
    recipe="rtn",
    keys={},
    scheme="w4g32",
    layers={},
    format="native",
    data="none",
    data_sha256="",
    samples=1,
    seqlen=8,
    seed=0,
    versions={"planish": "0"},
    figures={"seconds": 1.0},
).to_dict()
MIXED = ("native", "auto_round")


def make(folder: Path) -> dict[str, Path]:
    """Write the corpus; name -> the folder of a checkpoint, or of a .gguf file."""
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).to(torch.bfloat16)
    tied = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    gemma = transformers.Gemma3TextConfig(**SIZES, sliding_window=8)
    saved = {
        "plain": plain,
        "tied": transformers.AutoModelForCausalLM.from_config(tied),
        "gemma3": transformers.AutoModelForCausalLM.from_config(gemma),
    }
    for name, model in saved.items():
        model.save_pretrained(folder / name)
    plain.save_pretrained(folder / "sharded", max_shard_size="20KB")
    _tokenizer().save_pretrained(folder / "plain")
    for name in FORMATS:
        _quantized(plain, name, folder / name)
    _gguf(folder / "gguf" / "tiny.gguf")
    return {path.name: path for path in sorted(folder.iterdir())}


def _quantized(model: transformers.PreTrainedModel, name: str, out: Path) -> None:
    layers = ["down_proj=w4g32asym"] if name in MIXED else []
    quantized = planish.quantize(model, "rtn", SCHEMES.get(name, "w4g32"), layers=layers, device="cpu")
    try:
        planish.save(quantized, out, format=name)
        (out / "run.json").write_text(json.dumps(MANIFEST))
    except PlanishError as error:
        if "read only" not in str(error):
            raise


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocab = {letter: index for index, letter in enumerate("?~abcdefghijklmnopqrstuvwxyz")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="?")), eos_token="~"
    )


def _gguf(path: Path) -> None:
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", *(f"t{index}" for index in range(29))])
    writer.add_token_merges(["a b"])
    shapes = {
        "token_embd": (32, 32),
        "output": (32, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    random = numpy.random.default_rng(0)
    for name, shape in shapes.items():
        weight = random.standard_normal(shape, dtype=numpy.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn_gate" in name else None
        data = weight if kind is None else gguf.quants.quantize(weight, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quiet() -> None:
    """No warnings, no log lines, no progress bars: thousands of damaged files make many."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
