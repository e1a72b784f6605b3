"""The model card: README.md of a checkpoint, for whoever finds it: what it is, how it was made, how to load it.

Everything in it comes from the run's manifest, from what was measured, and from the table of who loads what. What
isn't known is left out; no figure is made here. Nor is what differs from run to run, such as its seconds: the same
request writes the same card.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from planish.checkpoint import Content
from planish.eval import record
from planish.formats import FORMATS
from planish.log import RunManifest
from planish.scheme import Scheme
from planish.targets import Verdict, verdicts

NAME = "README.md"
TITLES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers, without Planish"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(
    manifest: RunManifest,
    *,
    evaluation: Mapping[str, Any] | None = None,
    path: str = "PATH",
) -> str:
    """README.md as markdown with YAML front matter.

    Args:
        manifest: of the run; empty texts and zeros in it are what isn't known (an export of another's checkpoint
            has no recipe).
        evaluation: what eval.json holds: {"perplexity": [{"data", "value", "seqlen", "limit"}], "tasks": {name:
            {metric: value, "stderr": value}}}.
        path: what stands for the folder in the lines that load it.
    """
    parts = [
        _front(manifest),
        f"# {_base(manifest)}, {manifest.scheme or _schemes(manifest)}\n\n{_sentence(manifest)}",
        _section("How it was made", ("", ""), _made(manifest)),
        _section("Measured", ("", "on", "value"), _measured(evaluation or {})),
        _loading(manifest, path),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def papers(manifest: RunManifest, evaluation: Mapping[str, Any] | None = None) -> dict[str, Content]:
    """What a checkpoint says of itself, by file: run.json, the card, eval.json if there is one."""
    files: dict[str, Content] = {"run.json": manifest.to_dict()} if manifest.recipe else {}
    files[NAME] = model_card(manifest, evaluation=evaluation)
    return files | ({record.NAME: evaluation} if evaluation else {})


def refresh(folder: Path, before: Mapping[str, Any]) -> None:
    """Write the card again with what eval.json holds now, unless somebody has changed it since.

    Args:
        before: what eval.json held.
    """
    manifest, card = RunManifest.read(folder), folder / NAME
    if manifest is None or not card.is_file():
        return
    if card.read_text(encoding="utf-8") == model_card(manifest, evaluation=before):
        text = model_card(manifest, evaluation=record.read(folder))
        card.write_text(text, encoding="utf-8")


def _front(manifest: RunManifest) -> str:
    """What a hub reads: JSON's texts and lists are YAML's too. The license is the author's to say."""
    hub_id = _hub_id(manifest.model)
    bits = sorted({f"{Scheme.parse(text).bits}-bit" for text in manifest.layers.values()})
    words: dict[str, Any] = {"base_model": hub_id, "base_model_relation": "quantized"} if hub_id else {}
    words |= {
        "library_name": "transformers" if manifest.format in FORMATS else manifest.format,
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["planish", manifest.format.replace("_", "-"), *bits])),
    }
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in words.items()), "---"])


def _hub_id(model: str) -> str | None:
    return model if _HUB_ID.fullmatch(model) and not Path(model).exists() else None


def _base(manifest: RunManifest) -> str:
    """The model's name; of a folder the last part only, since the rest says where somebody keeps files."""
    return _hub_id(manifest.model) or Path(manifest.model).name


def _schemes(manifest: RunManifest) -> str:
    return ", ".join(f"{scheme} x {count}" for scheme, count in Counter(manifest.layers.values()).most_common())


def _sentence(manifest: RunManifest) -> str:
    bits = sorted({Scheme.parse(text).bits for text in manifest.layers.values()})
    how = f", by Planish's recipe `{manifest.recipe}`" if manifest.recipe else ""
    return (
        f"{_base(manifest)} with {len(manifest.layers)} linears in {' and '.join(map(str, bits))} bits{how}, "
        f"in the format `{manifest.format}`."
    )


