"""The command line: verbs, each a thin call of the Python API.

    planish quantize | finetune | recipes | eval | generate | info

What a user can mend is one line on stderr and exit status 2. Torch and transformers are imported inside
the verbs, so that --help answers at once. This file knows nothing of methods, formats or models.
"""

import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from planish.errors import PlanishError

if TYPE_CHECKING:
    from planish.log import Event

app = typer.Typer(
    name="planish", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)

# a paragraph of help that begins with a backspace keeps its indentation
_OVERVIEW = """
Take a Hugging Face language model to 2, 3 or 4 bits.

\b
  planish quantize Qwen/Qwen3-0.6B --out q4
  planish quantize ./model --bits 2 --preset best --data text.jsonl --out q2
  planish finetune q2 --data chats.jsonl --out q2-tuned
  planish eval q4 --ppl wiki.test.raw
  planish generate q4 "What is a planishing hammer?"

A scheme is written as w4g128 (4 bits, one scale for 128 weights), w2g64asym (with zero points) or
w4pc (one scale a row). Each verb's --help has examples of its own.
"""

_QUANTIZE = """
Quantize MODEL: a Hugging Face folder, a hub id or a .gguf file.

\b
  4 bits with SignRound, calibrated on text that Python carries:
    planish quantize ./model --out q4
  3 bits, a tenth of the steps; 2 bits on a text of your own:
    planish quantize ./model --bits 3 --preset fast --out q3
    planish quantize ./model --bits 2 --data text.jsonl --out q2
  seconds, no training; rounding to nearest with searched ranges:
    planish quantize ./model --recipe rtn search=true --out q4
  more bits for some linears, 16 for others:
    planish quantize ./model --layers down_proj=w8 --ignore o_proj --out q4
  hours of work that a kill must not cost; the same command goes on:
    planish quantize ./model --preset best --resume --out q4
  a method of your own, with its own keys:
    planish quantize ./model --recipe ./mine.py:mine steps=50 --out q4

KEY=VALUE sets a recipe's own keys: see planish recipes signround. --data takes embedded, a .txt, .raw
or .jsonl file (FILE#field names its field) or a data set of the hub (NAME:config@split#field).
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
  go on after a kill, from the last checkpoint:
    planish finetune q2 --data text.jsonl --out q2-tuned --save-every 100 --resume

--data takes plain text as planish quantize does, or conversations (.jsonl of messages, ShareGPT or alpaca
rows), rendered by the model's chat template. KEY=VALUE sets the recipe's own keys: planish recipes e2e_qp.
"""


def _optional(text: str, **more: Any) -> Any:
    """An option whose default is to say nothing."""
    return Option(help=text, show_default=False, **more)


ModelName = Annotated[str, Argument(metavar="MODEL")]
Folder = Annotated[str, Argument(metavar="DIR", help="A folder or hub id, quantized or not.")]
Device = Annotated[str | None, _optional("cpu, cuda, cuda:1; the GPU if there is one.")]
Seqlen = Annotated[int, Option(help="Tokens of a window.")]
Pairs = Annotated[list[str] | None, Argument(metavar="[KEY=VALUE]...", show_default=False)]
Out = Annotated[Path | None, _optional("Folder to write; must be new or empty.")]


@app.callback(help=_OVERVIEW)
def planish() -> None:
    pass


