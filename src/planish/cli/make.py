"""Verbs that make a checkpoint: quantize, finetune, export; and plan, which says what quantize would take."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from planish.cli.app import (
    BatchSize,
    Bits,
    Calibration,
    Device,
    Embeddings,
    Folder,
    Format,
    Ignore,
    Inexact,
    Layers,
    ModelName,
    Out,
    Pairs,
    Preset,
    RecipeName,
    Revision,
    Samples,
    SchemeText,
    Storage,
    Target,
    TensorParallel,
    Tokens,
    Watched,
    app,
    optional,
)
from planish.cli.show import disk_bytes, say, show_event, size
from planish.errors import PlanishError

# a paragraph of help that begins with a backspace keeps its indentation
_QUANTIZE = """
Quantize MODEL: a Hugging Face folder, a hub id or a .gguf file.

\b
  4 bits, calibrated on text that Python carries; 2 bits on a text of your own, which is better:
    planish quantize ./model --out q4
    planish quantize ./model --bits 2 --data text.jsonl --out q2
  seconds, nothing trained; blocks fitted, the whole model not; more steps on more text:
    planish quantize ./model --preset fast --out q4
    planish quantize ./model --bits 3 --preset light --out q3
    planish quantize ./model --bits 2 --preset best --data text.jsonl --out q2
  a model for many uses: a mix of texts, the state kept chosen on one that isn't trained on:
    planish quantize ./model --bits 2 --data web.txt,code.jsonl,chats.jsonl:2 --watch news.txt --out q2
  2.5 bits on average, more where a linear would lose more, fewer where less:
    planish quantize ./model --bits 2.5 --out q2.5
  a publication's method, such as SignRound:
    planish quantize ./model --recipe signround --preset paper --out q4
  more bits for some linears, 16 for others:
    planish quantize ./model --layers down_proj=w8 --ignore o_proj --out q4
  ranges clipped and channels scaled, on hidden states that are turned; 4-bit activations too:
    planish quantize ./model --recipe rotate+omniquant --scheme w4a4 --out q4
  hours of work that a kill must not cost; the same command goes on:
    planish quantize ./model --resume --out q4
  for a server, which decides on the format and what it can hold:
    planish quantize ./model --target vllm --tp 2 --out q4
    planish quantize ./model --bits 2 --target llama.cpp --embeddings 8 --out q2
  what it can't hold rounded to nearest once more, and what that loses said:
    planish quantize ./model --scheme w4g32asym --target sglang --inexact --out q4
  a method of your own, with its own keys:
    planish quantize ./model --recipe ./mine.py:mine steps=50 --out q4

--bits 4 is w4g128: groups of 128 cost an eighth of a bit a weight. --bits 2 is w2g64, since at 2 bits
one scale for 128 weights loses far more than that eighth buys. Both are symmetric: the scale's sign puts
the one extra level on the larger tail, which zero points seldom beat and cost room beside.
--bits 3 --target llama.cpp is w3g16k: 3.44 bits in its type Q3_K, where other groups would take 4.5.
With a decimal point (2.5, 3.0) it is an average over the linears, codes counted and scales not, as in w2g64:
what each loses at 2, 3, 4 and 8 bits is measured first. --bits 2.5 is --scheme w2.5g64; w2.5g64asym has zero points.

