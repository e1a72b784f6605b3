"""Verbs that read: recipes, eval, generate, bench, info, report."""

import json
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from planish.cli.app import Compiled, Device, Folder, Seqlen, app, optional
from planish.cli.show import say, show_linears, show_recipe, size
from planish.errors import PlanishError


@app.command()
def recipes(name: Annotated[str | None, Argument(metavar="[NAME]", show_default=False)] = None) -> None:
    """List the methods; of one, show equation, keys and presets.

    \b
      planish recipes
      planish recipes planish
    """
    from planish.recipes import RECIPES, describe

    if name is not None:
        show_recipe(describe(name))
        return
    table = Table("recipe", "what it is", "presets", box=None)
    for known in RECIPES:
        facts = describe(known)
        table.add_row(known, facts["summary"], " ".join(facts["presets"]))
    Console().print(table)
    say("\nplanish recipes NAME shows one's equation and keys; your own is --recipe ./mine.py:function")


@app.command(name="eval", no_args_is_help=True)
def evaluate(
    folder: Folder,
    ppl: Annotated[str | None, optional("Perplexity of a file or a data set of the hub.", metavar="TEXT")] = None,
    seqlen: Seqlen = 2048,
    protocol: Annotated[str | None, optional("gptq: the whole text, BOS before it if the tokenizer has it so.")] = None,
    tasks: Annotated[str | None, optional("Tasks of lm-eval.", metavar="NAME,...")] = None,
    shots: Annotated[int | None, optional("Answered questions before each; the task's own if not given.")] = None,
    task_data: Annotated[Path | None, optional("Folder of lm-eval's YAML files, to use no other.")] = None,
    agree: Annotated[str | None, optional("Agreement with this float model.", metavar="MODEL")] = None,
    prompts: Annotated[str | None, optional("Conversations to agree on; 32 of our own if not given.")] = None,
    limit: Annotated[int | None, optional("Only the first so many windows, questions or prompts.")] = None,
    batch_size: Annotated[int | None, optional("Sequences at once; by their length if not given.")] = None,
    device: Device = None,
) -> None:
    """Measure perplexity, tasks, or agreement with the float model; perplexity if nothing is named.

    \b
      the field's protocol; rows of a .raw file are joined as it does:
        planish eval q4 --ppl wiki.test.raw
      for comparison with published figures, to the token:
        planish eval q4 --ppl wiki.test.raw --protocol gptq
      quick, on the language reference that Python carries:
        planish eval q4 --seqlen 512 --limit 16
      what is right of questions, by lm-eval; without a network, from a folder of its YAML files:
        planish eval q4 --tasks piqa,arc_easy,hellaswag
        planish eval q4 --tasks mmlu --shots 5 --task-data ./tasks
      how near to the float model the answers to chat prompts are, token by token:
        planish eval q4 --agree org/name --prompts chats.jsonl

    Perplexity: non-overlapping windows, no BOS, float32 logits. Tasks need pip install planish[eval]. Figures are
    kept in DIR/eval.json, for planish report.
    """
    from planish.card import refresh
    from planish.eval import record

    if protocol not in (None, "gptq"):
        raise PlanishError(f"no protocol {protocol!r}: there is gptq; without one no BOS is added")
    if protocol and limit:
        raise PlanishError(f"--protocol {protocol} measures the whole text; drop --limit")
    where = Path(folder)
    before = record.read(where)
    if ppl is None and (protocol or (tasks is None and agree is None)):
        ppl = "embedded-eval"
    if tasks is None and (shots is not None or task_data is not None):
        raise PlanishError("--shots and --task-data say how --tasks are measured; give --tasks too")
    if agree is None and prompts is not None:
        raise PlanishError("--prompts says on what models agree; give the float one with --agree too")
    _measure(folder, where, ppl, seqlen, protocol, tasks, shots, task_data, agree, prompts, limit, batch_size, device)
    if where.is_dir():
        refresh(where, before)


def _measure(
    folder: str, where: Path, ppl: str | None, seqlen: int, protocol: str | None, tasks: str | None,
    shots: int | None, task_data: Path | None, agree: str | None, prompts: str | None, limit: int | None,
    batch_size: int | None, device: str | None,
) -> None:  # fmt: skip
    """What `evaluate` was asked for, one after another; the float model is gone before the other comes."""
    import planish
    from planish.eval import record
    from planish.eval.agreement import LIMIT
    from planish.folder import tokenizer_of

    said = None
    if agree is not None:
        float_model = planish.load(agree, device=device)
        said = planish.reference(float_model, prompts, limit=LIMIT if limit is None else limit, batch_size=batch_size)
        del float_model
    loaded = planish.load(folder, device=device)
    if ppl is not None:
        value = planish.perplexity(
            loaded, ppl, seqlen=seqlen, batch_size=batch_size or 8, limit=limit, bos=protocol == "gptq"
        )
        if protocol:
            ppl = f"{Path(ppl).name if Path(ppl).is_file() else ppl}, protocol {protocol}"
        if where.is_dir():
            record.record_perplexity(where, ppl, seqlen, limit, value)
        say(f"perplexity {value:.4g}   ({ppl}, windows of {seqlen}{f', the first {limit}' if limit else ''})")
    if tasks is not None:
        names = [name for name in tasks.split(",") if name]
        asked: Any = {"shots": shots, "limit": limit, "batch_size": batch_size, "task_data": task_data}
        found = planish.evaluate(loaded, names, tokenizer=tokenizer_of(loaded), **asked)
        if where.is_dir():
            record.record_tasks(where, found, shots, limit)
        say("\n".join(_task_lines(found)))
    if said is not None:
        near = planish.agreement(loaded, said, batch_size=batch_size)
        if where.is_dir():
            values = {**vars(near), "count": near.prompts}
            del values["prompts"]
            record.record_agreement(where, str(agree), said.name, values)
        say(f"KL {near.kl:.4f} ± {near.kl_stderr:.4f} nats a token, top-1 {100 * near.top1:.2f} ± "
            f"{100 * near.top1_stderr:.2f} %   ({near.prompts} prompts, {near.tokens} tokens)")  # fmt: skip


