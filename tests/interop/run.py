"""Do other toolkits read what Planish writes? Write checkpoints, load each in its real client, compare logits.

    python tests/interop/run.py MODEL [--environments DIR] [--results FILE] [--only TEXT] [--group 128]
        [--bfloat16]

For each case: MODEL is quantized into a format, rounded to nearest or by a few steps of a method that trains,
loaded on the CPU by a client in an environment of its own, and the client's logits for a fixed prompt are
compared with ours (nn.Linear with the dequantized weights, same dtype, or the product by their transpose, which some
clients hold): norm of the difference over norm, at most 1e-2. A client that multiplies by plain weights must have ours,
bit for bit.
Environments are made on the first run (a few minutes; torch is installed first, from where pip finds it) and used
again.
Results are written as JSON; exit status 1 if a case that could be run differs.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import planish
from planish.folder import QuantizedFolder
from planish.qtensor import QTensor

TOLERANCE = 1e-2
PROMPT = "A smith who planishes a sheet of metal strikes it many times, lightly, so that"
TORCH, TRANSFORMERS = "torch==2.13.0", "transformers==5.23.0"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Client:
    """Another toolkit in its environment: what pip installs, one command after another; whether what it multiplies
    by are plain weights."""

    name: str
    installs: tuple[tuple[str, ...], ...]
    reports: tuple[str, ...]
    plain: bool = False


# gptqmodel asks for a newer torch than the one pinned, and works with it: so its needs are named one by one
CLIENTS = {
    client.name: client
    for client in (
        Client("auto-round", (("auto-round==0.16.1", TRANSFORMERS, "accelerate"),), ("auto-round", "transformers")),
        Client(
            "gptqmodel",
            (
                (TRANSFORMERS, "optimum==2.3.0", "accelerate", "setuptools", "wheel", "ninja", "maturin", "device-smi",
                 "threadpoolctl", "pypcre", "tokenicer", "logbar", "datasets", "torchao==0.18.0", "defuser",
                 "protobuf", "pillow", "jinja2", "dill", "requests"),
                ("--no-deps", "--no-build-isolation", "gptqmodel==7.7.0"),
            ),
            ("gptqmodel", "optimum", "transformers"),
        ),
        Client("compressed-tensors", (("compressed-tensors==0.20.0", TRANSFORMERS, "accelerate"),),
               ("compressed-tensors", "transformers"), plain=True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One checkpoint and who loads it; `through` is a dtype that the client rounds weights to before `dtype`, and
    `scales` one that it rounds scales to."""

    format: str
    scheme: str
    client: str
    route: str
    dtype: str = "float16"
    through: str | None = None
    scales: str | None = None
    layers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    recipe: str = "rtn"
    keys: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        extra = " ".join(["", *self.layers, *(f"-{pattern}" for pattern in self.ignore)])
        return f"{self.recipe} {self.format} {self.scheme}{extra} by {self.client} ({self.route}, {self.dtype})"


CASES = [
    *(Case("auto_round", scheme, "auto-round", "transformers")
      for scheme in ("w4g64", "w3g64", "w2g64", "w4g64asym", "w3g64asym", "w2g64asym", "w8g64", "w4pc")),
    Case("auto_round", "w3g64asym", "auto-round", "transformers", "bfloat16", through="float16"),
    Case("auto_round", "w2g64", "auto-round", "transformers", layers=("down_proj=w4g32",),
         ignore=("k_proj",)),
    Case("auto_round", "w2g64", "auto-round", "transformers", recipe="signround", keys={"steps": 3}),
    Case("auto_round", "w3g64asym", "auto-round", "transformers", recipe="signround", keys={"steps": 3}),
    Case("auto_round", "w2g64asym", "auto-round", "transformers", recipe="efficientqat",
         keys={"epochs": 1.0, "e2e_epochs": 1.0, "norm_rate": 1e-3}),
    Case("gptq", "w4g64", "gptqmodel", "transformers", recipe="signround", keys={"steps": 3}),
    Case("gptq", "w4g64", "auto-round", "auto-round-config"),
    Case("gptq", "w4g64", "gptqmodel", "gptqmodel"),
    Case("gptq", "w4g64", "gptqmodel", "transformers"),
    Case("gptq", "w3g64", "gptqmodel", "transformers"),
    Case("gptq", "w2g64", "gptqmodel", "transformers", ignore=("v_proj",)),
    Case("gptq", "w2g64", "gptqmodel", "gptqmodel", ignore=("v_proj",)),
    Case("gptq_v2", "w4g64asym", "gptqmodel", "gptqmodel"),
    Case("gptq_v2", "w2g64asym", "gptqmodel", "transformers"),
    *(Case("compressed_tensors", scheme, "compressed-tensors", "transformers")
      for scheme in ("w4g64", "w3g64", "w2g64", "w8g64", "w4pc")),
    *(Case("compressed_tensors", scheme, "compressed-tensors", "dequantize")
      for scheme in ("w4g64asym", "w3g64asym", "w2g64asym", "w8g64asym", "w4pcasym")),
    Case("compressed_tensors", "w3g64", "compressed-tensors", "transformers", "bfloat16", scales="bfloat16",
         recipe="signround", keys={"steps": 3}),
    Case("compressed_tensors", "w2g64", "compressed-tensors", "transformers", layers=("down_proj=w4g32",),
         ignore=("k_proj",)),
    Case("compressed_tensors", "w2g64", "compressed-tensors", "transformers", recipe="signround", keys={"steps": 3}),
]  # fmt: skip