def _made(manifest: RunManifest) -> Iterator[tuple[str, str]]:
    figures, keys = manifest.figures, " ".join(f"{key}={value}" for key, value in manifest.keys.items())
    if manifest.recipe:
        yield "recipe", f"`{f'{manifest.recipe} {keys}'.strip()}`, seed {manifest.seed}"
    yield "linears", _schemes(manifest)
    if "bits_per_weight" in figures:
        yield "bits a weight", f"{figures['bits_per_weight']:.2f} over the whole model, with what stays in 16 bits"
    if manifest.samples:
        size = f"{manifest.samples} x {manifest.seqlen} tokens"
        yield "data", f"`{_text(manifest.data)}`, {size}, sha256 `{manifest.data_sha256}`"
    if manifest.calibration:
        yield "blocks calibrated on", f"`{_text(manifest.calibration)}`, sha256 `{manifest.calibration_sha256}`"
    if "end_to_end" in figures:
        before, after = figures["end_to_end"]
        yield "held-out loss, end to end", f"{before:.4f} before, {after:.4f} after"
    if errors := figures.get("rounded_again"):
        mean, worst = sum(errors.values()) / len(errors), max(errors.values())
        yield "rounded once more", (
            f"{len(errors)} linears that this format can't hold as they were: relative squared error {mean:.3g} in the "
            f"mean, {worst:.3g} at most"
        )
    if manifest.versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())


def _measured(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for found in evaluation.get("perplexity") or ():
        tokens = f", windows of {found['seqlen']} tokens" if found.get("seqlen") else ""
        limit = f", the first {found['limit']} of them" if found.get("limit") else ""
        yield "perplexity", f"`{found['data']}`{tokens}{limit}", f"{found['value']:.4g}"
    for task, metrics in (evaluation.get("tasks") or {}).items():
        for index, (metric, value) in enumerate(metrics.items()):
            error = metrics.get("stderr" if index == 0 else f"{metric}_stderr")
            if not metric.endswith("stderr"):
                yield metric, f"`{task}`", f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
    for found in evaluation.get("agreement") or ():
        against = f"`{found['prompts']}`, against `{found['with']}`"
        yield "KL, nats a token", against, f"{found['kl']:.4f} ± {found['kl_stderr']:.4f}"
        yield "top-1 agreement", against, f"{found['top1']:.4f} ± {found['top1_stderr']:.4f}"


def _section(title: str, columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A heading and a table; nothing if it has no row."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([f"## {title}", "", *head, *lines]) if lines else ""


def _loading(manifest: RunManifest, path: str) -> str:
    where = "file" if manifest.format == "gguf" else "folder, or its id on the hub"
    parts = [f"## How to load it\n\n`{path}` stands for this {where}."]
    if manifest.format in FORMATS:
        parts += _own(manifest, path)
    schemes = {Scheme.parse(text) for text in manifest.layers.values()}
    others = (verdict for verdict in verdicts(manifest.format, schemes) if "planish.register" not in verdict.how)
    parts += [_foreign(verdict, path) for verdict in others if verdict.loads]
    return "\n\n".join(parts)


def _own(manifest: RunManifest, path: str) -> list[str]:
    """Planish itself, and transformers by it."""
    auto = "from transformers import AutoModelForCausalLM"
    return [
        f'### Planish\n\n```python\nimport planish\n\nmodel = planish.load("{path}")\n```',
        "Read back when it was written: every code, scale and zero was compared.",
        f"### transformers, on Planish's kernels\n\n```python\nimport planish\n{auto}\n\n"
        f'planish.register()\nmodel = AutoModelForCausalLM.from_pretrained("{path}")\n```',
        "The same logits as by `planish.load`, in Planish's tests.",
    ]


def _foreign(verdict: Verdict, path: str) -> str:
    """A target's lines, those of a shell before those of Python, and how it is known that they work."""
    lines = verdict.how.format(path=path).split("; ")
    python = [f"model = {line}" for line in lines if line.startswith("AutoModel")]
    shell = [line for line in lines if not line.startswith("AutoModel")]
    blocks = ["\n".join(["```sh", *shell, "```"])] if shell else []
    if python:
        names = ", ".join(sorted({"AutoModelForCausalLM", *re.findall(r"\w+Config", " ".join(python))}))
        blocks.append("\n".join(["```python", f"from transformers import {names}", "", *python, "```"]))
    seen = verdict.checked
    unseen = seen.removeprefix("not run; ")
    known = f"Checked with {seen.removesuffix(', run')}." if seen == unseen else f"Not run; read from {unseen}."
    return "\n\n".join([f"### {TITLES.get(verdict.target, verdict.target)}", *blocks, known])


def _text(data: str) -> str:
    """A source as anybody may see it: a file by its name alone."""
    return Path(data).name if Path(data).is_file() else data