@app.command(help=_QUANTIZE, no_args_is_help=True)
def quantize(
    model: ModelName,
    pairs: Pairs = None,
    out: Out = None,
    recipe: Annotated[str, Option(help="Method by name, or ./mine.py:function.")] = "signround",
    preset: Annotated[str | None, _optional("fast, light, default, best, paper.")] = None,
    scheme: Annotated[str | None, _optional("Such as w4g128 (the default), w2g64asym, w4pc.")] = None,
    bits: Annotated[int | None, _optional("Short for a scheme: 2 is w2g64; 3, 4, 8 have g128.")] = None,
    data: Annotated[str, Option(help="Calibration text.")] = "embedded",
    samples: Annotated[int | None, _optional("Windows of that text; 128 unless the preset says.")] = None,
    seqlen: Annotated[int | None, _optional("Tokens of a window; 2048 unless the preset says.")] = None,
    layers: Annotated[list[str] | None, _optional("Scheme of some linears.", metavar="REGEX=SCHEME")] = None,
    ignore: Annotated[list[str] | None, _optional("Linears to leave in 16 bits.", metavar="REGEX")] = None,
    format: Annotated[str, Option(help="On disk: auto, auto_round, gptq, gptq_v2, native.")] = "auto",
    device: Device = None,
    batch_size: Annotated[int | None, _optional("Windows a step; the recipe's own if not given.")] = None,
    seed: Annotated[int, Option(help="Of the choice of windows and of the fit.")] = 0,
    revision: Annotated[str | None, _optional("Of a hub model.")] = None,
    storage: Annotated[str, Option(help="Where activations wait: auto, device, host, disk.")] = "auto",
    stream_dir: Annotated[Path | None, _optional("Folder for activations on disk; beside --out if not given.")] = None,
    resume: Annotated[bool, Option("--resume", help="Keep what is finished; go on from it after a kill.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a checkpoint that is in --out.")] = False,
) -> None:
    if out is None:
        raise PlanishError("where to? give a new folder with --out DIR")
    from planish import api

    api.quantize_to(
        model,
        out,
        recipe,
        _scheme(scheme, bits),
        preset=preset,
        data=data,
        samples=samples,
        seqlen=seqlen,
        layers=tuple(layers or ()),
        ignore=tuple(ignore or ()),
        format=format,
        device=device,
        batch_size=batch_size,
        seed=seed,
        revision=revision,
        storage=storage,
        stream_dir=stream_dir,
        resume=resume,
        overwrite=overwrite,
        announce=lambda resolved: _say("\n".join(resolved.summary())),
        progress=show_event,
        **_keys(pairs or []),
    )
    _say(f"wrote {out} ({_size(_disk_bytes(out))}); next: planish eval {out} --seqlen 512")


@app.command(help=_FINETUNE, no_args_is_help=True)
def finetune(
    model: ModelName,
    pairs: Pairs = None,
    out: Out = None,
    recipe: Annotated[str, Option(help="Method by name, or ./mine.py:function.")] = "e2e_qp",
    preset: Annotated[str | None, _optional("fast, light, default, best, paper.")] = None,
    scheme: Annotated[str | None, _optional("Of a float model, such as w2g64asym.")] = None,
    data: Annotated[str, Option(help="Text or conversations.")] = "embedded",
    samples: Annotated[int | None, _optional("Windows; 128 unless the preset says.")] = None,
    seqlen: Annotated[int | None, _optional("Tokens of a window; 2048 unless the preset says.")] = None,
    steps: Annotated[int | None, _optional("Optimizer steps.")] = None,
    epochs: Annotated[float | None, _optional("Passes over the windows, where steps aren't given.")] = None,
    teacher: Annotated[str | None, _optional("Float model to distil from; else the one in run.json.")] = None,
    batch_size: Annotated[int, Option(help="Windows in one pass; batch_size=8 is a step's.")] = 4,
    checkpointing: Annotated[bool | None, _optional("Recompute blocks, by the model's size if not given.")] = None,
    lean: Annotated[bool | None, _optional("One block at a time; where memory is short, if not given.")] = None,
    save_every: Annotated[int, Option(help="Steps between checkpoints; 0 writes none.")] = 0,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint.")] = False,
    track: Annotated[str, Option(help="tensorboard or wandb, where installed.")] = "none",
    format: Annotated[str, Option(help="On disk, of a float model.")] = "auto",
    device: Device = None,
    seed: Annotated[int, Option(help="Of windows and their order.")] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a checkpoint that is in --out.")] = False,
) -> None:
    if out is None:
        raise PlanishError("where to? give a new folder with --out DIR")
    from planish import tuning
    from planish.recipes import describe

    own = describe(recipe)["keys"]
    counts = {
        "e2e_" + k if "e2e_" + k in own else k: v for k, v in (("steps", steps), ("epochs", epochs)) if v is not None
    }
    tuning.finetune(
        model,
        out,
        recipe,
        scheme,
        preset=preset,
        data=data,
        samples=samples,
        seqlen=seqlen,
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
        keys={**counts, **_keys(pairs or [], finetune, allowed=("batch_size", *_of_blocks(own)))},
    )
    _say(f"wrote {out} ({_size(_disk_bytes(out))}); next: planish eval {out} --seqlen 512")