# what a client rounds to on its way to bf16; GPTQModel's products are not nn.Linear's there, but in fp32, which only
# transformers lets it do
ROUNDED: dict[tuple[str, str], dict[str, Any]] = {
    ("auto-round", "transformers"): {"through": "float16"},
    ("compressed-tensors", "transformers"): {"scales": "bfloat16"},
    ("compressed-tensors", "dequantize"): {"through": "float16"},
    ("gptqmodel", "transformers"): {"dtype": "float32", "through": "float16"},
    ("gptqmodel", "gptqmodel"): {"dtype": "float32", "through": "float16", "route": "transformers"},
}  # fmt: skip


class Unavailable(Exception):
    """A client's environment can't be made here."""


def environment(client: Client, root: Path) -> Path:
    """Python of the client's environment, made if it isn't there yet."""
    folder = root / client.name
    python, done = folder / "bin" / "python", folder / "complete"
    if done.exists():
        return python
    print(f"making the environment of {client.name} …", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    (folder / "constraints.txt").write_text(TORCH + "\n")
    for packages in ((TORCH,), *client.installs):
        command = [python, "-m", "pip", "install", "-q", "-c", folder / "constraints.txt", *packages]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise Unavailable(result.stderr.strip().splitlines()[-1])
    done.touch()
    return python


def versions(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of packages in another environment."""
    code = "import sys, importlib.metadata as m; print(*(m.version(name) for name in sys.argv[1:]))"
    names = ("torch", *names)
    result = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, result.stdout.split(), strict=True))


def write(case: Case, source: str, out: Path) -> tuple[dict[str, QTensor], dict[str, Tensor]]:
    """Quantize the model into a folder; what was quantized, and the norms, which a method may have trained."""
    planish.quantize_to(
        source,
        out,
        case.recipe,
        case.scheme,
        format=case.format,
        layers=case.layers,
        ignore=case.ignore,
        samples=4,
        seqlen=64,
        device="cpu",
        **case.keys,
    )
    folder = QuantizedFolder.open(out)
    assert folder is not None
    norms = {name: folder.source.get(name) for name in folder.source.names() if name.endswith("norm.weight")}
    return dict(folder.layers()), norms


def with_scales(quantized: dict[str, QTensor], dtype: str | None) -> dict[str, QTensor]:
    """The same with scales rounded to a dtype, fp16 again."""
    if dtype is None:
        return quantized
    return {name: replace(q, scale=q.scale.to(getattr(torch, dtype)).half()) for name, q in quantized.items()}


def logits_of(model: nn.Module, quantized: dict[str, QTensor], ids: list[int], through: str | None = None) -> Tensor:
    """Our own logits [tokens, vocabulary]: plain linears with the dequantized weights."""
    for name, q in quantized.items():
        linear = model.get_submodule(name)
        dtype = linear.weight.dtype
        linear.weight.data = q.dequantize(getattr(torch, through) if through else dtype).to(dtype)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def transposed(model: nn.Module, names: Iterable[str]) -> None:
    """From now on these linears multiply by weights that lie as clients unpack them, [in, out]. Where fp16 products go
    through other kernels for that (with AVX2, not with AVX-512), sums round otherwise, and few bits amplify it."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight, bias = linear.weight.detach().t().contiguous(), linear.bias
        linear.forward = lambda x, weight=weight, bias=bias: x @ weight if bias is None else x @ weight + bias


def digests_of(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """A hash of the bytes of each linear's weight."""
    weights = {name: model.get_submodule(name).weight.detach().contiguous() for name in names}
    return {name: hashlib.sha256(weight.view(torch.uint8).numpy()).hexdigest() for name, weight in weights.items()}


def theirs(python: Path, case: Case, folder: Path, ids: list[int]) -> tuple[Tensor, dict[str, str]]:
    """The client's logits and what it says of its layers."""
    prompt, out = folder.parent / "prompt.json", folder.parent / "logits.safetensors"
    prompt.write_text(json.dumps({"ids": ids, "dtype": case.dtype}))
    command = [python, HERE / "client.py", case.route, folder, prompt, out]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    with safe_open(out, "pt") as file:
        return file.get_tensor("logits"), file.metadata()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def run(case: Case, source: str, python: Path) -> dict[str, Any]:
    """One case's figures."""
    dtype = getattr(torch, case.dtype)
    ids = AutoTokenizer.from_pretrained(source)(PROMPT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    plain = logits_of(model, {}, ids)
    with tempfile.TemporaryDirectory() as scratch:
        quantized, norms = write(case, source, Path(scratch) / "model")
        for name, norm in norms.items():
            model.get_parameter(name).data.copy_(norm)
        ours = logits_of(model, with_scales(quantized, case.scales), ids, case.through)
        weights = digests_of(model, quantized)
        once = logits_of(model, quantized, ids)
        logits_of(model, with_scales(quantized, case.scales), ids, case.through)  # puts the weights back
        transposed(model, quantized)
        lying = logits_of(model, {}, ids)
        try:
            logits, said = theirs(python, case, Path(scratch) / "model", ids)
        except RuntimeError as error:
            return {"error": str(error).replace(scratch, "")}
    layers, held = json.loads(said["layers"]), json.loads(said["weights"])
    same = {"same_weights": all(held.get(name) == digest for name, digest in weights.items())}
    return {
        "relative": min(distance(logits, ours), distance(logits, lying)),
        "relative_to_weights_rounded_once": distance(logits, once),
        "relative_to_unquantized": distance(ours, plain),
        "same_top_token": float((logits.argmax(-1) == ours.argmax(-1)).float().mean()),
        "layers": layers,
        "all_layers_packed": sum(layers.values()) == (0 if case.route == "dequantize" else len(quantized)),
        **(same if CLIENTS[case.client].plain else {}),
    }


def passed(figures: dict[str, Any]) -> bool:
    if "error" in figures or not figures["all_layers_packed"]:
        return False
    return figures["relative"] <= TOLERANCE and figures.get("same_weights", True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare logits of other toolkits with ours.")
    parser.add_argument("model", help="folder of an unquantized Hugging Face model whose hidden size 64 divides")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "planish-interop")
    parser.add_argument("--results", type=Path, default=Path(f"benchmarks/results/interop-{date.today()}.json"))
    parser.add_argument("--only", default="", help="run the cases whose description contains this text")
    parser.add_argument("--group", type=int, default=64, help="in place of groups of 64, where the model has room")
    parser.add_argument("--bfloat16", action="store_true", help="for a model that overflows fp16, as Gemma 3 does")
    return parser.parse_args()


def main() -> int:
    asked = parse()
    disable_progress_bar()
    results, found = [], {"torch": torch.__version__, "transformers": version("transformers")}
    report: dict[str, Any] = {"planish": found, "clients": {}, "unavailable": {}}
    cases = [replace(case, scheme=case.scheme.replace("g64", f"g{asked.group}")) for case in CASES]
    if asked.bfloat16:
        cases = [replace(case, **{"dtype": "bfloat16", **ROUNDED.get((case.client, case.route), {})}) for case in cases]
    for case in (case for case in cases if asked.only in str(case)):
        if case.client in report["unavailable"]:
            continue
        client = CLIENTS[case.client]
        try:
            python = environment(client, asked.environments)
        except Unavailable as error:
            report["unavailable"][case.client] = str(error)
            print(f"no {case.client}: {error}")
            continue
        report["clients"].setdefault(case.client, versions(python, client.reports))
        figures = run(case, asked.model, python)
        results.append({"case": asdict(case), **figures, "passed": passed(figures)})
        outcome = figures.get("error") or f"{figures['relative']:.1e}"
        print(f"{'ok  ' if passed(figures) else 'FAIL'} {outcome} {case}", flush=True)
    heading = {
        "command": f"python tests/interop/run.py MODEL --only {asked.only!r} --group {asked.group}"
        + " --bfloat16" * asked.bfloat16,
        "model": Path(asked.model).name,
        "date": str(date.today()),
        "tolerance": TOLERANCE,
    }
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    asked.results.write_text(json.dumps({**heading, **report, "results": results}, indent=1) + "\n")
    failed = sum(not result["passed"] for result in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return int(failed > 0 or not results)


if __name__ == "__main__":
    sys.exit(main())
