"""Planish's default beside AutoRound: seconds, perplexity, and seven zero-shot tasks on full sets.

    python benchmarks/beside.py OUT.json MODEL WIKITEXT2 TASKS WHO:SCHEME[:KEYS]... [--questions N] [--bos] [--shared]
        [--no-cudnn] [--tiny]

WHO is 16-bit (no scheme), planish, or an AutoRound: `auto-round` (its default, 200 steps on 128 windows) or
`auto-round-best` (1000 on 512). KEYS are of planish: samples=128,e2e_epochs=8. A scheme says whether it is symmetric:
w2g64, w2g64asym. All are calibrated on random windows of 2048 tokens of wiki.train.part.raw and share a process, an
environment and an evaluation: perplexity of wiki.valid.tokens (as benchmarks/compare.py has it) and wiki.test.raw, then
the tasks of benchmarks/zero_shot.py, of which TASKS is the folder. Seconds are from the model's folder to the quantized
model in memory, imports aside. --bos begins each window with the token that the model begins every text with (not the
tasks: --questions 0 goes with it): Gemma is lost without it. --no-cudnn keeps torch from cuDNN's attention. AutoRound
is imported only if asked for; rows are written as they come, and what OUT.json has isn't measured again.
"""

import argparse
import datetime
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import zero_shot
from compare import detokenised, tokens_of, windows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import planish
from planish.data import join_rows
from planish.log import versions
from planish.recipes import split_preset
from planish.scheme import Scheme

ROUNDS = {"auto-round": (200, 128), "auto-round-best": (1000, 512)}  # steps, windows
SEQLEN = 2048


def own_positions(model: PreTrainedModel) -> PreTrainedModel:
    """AutoRound 0.16.1 runs each block on the first one's positions and mask. Of a model whose layers differ in those,
    as Gemma 3's do (transformers 5), the layers of full attention take their own here."""
    decoder = model.model
    kinds = getattr(model.config, "layer_types", None) or []

    def whole(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = kwargs["hidden_states"]
        places = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        positions = decoder.rotary_emb.to(hidden.device)(hidden, places, "full_attention")
        return args, kwargs | {"position_embeddings": positions, "attention_mask": None}

    for layer, kind in zip(decoder.layers, kinds, strict=False):
        if kind == "full_attention" and len(set(kinds)) > 1:
            layer.self_attn.register_forward_pre_hook(whole, with_kwargs=True)
    return model


def auto_round(model: str, scheme: Scheme, calibration: Tensor, steps: int, device: str) -> PreTrainedModel:
    """AutoRound through its Python entry, on the given windows [samples, tokens]; all else is its default."""
    import auto_round.calib_dataset as loader
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme

    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in calibration.split(8)]
    loader.get_dataloader = lambda *given, **more: batches
    how = QuantizationScheme(
        bits=scheme.bits, group_size=scheme.group_size, sym=scheme.symmetric, data_type="int", act_bits=16
    )
    made, _ = AutoRound(
        own_positions(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)),
        AutoTokenizer.from_pretrained(model), scheme=how, iters=steps, nsamples=len(calibration),
        seqlen=calibration.shape[1], batch_size=8, dataset="given", device_map=device,
    ).quantize()  # fmt: skip
    return made.to(device).eval()


def made(
    args: argparse.Namespace, who: str, scheme: str, keys: dict[str, str], draw: Any
) -> tuple[Any, dict[str, Any]]:
    """The model of a setting, and what making it took."""
    if who == "16-bit":
        return planish.load(args.model, device=args.device), {}
    own = dict(keys)
    steps, samples = ROUNDS.get(who, (0, int(own.pop("samples", split_preset("planish", None)[1]["samples"]))))
    steps, samples = (min(steps, 2), 8) if args.tiny else (steps, samples)
    calibration = draw(samples)
    began = time.perf_counter()
    if who in ROUNDS:
        model = auto_round(args.model, Scheme.parse(scheme), calibration, steps, args.device)
    else:
        model = planish.quantize(args.model, who, scheme, data=calibration, samples=samples,
                                 seqlen=calibration.shape[1], device=args.device, **own)  # fmt: skip
    return model, {"windows": samples, "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("settings", nargs="+", help="WHO:SCHEME[:KEYS], or 16-bit")
    parser.add_argument("--questions", type=int, help="of each task, all if not given; 0 leaves them out")
    parser.add_argument("--bos", action="store_true")
    parser.add_argument("--shared", action="store_true", help="other work ran on the GPU: seconds aren't to be quoted")
    parser.add_argument("--no-cudnn", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="short windows and a step or two: a dry run")
    args = parser.parse_args()
    seqlen, limit = (64, 2) if args.tiny else (SEQLEN, None)
    args.questions = 3 if args.tiny and args.questions is None else args.questions
    if args.bos and args.questions != 0:
        parser.error("the tasks' prompts have no first token of their own: give --questions 0 with --bos")
    if args.no_cudnn:
        torch.backends.cuda.enable_cudnn_sdp(False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    first = torch.tensor([tokenizer.bos_token_id] if args.bos else [], dtype=torch.int64)

    def begun(rows: Tensor) -> Tensor:
        return torch.cat([first.expand(len(rows), len(first)), rows], 1)

    def tokens(name: str, text: Any = join_rows) -> Tensor:
        return tokens_of(tokenizer, text((args.data / name).read_text(encoding="utf-8")))

    train = tokens("wiki.train.part.raw")
    texts = {"valid": tokens("wiki.valid.tokens", lambda text: detokenised(join_rows(text))),
             "test": tokens("wiki.test.raw")}  # fmt: skip
    own = seqlen - len(first)  # tokens of a window that are text
    report = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": []}
    for setting in args.settings:
        who, scheme, pairs = [*setting.split(":"), "", ""][:3]
        keys = dict(pair.split("=") for pair in pairs.split(",") if pair)
        known = {"who": who, "scheme": scheme, "keys": keys}
        known |= {"questions": args.questions, "bos": args.bos, "alone": not args.shared}
        known |= {"cudnn": False} if args.no_cudnn else {}
        if any(known.items() <= row.items() for row in report["rows"]):
            continue
        model, facts = made(args, who, scheme, keys, lambda samples: begun(windows([train], samples, own, 0)))
        row: dict[str, Any] = known | facts
        for name, ids in texts.items():
            whole = begun(ids[: len(ids) // own * own].view(-1, own)).flatten()
            row[name] = round(planish.perplexity(model, whole, seqlen=seqlen, limit=limit), 3)
        if args.questions != 0:
            began = time.perf_counter()
            row["tasks"] = zero_shot.scores(model, tokenizer, args.tasks, args.questions)
            row["tasks_seconds"] = round(time.perf_counter() - began, 1)
        print(json.dumps(row), flush=True)
        peers = ["auto-round"] if any(other["who"] in ROUNDS for other in [*report["rows"], row]) else []
        report |= {
            "date": datetime.date.today().isoformat(),
            "model": Path(args.model).name,
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "versions": versions() | {name: metadata.version(name) for name in peers},
            "rows": [*report["rows"], row],
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        del model


if __name__ == "__main__":
    main()
