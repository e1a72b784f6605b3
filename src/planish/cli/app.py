"""The typer application and the options that several verbs share.

Torch and transformers are imported inside the verbs, so that --help answers at once.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

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
  planish bench q4 --dense
  planish export q4 --target vllm --out q4-vllm
  planish report q4 q2 --out report.html

A scheme is written as w4g128 (4 bits, one scale for 128 weights), w2g64asym (with zero points) or
w4pc (one scale a row). Each verb's --help has examples of its own.
"""


def optional(text: str, **more: Any) -> Any:
    """An option whose default is to say nothing."""
    return Option(help=text, show_default=False, **more)


ModelName = Annotated[str, Argument(metavar="MODEL")]
Folder = Annotated[str, Argument(metavar="DIR", help="A folder or hub id, quantized or not.")]
Device = Annotated[str | None, optional("cpu, cuda, cuda:1; the GPU if there is one.")]
Compiled = Annotated[bool, Option("--compile", help="Compile the blocks first; pays for long answers.")]
Seqlen = Annotated[int, Option(help="Tokens of a window.")]
Pairs = Annotated[list[str] | None, Argument(metavar="[KEY=VALUE]...", show_default=False)]
RecipeName = Annotated[str, Option(help="Method by name, or ./mine.py:function.")]
Preset = Annotated[str | None, optional("fast, light, default, best, paper.")]
SchemeText = Annotated[str | None, optional("Such as w4g128 (the default), w2g64asym, w4pc, w4a4.")]
Bits = Annotated[str | None, optional("Short for a scheme: 2 is w2g64, 3 is w3g128; 2.5 an average.", metavar="BITS")]
Layers = Annotated[list[str] | None, optional("Scheme of some linears.", metavar="REGEX=SCHEME")]
Ignore = Annotated[list[str] | None, optional("Linears to leave in 16 bits.", metavar="REGEX")]
Embeddings = Annotated[int | None, optional("Bits of embedding and head: 16, 8 or 4 (native, gguf).")]
Inexact = Annotated[bool, Option("--inexact", help="Round once more what the format can't hold; say what is lost.")]
Calibration = Annotated[str, Option(help="Calibration text, or a mix: a.txt,b.jsonl:2,embedded,self.")]
Watched = Annotated[str | None, optional("Text by which the state kept is chosen; of a mix the embedded one.")]
Samples = Annotated[int | None, optional("Windows of the text; 128 unless the preset says.")]
Tokens = Annotated[int | None, optional("Tokens of a window; 2048 unless the preset says.")]
BatchSize = Annotated[int | None, optional("Windows a step; the recipe's own if not given.")]
Revision = Annotated[str | None, optional("Of a hub model.")]
Storage = Annotated[str, Option(help="Where activations wait: auto, device, host, disk.")]
Format = Annotated[
    str,
    Option(help="On disk: auto, auto_round, gptq, gptq_v2, compressed_tensors, compressed_tensors_int, native, gguf."),
]
Target = Annotated[str | None, optional("Who shall load it: vllm, sglang, transformers, llama.cpp.")]
TensorParallel = Annotated[int, Option("--tp", help="GPUs that vllm or sglang will cut a layer for.")]
Out = Annotated[Path | None, optional("Folder to write; must be new or empty.")]


@app.callback(help=_OVERVIEW)
def planish() -> None:
    pass