@app.command()
def recipes(name: Annotated[str | None, Argument(metavar="[NAME]", show_default=False)] = None) -> None:
    """List the methods; of one, show equation, keys and presets.

    \b
      planish recipes
      planish recipes signround
    """
    from planish.recipes import RECIPES, describe

    if name is not None:
        _show_recipe(describe(name))
        return
    table = Table("recipe", "what it is", "presets", box=None)
    for known in RECIPES:
        facts = describe(known)
        table.add_row(known, facts["summary"], " ".join(facts["presets"]))
    Console().print(table)
    _say("\nplanish recipes NAME shows one's equation and keys; your own is --recipe ./mine.py:function")


@app.command(name="eval", no_args_is_help=True)
def evaluate(
    folder: Folder,
    ppl: Annotated[str, Option(metavar="TEXT", help="A file or a data set of the hub.")] = "embedded-eval",
    seqlen: Seqlen = 2048,
    limit: Annotated[int | None, _optional("Only the first so many windows.")] = None,
    batch_size: Annotated[int, Option(help="Windows at once.")] = 8,
    device: Device = None,
) -> None:
    """Measure perplexity.

    \b
      the field's protocol; rows of a .raw file are joined as it does:
        planish eval q4 --ppl wiki.test.raw
      quick, on the language reference that Python carries:
        planish eval q4 --seqlen 512 --limit 16

    Non-overlapping windows, no BOS, float32 logits.
    """
    import planish

    loaded = planish.load(folder, device=device)
    value = planish.perplexity(loaded, ppl, seqlen=seqlen, batch_size=batch_size, limit=limit)
    _say(f"perplexity {value:.4g}   ({ppl}, windows of {seqlen}{f', the first {limit}' if limit else ''})")