def _task_lines(found: dict[str, dict[str, float]]) -> list[str]:
    """A line a task: its first metric and standard error; and their mean."""
    lines, firsts = [], []
    for name, metrics in found.items():
        metric, value = next(iter(metrics.items()), ("", float("nan")))
        error = f" ± {metrics['stderr']:.4f}" if "stderr" in metrics else ""
        lines.append(f"{name:<16} {metric} {value:.4f}{error}")
        firsts.append(value)
    return [*lines, f"{'mean':<16} {sum(firsts) / len(firsts):.4f}"] if len(firsts) > 1 else lines


@app.command(no_args_is_help=True)
def generate(
    folder: Folder,
    prompt: Annotated[str, Argument(show_default=False)],
    tokens: Annotated[int, Option(help="At most so many new tokens.")] = 64,
    temperature: Annotated[float, Option(help="0 is greedy.")] = 0.0,
    raw: Annotated[bool, Option("--raw", help="Continue the prompt, without a chat template.")] = False,
    seed: Annotated[int, Option(help="Of the sampling.")] = 0,
    compiled: Compiled = False,
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
    ids = prompt_ids(tokenizer, prompt, raw=raw).to(loaded.device)
    output = planish.generate(loaded, ids, new_tokens=tokens, temperature=max(temperature, 0.0), compiled=compiled)
    say(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@app.command(no_args_is_help=True)
def bench(
    folder: Folder,
    batch: Annotated[str | None, optional("Prompts at a time, such as 1,8,32; on a CPU 1.")] = None,
    prompt: Annotated[int | None, optional("Tokens of a prompt: 128, on a CPU 32.")] = None,
    new: Annotated[int | None, optional("Tokens of an answer: 128, on a CPU 32.")] = None,
    dense: Annotated[bool, Option("--dense", help="Beside it the same model with 16-bit weights.")] = False,
    compiled: Compiled = False,
    out: Annotated[Path | None, Option("--json", metavar="FILE", help="Write the figures there too.")] = None,
    device: Device = None,
) -> None:
    """Measure speed: tokens a second, time to the first token, memory, share of the memory's bandwidth.

    \b
      planish bench q4
      planish bench q4 --batch 1,8,32 --dense --compile
    """
    import planish
    from planish import bench as benches

    loaded = planish.load(folder, device=device)
    small = loaded.device.type == "cpu"
    batches = counts(batch or ("1" if small else "1,8,32"), "--batch")
    asked: Any = {
        "batches": batches,
        "prompt": prompt or (32 if small else 128),
        "new": new or (32 if small else 128),
        "compiled": compiled,
    }
    found = benches.bench(loaded, **asked)
    say("\n".join(found.lines()))
    figures = {"model": str(folder), **found.figures()}
    if dense:
        beside = benches.bench(benches.dense(loaded), **asked, speed_of_memory=found.bandwidth)
        say("\n".join(["with 16-bit weights", *beside.lines()]))
        figures["dense"] = beside.figures()
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")


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
    from planish import api

    found = api.info(folder)
    say("\n".join(found.summary()))
    if found.source.folder is not None:
        say(f"{size(sum(file.stat().st_size for file in found.source.folder.glob('*.safetensors')))} on disk")
    show_linears(found.shapes, {name: str(found.schemes.get(name, "16-bit")) for name in found.shapes}, every=linears)


@app.command(no_args_is_help=True)
def report(
    folders: Annotated[list[Path], Argument(metavar="DIR...", show_default=False)],
    out: Annotated[Path, Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one HTML page on checkpoints: how they were made, loss and error by layer, what was measured.

    \b
      planish report q4
      planish report q4 q3 q2 --out compare.html
    """
    from planish.report import write_report

    say(f"wrote {write_report(folders, out)}")


def counts(text: str, option: str) -> list[int]:
    """1,8,32 as numbers."""
    words = text.split(",")
    if not all(word.strip().isdigit() for word in words):
        raise PlanishError(f"{option} {text!r} isn't a list of counts; write it as 1,8,32")
    return [int(word) for word in words]


def prompt_ids(tokenizer: Any, prompt: str, raw: bool = False) -> Any:
    """A prompt as token ids [1, n], in the tokenizer's chat template if it has one."""
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