KEY=VALUE sets a recipe's own keys: see planish recipes planish. --data takes embedded, a .txt, .raw
or .jsonl file (FILE#field names its field) or a data set of the hub (NAME:config@split#field); self has
the model write its text. Several, by commas, are a mix in equal shares; SOURCE:2 has twice the share.
Of a mix, fits are watched on another text, the embedded one; --watch names one.
"""

_FINETUNE = """
Train MODEL end to end and write it, packed. MODEL is a quantized folder, whose scales then learn while its
codes stay; or a float model, for a recipe that quantizes first.

\b
  scales of a 2-bit model, on conversations, the loss on the answers:
    planish finetune q2 --data chats.jsonl --out q2-tuned
  by distillation from the float model that q2 was made of:
    planish finetune q2 --data text.jsonl --out q2-tuned distill=1
  EfficientQAT, whole, from the float model:
    planish finetune ./model --recipe efficientqat --scheme w2g64asym --data text.jsonl --out q2
  the same with a LoRA that is there already, merged before anything is rounded:
    planish finetune ./model --adapter ./lora --recipe efficientqat --scheme w2g64asym --data text.jsonl --out q2
  blocks calibrated on text for any use, then scales trained on a task's conversations:
    planish finetune ./model --recipe efficientqat --scheme w2g64asym --calib web.txt --data chats.jsonl --out q2
  factors of low rank inside the quantizers of a float model, which ends packed, without an adapter:
    planish finetune ./model --recipe l4q --scheme w4g128 --data chats.jsonl --out q4
    planish finetune ./model --recipe l4q --data chats.jsonl --out q2-tuned start=q2 distill=1
  go on after a kill, from the last checkpoint:
    planish finetune q2 --data text.jsonl --out q2-tuned --save-every 100 --resume

--data takes plain text as planish quantize does, or conversations (.jsonl of messages, ShareGPT or alpaca
rows), rendered by the model's chat template. KEY=VALUE sets the recipe's own keys: planish recipes e2e_qp.
"""


@app.command(help=_QUANTIZE, no_args_is_help=True)
def quantize(
    model: ModelName,
    pairs: Pairs = None,
    out: Out = None,
    recipe: RecipeName = "planish",
    preset: Preset = None,
    scheme: SchemeText = None,
    bits: Bits = None,
    data: Calibration = "embedded",
    watch: Watched = None,
    samples: Samples = None,
    seqlen: Tokens = None,
    layers: Layers = None,
    ignore: Ignore = None,
    format: Format = "auto",
    target: Target = None,
    tp: TensorParallel = 1,
    embeddings: Embeddings = None,
    inexact: Inexact = False,
    device: Device = None,
    batch_size: BatchSize = None,
    seed: Annotated[int, Option(help="Of the choice of windows and of the fit.")] = 0,
    revision: Revision = None,
    storage: Storage = "auto",
    stream_dir: Annotated[Path | None, optional("Folder for activations on disk; beside --out if not given.")] = None,
    resume: Annotated[bool, Option("--resume", help="Keep what is finished; go on from it after a kill.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a checkpoint that is in --out.")] = False,
) -> None:
    out = _given(out)
    from planish import api

    api.quantize_to(
        model,
        out,
        recipe,
        _scheme(scheme, bits, target),
        preset=preset,
        data=data,
        watch=watch,
        samples=samples,
        seqlen=seqlen,
        layers=tuple(layers or ()),
        ignore=tuple(ignore or ()),
        format=format,
        target=target,
        tp=tp,
        embeddings=embeddings,
        device=device,
        batch_size=batch_size,
        seed=seed,
        revision=revision,
        storage=storage, stream_dir=stream_dir, resume=resume, overwrite=overwrite,
        inexact=say if inexact else None,
        announce=lambda resolved: say("\n".join(resolved.summary())),
        progress=show_event,
        **_keys(pairs or []),
    )  # fmt: skip
    say(f"wrote {out} ({size(disk_bytes(out))}); next: planish eval {out} --seqlen 512")


@app.command(help=_FINETUNE, no_args_is_help=True)
def finetune(
    model: ModelName,
    pairs: Pairs = None,
    out: Out = None,
    recipe: RecipeName = "e2e_qp",
    preset: Preset = None,
    scheme: Annotated[str | None, optional("Of a float model, such as w2g64asym.")] = None,
    data: Annotated[str, Option(help="Text or conversations, or a mix of sources.")] = "embedded",
    calib: Annotated[str | None, optional("Text to calibrate blocks on, if that isn't --data.")] = None,
    watch: Watched = None,
    samples: Samples = None,
    seqlen: Tokens = None,
    steps: Annotated[int | None, optional("Optimizer steps.")] = None,
    epochs: Annotated[float | None, optional("Passes over the windows, where steps aren't given.")] = None,
    adapter: Annotated[Path | None, optional("LoRA folder of a float model, merged into it first.")] = None,
    teacher: Annotated[str | None, optional("Float model to distil from; else the one in run.json.")] = None,
    batch_size: Annotated[int, Option(help="Windows in one pass; batch_size=8 is a step's.")] = 4,
    checkpointing: Annotated[bool | None, optional("Recompute blocks, by the model's size if not given.")] = None,
    lean: Annotated[bool | None, optional("One block at a time; where memory is short, if not given.")] = None,
    save_every: Annotated[int, Option(help="Steps between checkpoints; 0 writes none.")] = 0,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint.")] = False,
    track: Annotated[str, Option(help="tensorboard or wandb, where installed.")] = "none",
    format: Annotated[str, Option(help="On disk, of a float model.")] = "auto",
    device: Device = None,
    seed: Annotated[int, Option(help="Of windows and their order.")] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a checkpoint that is in --out.")] = False,
) -> None:
    out = _given(out)
    from planish import tuning

    tuning.finetune(
        model,
        out,
        recipe,
        scheme,
        preset=preset,
        data=data,
        calib=calib,
        watch=watch,
        samples=samples,
        seqlen=seqlen,
        adapter=adapter,
        teacher=teacher,
        batch_size=batch_size,
        checkpointing=checkpointing,
        lean=lean,
        save_every=save_every,
        resume=resume,
        track=track,
        format=format,
        device=device,
        seed=seed,
        overwrite=overwrite,
        progress=show_event,
        keys=_tuned_keys(recipe, pairs or [], steps=steps, epochs=epochs),
    )
    say(f"wrote {out} ({size(disk_bytes(out))}); next: planish eval {out} --seqlen 512")


@app.command(no_args_is_help=True)
def plan(
    model: ModelName,
    pairs: Pairs = None,
    recipe: RecipeName = "planish",
    preset: Preset = None,
    scheme: SchemeText = None,
    bits: Bits = None,
    data: Calibration = "embedded",
    samples: Samples = None,
    seqlen: Tokens = None,
    layers: Layers = None,
    ignore: Ignore = None,
    format: Format = "auto",
    target: Target = None,
    tp: TensorParallel = 1,
    embeddings: Embeddings = None,
    device: Device = None,
    batch_size: BatchSize = None,
    revision: Revision = None,
    storage: Storage = "auto",
    gpu_memory: Annotated[
        str | None, optional("Of the GPU to plan for, such as 24GB; the one here if there is.")
    ] = None,
    probe: Annotated[bool, Option(help="Measure a few steps, to tell the time.")] = True,
) -> None:
    """Say what planish quantize would take and give, before it: memory, disk, time, and who loads the result.

    \b
      planish plan ./model --bits 2 --preset best
      planish plan Qwen/Qwen3-8B --gpu-memory 24GB --target vllm

    It takes the options of planish quantize. What doesn't fit gets flags with which it would.
    """
    from planish import forecast, request

    memory = None if gpu_memory is None else forecast.parse_size(gpu_memory)
    asked = request.with_batch(recipe, batch_size, _keys(pairs or [], plan))
    resolved = request.resolve(
        model, recipe, _scheme(scheme, bits, target), layers=tuple(layers or ()), ignore=tuple(ignore or ()),
        preset=preset, revision=revision, format=format, target=target, tp=tp, embeddings=embeddings,
        samples=samples, seqlen=seqlen,
        **asked,
    )  # fmt: skip
    found = forecast.forecast(
        resolved, data=data, device=device, batch_size=batch_size, storage=storage, gpu_memory=memory, probe=probe
    )
    say("\n".join(found.lines()))


@app.command(no_args_is_help=True)
def export(
    folder: Folder,
    out: Out = None,
    format: Annotated[str | None, optional("On disk; see planish quantize --help.")] = None,
    target: Target = None,
    tp: TensorParallel = 1,
    embeddings: Annotated[int | None, optional("Bits of embedding and head, if they are in 16: 8 or 4.")] = None,
    inexact: Inexact = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is in --out.")] = False,
) -> None:
    """Write a quantized checkpoint in another format; every code, scale and zero stays.

    \b
      planish export q4 --format gptq --out q4-gptq
      planish export q2 --target vllm --out q2-vllm
      planish export q4 --format gguf --out q4.gguf
      planish export q4 --format gptq --inexact --out q4-gptq
    """
    if out is None:
        raise PlanishError("where to? give a new folder, or a file.gguf, with --out")
    import planish

    written = planish.export(
        folder, out, format=format, target=target, tp=tp, embeddings=embeddings, overwrite=overwrite,
        inexact=say if inexact else None,
    )  # fmt: skip
    say(f"wrote {written} ({size(disk_bytes(written))})")


def _given(out: Path | None) -> Path:
    if out is None:
        raise PlanishError("where to? give a new folder with --out DIR")
    return out


def _scheme(scheme: str | None, bits: str | None, target: str | None = None) -> str:
    """--scheme, or --bits: below 3 bits a group of 128 loses too much, so that 2 means w2g64 (see the help); of 3 bits
    llama.cpp has one type."""
    if scheme is not None and bits is not None:
        raise PlanishError(f"--scheme {scheme} and --bits {bits} say the same thing twice; give one of them")
    if bits is None:
        return scheme or "w4g128"
    if not re.fullmatch(r"\d+(\.\d+)?", bits):
        raise PlanishError(f"--bits {bits}; give a width such as 3, or an average such as 2.5")
    if (bits, target) == ("3", "llama.cpp"):
        return "w3g16k"
    return f"w{bits}g{64 if float(bits) < 3 else 128}"


def _keys(pairs: Iterable[str], command: Any = quantize, allowed: tuple[str, ...] = ()) -> dict[str, str]:
    """KEY=VALUE texts; a key that is an option of the command is refused, not taken twice."""
    keys: dict[str, str] = {}
    options = {name for name in command.__annotations__ if name not in ("model", "pairs", "return", *allowed)}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep or not key.isidentifier():
            raise PlanishError(f"{pair!r} isn't KEY=VALUE; write a recipe's key as steps=100")
        if key in options:
            raise PlanishError(f"{pair!r}: {key} is an option; write --{key.replace('_', '-')} {value}")
        keys[key] = value
    return keys


def _tuned_keys(recipe: str, pairs: Iterable[str], **counts: float | None) -> dict[str, Any]:
    """Keys of finetune: counts are those of the whole-model stage; where blocks have the same, theirs stay a key."""
    from planish.recipes import describe

    own = describe(recipe)["keys"]
    given = {key: value for key, value in counts.items() if value is not None}
    of_blocks = [key.removeprefix("e2e_") for key in own if key.startswith("e2e_")]
    return {
        **{f"e2e_{key}" if f"e2e_{key}" in own else key: value for key, value in given.items()},
        **_keys(pairs, finetune, allowed=("batch_size", *of_blocks)),
    }