@app.command(no_args_is_help=True)
def generate(
    folder: Folder,
    prompt: Annotated[str, Argument(show_default=False)],
    tokens: Annotated[int, Option(help="At most so many new tokens.")] = 64,
    temperature: Annotated[float, Option(help="0 is greedy.")] = 0.0,
    raw: Annotated[bool, Option("--raw", help="Continue the prompt, without a chat template.")] = False,
    seed: Annotated[int, Option(help="Of the sampling.")] = 0,
    device: Device = None,
) -> None:
    """Answer a prompt.

    \b
      planish generate q4 "What is a planishing hammer?"
      planish generate q4 --raw --tokens 20 "The capital of France is"
    """
    import torch

    import planish
    from planish.folder import tokenizer_of

    loaded: Any = planish.load(folder, device=device)
    tokenizer = tokenizer_of(loaded)
    if tokenizer is None:
        raise PlanishError(f"{folder} has no tokenizer; copy the tokenizer files of the original model into it")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    ids = prompt_ids(tokenizer, prompt, raw=raw).to(loaded.device)
    with torch.no_grad():
        output = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **sampling)
    _say(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@app.command(no_args_is_help=True)
def info(
    folder: Folder,
    linears: Annotated[bool, Option("--linears", help="Name every linear, for --layers.")] = False,
) -> None:
    """Show what a model is: size, linears, schemes, and the run that made it.

    \b
      planish info q4
      planish info ./model --linears
    """
    from planish.arch import discover
    from planish.arch import linears as linears_of
    from planish.folder import QuantizedFolder
    from planish.log import RunManifest
    from planish.source import open_source

    quantized = QuantizedFolder.open(folder)
    source = quantized.source if quantized else open_source(folder)
    model = source.skeleton()
    shapes = linears_of(discover(model), model)
    schemes = {name: str(quantized.schemes.get(name, "16-bit")) if quantized else "16-bit" for name in shapes}
    count = sum(parameter.numel() for parameter in model.parameters())
    _say(f"{folder}: {type(model).__name__}, {count / 1e6:.1f} M parameters")
    if source.folder is not None:
        stored = sum(file.stat().st_size for file in source.folder.glob("*.safetensors"))
        _say(f"{_size(stored)} on disk, {8 * stored / count:.2f} bits a weight with embeddings")
        if manifest := RunManifest.read(source.folder):
            _say(
                f"made by {manifest.recipe} {_pairs(manifest.keys)} of {manifest.model}, data {manifest.data}: "
                f"{manifest.samples} x {manifest.seqlen} tokens, seed {manifest.seed}"
            )
    if quantized:
        _say(f"format {quantized.format.name}: {len(quantized.schemes)} of {len(shapes)} linears are quantized")
    _show_linears(shapes, schemes, every=linears)


def main() -> None:
    """Entry point of `planish`."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            app()
        except PlanishError as error:
            _say(f"planish: {error}", Console(stderr=True), style="red")
            sys.exit(2)


def show_event(event: "Event") -> None:
    """One line for each span: block, loss, time left, memory; a note above it."""
    if event.note:
        _say(f"    {event.note}")
    if not event.index:
        return
    words = [f"{event.stage} {event.index:>3}/{event.total}"]
    if event.before is not None and event.after is not None:
        words.append(f"loss {event.before:.3e} -> {event.after:.3e}")
    if event.eta is not None:
        words.append(f"{_clock(event.eta)} left")
    if event.peak_bytes:
        words.append(f"peak {_size(event.peak_bytes)}")
    _say("   ".join(words))


def prompt_ids(tokenizer: Any, prompt: str, raw: bool = False) -> Any:
    """A prompt as token ids [1, n], in the tokenizer's chat template if it has one."""
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def _scheme(scheme: str | None, bits: int | None) -> str:
    """--scheme, or --bits: at 2 bits a group of 128 loses too much, so that 2 means w2g64."""
    if scheme is not None and bits is not None:
        raise PlanishError(f"--scheme {scheme} and --bits {bits} say the same thing twice; give one of them")
    if bits is None:
        return scheme or "w4g128"
    return f"w{bits}g{64 if bits == 2 else 128}"


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


def _of_blocks(own: Iterable[str]) -> list[str]:
    """Keys that are the blocks' where the whole-model stage has one of that name: the option sets the latter."""
    return [key.removeprefix("e2e_") for key in own if key.startswith("e2e_")]


def _show_recipe(facts: dict[str, Any]) -> None:
    _say(f"{facts['name']}: {facts['summary']}\n\n    {facts['equation']}\n")
    table = Table("key", "default", "meaning", box=None)
    for key, default in facts["keys"].items():
        table.add_row(key, str(default), facts["help"].get(key, ""))
    Console().print(table)
    _say("\npresets")
    for name, keys in facts["presets"].items():
        _say(f"    {name:<8} {_pairs(keys)}")


def _show_linears(shapes: dict[str, tuple[int, int]], schemes: dict[str, str], every: bool) -> None:
    """Linears by name, or those that are alike but for the block's number in one row."""
    rows: dict[tuple[str, str, str], int] = {}
    for name, (out_features, in_features) in shapes.items():
        shown = name if every else re.sub(r"\.\d+\.", ".*.", name, count=1)
        row = (shown, f"{out_features} x {in_features}", schemes[name])
        rows[row] = rows.get(row, 0) + 1
    table = Table("linear", "out x in", "scheme", "count", box=None)
    for row, count in rows.items():
        table.add_row(*row, str(count))
    Console().print(table)


def _pairs(keys: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in keys.items())


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    _say(f"warning: {message}", Console(stderr=True), style="yellow")


def _say(text: str, console: Console | None = None, style: str | None = None) -> None:
    (console or Console()).print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def _disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
