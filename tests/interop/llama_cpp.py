"""Does llama.cpp run the GGUFs that Planish writes? Write them, load each in llama-cpp-python, compare logits.

    python tests/interop/llama_cpp.py MODEL [--python FILE | --environments DIR] [--results FILE] [--only TEXT]

Each case quantizes MODEL, writes a GGUF, and compares llama.cpp with our own linears in float32:

- Blocks: the first layer of each type in the file, decoded by ggml's own C code, has our weights bit for bit.
- Logits for a fixed prompt: norm of the difference over norm. llama.cpp rounds what enters a quantized linear to 8
  bits, in blocks of 32 or 256; that alone moves our own logits by "of_8_bit_activations", and the difference may be
  twice that. Where nothing is quantized the case states its tolerance.
- Tokens of some awkward texts are transformers' own.

Exit status 1 if a case fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import planish
from planish.folder import QuantizedFolder
from planish.formats import FORMATS
from planish.formats.gguf import KINDS, type_of
from planish.gguf_file import tensor_places, types_of, write_gguf
from planish.qtensor import QTensor
from planish.scheme import Scheme
from planish.source import FolderSource

PACKAGE = "llama-cpp-python==0.3.36"
PROMPT = "A smith who planishes a sheet of metal strikes it many times, lightly, so that"
TEXTS = (
    PROMPT,
    "I'VE 3 times 1234567 =  3,703,701;\tit's  \n\n\n  fine... we'll see!!\r\n",
    "def f(x):\n    return x**2  # Fläche in m²\n",
    "Größe, naïve café, смит, 鍛冶屋, 🔨🔥, مطرقة",
    " leading and trailing ",
)
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One file; scheme None is the model as it is, in `dtype`, and may differ by `tolerance`."""

    scheme: str | None
    embeddings: str = "f16"
    types: str = "smallest"
    tolerance: float = 0.0
    dtype: str = "bfloat16"
    recipe: str = "rtn"
    keys: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = f"{self.recipe} {self.scheme}" if self.scheme else self.dtype
        return f"{what}, {self.embeddings} embeddings, {self.types} types"


FLOAT = [Case(None, dtype="float32", tolerance=1e-3), Case(None, embeddings="bf16", tolerance=2e-2)]
CASES = {
    "llama": [
        *FLOAT,
        *(Case(scheme) for scheme in ("w4g64", "w3g64", "w2g64", "w4g64asym", "w3g64asym", "w2g64asym", "w8g64")),
        Case("w4g64", embeddings="q8_0"),
        Case("w4g64", embeddings="q4_0"),
        Case("w2g64", types="compatible"),
        Case("w2g64", recipe="signround", keys={"steps": 3}),
        # rows of 576 have no blocks of 256
        Case("w3g16k", recipe="signround", keys={"steps": 3}, layers=("self_attn|gate_proj|up_proj=w4g32",)),
    ],
    "gemma3_text": [
        *FLOAT,
        *(Case(scheme) for scheme in ("w4g128", "w3g128", "w2g128", "w3pc", "w4g128asym")),
    ],
}


def environment(root: Path) -> Path:
    """Python of an environment with llama-cpp-python, built if it isn't there yet (half an hour on two cores)."""
    python = root / "llama-cpp-python" / "bin" / "python"
    done = python.parents[1] / "complete"
    if not done.exists():
        print(f"building {PACKAGE} …", flush=True)
        venv.create(python.parents[1], with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", PACKAGE], check=True)
        done.touch()
    return python


def written(case: Case, model: Path, scratch: Path) -> tuple[QuantizedFolder, Path]:
    """The quantized folder and its GGUF."""
    if case.scheme is None:
        plain = scratch / "plain"
        plain.mkdir()
        for file in model.iterdir():
            (plain / file.name).symlink_to(file.resolve())
        config = json.loads((plain / "config.json").read_text()) | {"dtype": case.dtype}
        (plain / "config.json").unlink()
        (plain / "config.json").write_text(json.dumps(config))
        source = FolderSource(plain, label=str(plain))
        folder = QuantizedFolder(source=source, format=FORMATS["native"], schemes={}, shapes={}, tables={},
                                 embedding="model.embed_tokens")  # fmt: skip
    else:
        out = scratch / "quantized"
        planish.quantize_to(str(model), out, case.recipe, case.scheme, format="native", samples=4, seqlen=64,
                            device="cpu", layers=case.layers, **case.keys)  # fmt: skip
        found = QuantizedFolder.open(out)
        assert found is not None
        folder = found
    return folder, write_gguf(folder, scratch / "model.gguf", embeddings=case.embeddings, types=case.types)


class Rounded(nn.Module):
    """A linear whose input is rounded to 8 bits in blocks, as llama.cpp does before it multiplies quantized weights."""

    def __init__(self, linear: nn.Linear, block: int) -> None:
        super().__init__()
        self.linear, self.block = linear, block

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, self.block))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        levels = (blocks / step.clamp(min=1e-30)).round()
        if self.block == 32:  # larger blocks keep their step in float32
            step = step.half().float()
        return self.linear((levels * step).flatten(-2))


def install(model: nn.Module, folder: QuantizedFolder) -> None:
    """Give a float model the folder's weights."""
    for name, q in folder.layers():
        model.get_submodule(name).weight.data = q.dequantize()
    for name in (key for key in folder.source.names() if key.endswith("norm.weight")):
        model.get_parameter(name).data.copy_(folder.source.get(name))


