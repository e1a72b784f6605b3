"""Runs inside another toolkit's environment: load a checkpoint there, write its logits for a prompt.

    python client.py ROUTE FOLDER PROMPT LOGITS

ROUTE: `transformers` (AutoModelForCausalLM, the loader that config.json names), `auto-round-config` (the
same, a GPTQ checkpoint read by auto-round through AutoRoundConfig), `dequantize` (the same, compressed-tensors
turned into a plain model while it is loaded) or `gptqmodel` (its own loader).
PROMPT is JSON: {"ids": [...], "dtype": "float16"}. LOGITS is a safetensors file whose metadata name the
classes that stood in for the linears, and have a hash of the weight of each linear that is a plain one by then.
Knows nothing of Planish.
"""

import hashlib
import json
import sys
from collections import Counter

import torch
from safetensors.torch import save_file


def load(route: str, folder: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model in evaluation mode, on the CPU."""
    if route == "gptqmodel":
        from gptqmodel import GPTQModel

        return GPTQModel.load(folder, device="cpu", dtype=dtype).model.eval()
    from transformers import AutoModelForCausalLM, AutoRoundConfig, CompressedTensorsConfig

    configs = {"auto-round-config": AutoRoundConfig, "dequantize": lambda: CompressedTensorsConfig(dequantize=True)}
    config = {"quantization_config": configs[route]()} if route in configs else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **config).eval()


def main(route: str, folder: str, prompt: str, logits: str) -> None:
    with open(prompt, encoding="utf-8") as file:
        asked = json.load(file)
    torch.set_num_threads(2)
    model = load(route, folder, getattr(torch, asked["dtype"]))
    with torch.no_grad():
        output = model(torch.tensor([asked["ids"]])).logits[0]
    marks = ("qweight", "quantization_scheme")  # of GPTQ's kin, of compressed-tensors'
    packed = [module for module in model.modules() if any(hasattr(module, mark) for mark in marks)]
    kinds = Counter(type(module).__name__ for module in packed)
    weights = {
        name: hashlib.sha256(module.weight.detach().contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and getattr(module, "weight", None) is not None
    }
    found = {"layers": json.dumps(kinds), "weights": json.dumps(weights)}
    save_file({"logits": output.float().contiguous()}, logits, metadata=found)


if __name__ == "__main__":
    main(*sys.argv[1:])