def logits_of(model: nn.Module, ids: list[int]) -> Tensor:
    """[tokens, vocabulary]"""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def round_inputs(model: nn.Module, kinds: dict[str, str]) -> None:
    """Round what enters the quantized linears."""
    for name, kind in kinds.items():
        model.set_submodule(name, Rounded(model.get_submodule(name), 256 if kind == "Q3_K" else 32))


def place_of(path: Path, name: str, kind: str) -> list[Any]:
    """[type, offset, bytes, weights] of a tensor of the file."""
    _, shape, offset = tensor_places(path)[name]
    weights = shape[0] * shape[1]
    return [
        kind.replace("_k", "_K"),
        offset,
        weights // KINDS[kind.upper()].weights * KINDS[kind.upper()].bytes,
        weights,
    ]


def theirs(
    python: Path, path: Path, ids: list[int], blocks: list[list[Any]]
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    """llama.cpp's logits, its values of some blocks, its tokens of TEXTS, and what it goes on to write."""
    asked, out = path.with_suffix(".json"), path.with_suffix(".npy")
    asked.write_text(json.dumps({"ids": ids, "texts": TEXTS, "new": 16, "blocks": blocks}))
    command = [python, "-I", HERE / "llama_cpp_client.py", path, asked, out]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or [f"exit {result.returncode}"])[-1])
    values = [torch.from_numpy(np.load(f"{out}.{index}.npy")) for index in range(len(blocks))]
    return torch.from_numpy(np.load(out)), values, json.loads(result.stdout)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def samples_of(folder: QuantizedFolder, kinds: dict[str, str]) -> dict[str, QTensor]:
    """The first layer of each type whose rows keep their order, by the middle of its name in the file."""
    names = {"down_proj": "ffn_down", "up_proj": "ffn_up", "o_proj": "attn_output"}
    first: dict[str, str] = {}
    for layer, kind in kinds.items():
        if layer.rpartition(".")[2] in names:
            first.setdefault(kind, layer)
    some = replace(folder, schemes={layer: folder.schemes[layer] for layer in first.values()})
    return {f"blk.{layer.split('.')[2]}.{names[layer.rpartition('.')[2]]}.weight": q for layer, q in some.layers()}


def run(case: Case, path: Path, python: Path) -> dict[str, Any]:
    """One case's figures."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(PROMPT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = written(case, path, Path(scratch))
        kinds = types_of(folder, case.types)
        samples = samples_of(folder, kinds)
        shared = case.scheme is not None and Scheme.parse(case.scheme).shared
        blocks = [
            place_of(file, name, type_of(name, q, case.types, shared and q.group_size == 16).lower())
            for name, q in samples.items()
        ]
        coarse = case.embeddings in ("q8_0", "q4_0")
        if coarse:
            blocks.append(place_of(file, "token_embd.weight", case.embeddings))
        logits, values, said = theirs(python, file, ids, blocks)
        install(model, folder)
        size = file.stat().st_size
    if coarse:  # the embedding as it is in the file
        model.get_input_embeddings().weight.data = values.pop().view_as(model.get_input_embeddings().weight)
        model.tie_weights()
        kinds["lm_head"] = case.embeddings.upper()
    ours = [q.dequantize().flatten() for q in samples.values()]
    plain = logits_of(model, ids)
    round_inputs(model, kinds)
    return {
        "relative": distance(logits, plain),
        "of_8_bit_activations": distance(logits_of(model, ids), plain),
        "same_blocks": all(map(torch.equal, values, ours)),
        "same_top_token": float((logits.argmax(-1) == plain.argmax(-1)).float().mean()),
        "same_tokens": said["tokens"] == [tokenizer(text)["input_ids"] for text in TEXTS],
        "text": said["text"],
        "types": dict(Counter(kinds.values())),
        "bytes": size,
    }


def passed(case: Case, figures: dict[str, Any]) -> bool:
    if "error" in figures:
        return False
    allowed = max(case.tolerance, 2 * figures["of_8_bit_activations"])
    return figures["relative"] <= allowed and figures["same_blocks"] and figures["same_tokens"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare llama.cpp's logits with ours.")
    parser.add_argument("model", type=Path, help="folder of an unquantized Llama or Gemma 3 whose sizes 64 divides")
    parser.add_argument("--python", type=Path, help="of an environment that has llama-cpp-python")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "planish-interop")
    parser.add_argument("--results", type=Path, default=Path(f"benchmarks/results/gguf-{date.today()}.json"))
    parser.add_argument("--only", default="", help="run the cases whose description contains this text")
    asked = parser.parse_args()
    disable_progress_bar()
    python = asked.python or environment(asked.environments)
    kind = json.loads((asked.model / "config.json").read_text())["model_type"]
    report = json.loads(asked.results.read_text()) if asked.results.exists() else {
        "command": "python tests/interop/llama_cpp.py MODEL", "date": str(date.today()), "client": PACKAGE,
        "torch": torch.__version__, "transformers": version("transformers"), "prompt": PROMPT, "models": {},
    }  # fmt: skip
    results = []
    for case in (case for case in CASES[kind] if asked.only in str(case)):
        try:
            figures = run(case, asked.model, python)
        except RuntimeError as error:
            figures = {"error": str(error)}
        results.append({"case": asdict(case), **figures, "passed": passed(case, figures)})
        print(f"{'ok  ' if passed(case, figures) else 'FAIL'} {case}: {figures}", flush=True)
    report["models"][asked.model.resolve().name] = results
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    asked.results.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    failed = sum(not result["passed"] for result in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return int(failed > 0 or not results)


if __name__ == "__main__":
    sys.exit(main())
