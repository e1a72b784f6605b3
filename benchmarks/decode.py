"""Decoding end to end: models of Llama-2's shapes with random weights, packed ones beside the one of 16 bits.

    python benchmarks/decode.py OUT.json [--cases 7b:16,7b:w2g64asym] [--seconds 500] [--profile]
    python benchmarks/decode.py OUT.json --ways [--seconds 140]
    python benchmarks/decode.py OUT.json --load [--folder DIR]

Batch 1, 128 new tokens after a prompt of 128, by `planish.decode`: a step is one CUDA graph on either side, first as
transformers runs it, then with compiled blocks. `times` is a case's tokens a second over those of 16 bits, run the same
way; TARGETS are for compiled blocks. Packed weights are made as they are loaded: a file's bit stream, laid out on the
GPU, so that the floats of a model never exist. --profile adds the kernels of a step.

--ways times what a step of compiled blocks may do without: kernels that overlap (`overlap`) and an attention made for
one query (`one query`), neither, each, both; and that attention alone beside torch's, over full caches.

--load writes a checkpoint of a 7B shape in 4 and in 16 bits (18 GB), and times from the call that loads it to the
first token of an answer: Planish on the one, transformers on the other, each in a process of its own, files in the
page cache; what loading consists of, part by part; then how fast weights are laid out. --tiny runs small shapes, on a
CPU too; its figures mean nothing.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import planish
from planish.arch import discover, linears
from planish.bench import bandwidth_of, bench, seconds
from planish.bitstream import Stream, words_for
from planish.checkpoint import CheckpointWriter
from planish.decode import Decoder
from planish.folder import QuantizedFolder, config_of
from planish.formats import FORMATS
from planish.guard import Stored
from planish.kernels.cuda_attend import attend_one
from planish.kernels.linear import PackedLinear
from planish.kernels.records import Records, hold
from planish.kernels.siblings import settle
from planish.log import versions
from planish.qtensor import midpoint
from planish.scheme import Scheme
from planish.skeleton import build, put, ready, start_buffers

STARTED = time.perf_counter()
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
DTYPE = torch.float16 if CUDA else torch.bfloat16
TINY = "--tiny" in sys.argv
PROMPT, NEW = (24, 8) if TINY else (128, 128)
SHAPES = {  # hidden, intermediate, layers, heads, heads of keys and values, vocabulary
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "70b": (8192, 28672, 80, 64, 8, 32000),
    "tiny": (256, 512, 3, 4, 2, 512),
}
CASES = "7b:16,7b:w2g64asym,7b:w3g128asym,7b:w4g128asym,70b:w2g64asym"
TARGETS = {"7b:w2g64asym": ("times", 3.4), "7b:w3g128asym": ("times", 2.8), "7b:w4g128asym": ("times", 2.5),
           "70b:w2g64asym": ("tokens/s", 75.0)}  # fmt: skip


def config_for(shape: str) -> LlamaConfig:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, dtype=DTYPE, tie_word_embeddings=False,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip


def random_stream(shape: tuple[int, int], scheme: Scheme) -> Stream:
    """A weight as a file holds it, on the device; rows are whole words."""
    (out_features, in_features), bits = shape, scheme.bits
    grid = out_features, scheme.groups_in(in_features)
    words = out_features, words_for(in_features, bits)
    return Stream(
        codes=torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32, device=DEVICE),
        scale=((torch.rand(grid, device=DEVICE) + 0.5) * 0.04 / 2**bits).half(),
        zero=None if scheme.symmetric else torch.full(grid, midpoint(bits), dtype=torch.uint8, device=DEVICE),
        bits=bits,
        group_size=scheme.group_in(in_features),
        in_features=in_features,
    )


def make(shape: str, scheme: Scheme | None) -> PreTrainedModel:
    """A model of random weights, its blocks packed, or in 16 bits."""
    stored = Stored(tensors=10_000, largest=2**20, bytes=2**40)
    model = build(config_for(shape), DTYPE, shape, False, stored)
    start_buffers(model, shape, stored)
    ready(model)
    if scheme is not None:
        for name, size in linears(discover(model), model).items():
            model.set_submodule(name, PackedLinear(Records.of(random_stream(size, scheme))))
    for name, parameter in list(model.named_parameters()):
        real = torch.ones if parameter.ndim == 1 else torch.empty
        values = real(parameter.shape, dtype=DTYPE, device=DEVICE)
        put(model, name, nn.Parameter(values if parameter.ndim == 1 else values.normal_(0, 0.02), requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        put(model, name, buffer.to(DEVICE))
    return settle(model)


def measure(case: str, speed_of_memory: float, profile: bool) -> dict:
    shape, _, scheme = case.partition(":")
    before = time.perf_counter()
    model = make(shape, None if scheme == "16" else Scheme.parse(scheme))
    result = {"case": case, "seconds to make": time.perf_counter() - before}
    for name, compiled in (("plain", False), ("compiled", True)):
        before = time.perf_counter()
        found = bench(
            model, batches=(1,), prompt=PROMPT, new=NEW, compiled=compiled, speed_of_memory=speed_of_memory
        )
        (speed,) = found.speeds
        result[name] = found.figures() | {
            "tokens/s": speed.rate,
            "tokens/s with the prompt": NEW / (speed.first + (NEW - 1) / speed.rate),
            "seconds": time.perf_counter() - before,
        }
        if profile:
            result[name]["kernels"] = kernels(model, compiled)
        print(
            f"{case:14} {name:8} {speed.rate:7.1f} tokens/s  first token {1e3 * speed.first:6.1f} ms  "
            f"{speed.share:4.0%} of the bandwidth  {found.memory / 1e9:5.1f} GB  "
            f"{'graph' if found.captured else 'no graph'}  ({result[name]['seconds']:.0f} s)",
            flush=True,
        )
        for kernel in result[name].get("kernels", ()):
            print(f"    {kernel['us']:8.1f} us {kernel['count']:6.1f} x {kernel['name'][:100]}", flush=True)
    return result


def kernels(model: PreTrainedModel, compiled: bool, steps: int = 4) -> list[dict]:
    """What a step runs, by kernel, the longest first."""
    decoder = Decoder(model, 1, PROMPT + NEW, compiled=compiled)
    decoder.start(torch.zeros(1, PROMPT, dtype=torch.int64, device=DEVICE))
    decoder.advance(2)
    with torch.profiler.profile() as seen:
        seconds(lambda: decoder.advance(steps), DEVICE)
    events = [event for event in seen.key_averages() if event.self_device_time_total] if CUDA else []
    events.sort(key=lambda event: -event.self_device_time_total)
    return [
        {"name": event.key, "us": event.self_device_time_total / steps, "count": event.count / steps}
        for event in events[:16]
    ]


WAYS = {"neither": (False, False), "overlap": (True, False), "one query": (False, True), "both": (True, True)}


def compare_ways(cases: list[str], limit: float) -> list[dict]:
    """Milliseconds a step takes, compiled, each way; at 16 and 2 bits all of them, else the first and the last."""
    speed_of_memory, results = bandwidth_of(DEVICE), []
    for number, case in enumerate(cases):
        shape, _, scheme = case.partition(":")
        model = make(shape, None if scheme == "16" else Scheme.parse(scheme))
        for way, (overlap, one_query) in WAYS.items():
            if time.perf_counter() - STARTED > limit:
                print("out of time before", case, way)
                return results
            if number > 1 and way not in ("neither", "both"):
                continue
            before = time.perf_counter()
            found = bench(model, batches=(1,), prompt=PROMPT, new=NEW, compiled=True, speed_of_memory=speed_of_memory,
                          overlap=overlap, one_query=one_query)  # fmt: skip
            (speed,) = found.speeds
            results.append({"case": case, "way": way, "ms": 1e3 / speed.rate, "tokens/s": speed.rate})
            print(f"{case:14} {way:10} {1e3 / speed.rate:7.3f} ms  {speed.rate:7.1f} tokens/s  "
                  f"({time.perf_counter() - before:.0f} s)", flush=True)  # fmt: skip
        del model
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    return results


def attention(heads: int, kv_heads: int, dim: int, length: int, layers: int) -> dict[str, float]:
    """Microseconds of one call over a full cache, each with a cache of its own that no other call has just read."""
    caches = torch.randn(layers, 2, 1, kv_heads, length, dim, device=DEVICE, dtype=DTYPE)
    query = torch.randn(1, heads, 1, dim, device=DEVICE, dtype=DTYPE)
    key, value = torch.randn(2, 1, kv_heads, 1, dim, device=DEVICE, dtype=DTYPE)
    filled = torch.tensor(length - 1, device=DEVICE)
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=DEVICE)

    def ours() -> None:
        for keys, values in caches:
            attend_one(query, key, value, keys, values, filled, dim**-0.5)

    def torchs() -> None:  # as transformers calls it in compiled blocks
        for cache in caches:
            keys, values = (part.repeat_interleave(heads // kv_heads, 1) for part in cache)
            nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    times = {}
    for name, calls in (("ours", ours), ("sdpa", torchs)):
        calls()
        replay = calls
        if CUDA:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                calls()
            replay = graph.replay
        times[name] = 1e6 * min(seconds(replay, DEVICE) for _ in range(5)) / layers
    return times


def attention_figures() -> list[dict]:
    found = []
    for shape in ("tiny",) if TINY else ("7b", "70b"):
        hidden, _, _, heads, kv_heads, _ = SHAPES[shape]
        for length in (64,) if TINY else (256, 1024, 4096):
            times = attention(heads, kv_heads, hidden // heads, length, 3 if TINY else 32)
            found.append({"shape": shape, "length": length, "us": times})
            print(f"attention {shape:4} {length:5} tokens: ours {times['ours']:6.1f} us, sdpa {times['sdpa']:6.1f} us",
                  flush=True)  # fmt: skip
    return found


def compare(cases: list[str], limit: float, profile: bool) -> list[dict]:
    speed_of_memory, results, base = bandwidth_of(DEVICE), [], {}
    print(f"{speed_of_memory / 1e12:.2f} TB/s", flush=True)
    for case in cases:
        if time.perf_counter() - STARTED > limit:
            print("out of time before", case)
            break
        found = measure(case, speed_of_memory, profile)
        shape, _, scheme = case.partition(":")
        for way in ("plain", "compiled"):
            if scheme == "16":
                base[shape, way] = found[way]["tokens/s"]
            if (shape, way) in base:
                found[way]["times"] = found[way]["tokens/s"] / base[shape, way]
        if case in TARGETS:
            figure, least = TARGETS[case]
            reached = found["compiled"].get(figure)
            found["target"] = {"figure": figure, "least": least, "reached": reached}
            print(f"{case:14} {figure} {reached or float('nan'):.2f}, target {least}", flush=True)
        results.append(found)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    return results


def write(folder: Path, shape: str, scheme: Scheme | None) -> None:
    """A checkpoint of random weights, native, or as transformers writes one of 16 bits."""
    if scheme is None:
        make(shape, None).save_pretrained(folder)
        return
    skeleton = build(config_for(shape), DTYPE, shape, False)
    schemes = dict.fromkeys(linears(discover(skeleton), skeleton), scheme)
    with CheckpointWriter(folder) as writer:
        for name, parameter in skeleton.named_parameters():
            layer = name.removesuffix(".weight")
            if layer in schemes:
                stream = random_stream((parameter.shape[0], parameter.shape[1]), scheme)
                for key, tensor in FORMATS["native"].write(layer, stream).items():
                    writer.add(key, tensor.cpu())
            else:
                values = torch.ones if parameter.ndim == 1 else torch.randn
                writer.add(name, values(parameter.shape, dtype=DTYPE, device=DEVICE).cpu())
        words = FORMATS["native"].config({**schemes, "lm_head": None})
        writer.finish(config_of(skeleton.config, skeleton, DTYPE, words))


def load_one(kind: str, folder: str) -> None:
    """Runs in a process of its own: from the call that loads a checkpoint to the first token, as JSON on stdout."""
    torch.zeros(1, device=DEVICE)
    start = time.perf_counter()
    if kind == "planish":
        model = planish.load(folder, device=DEVICE)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, device_map={"": DEVICE}).eval()
    loaded = time.perf_counter()
    decoder = Decoder(model, 1, PROMPT + 1)
    decoder.start(torch.zeros(1, PROMPT, dtype=torch.int64, device=DEVICE))
    decoder.token.item()
    done = time.perf_counter()
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    again = seconds(lambda: decoder.start(torch.zeros(1, PROMPT, dtype=torch.int64, device=DEVICE)), DEVICE)
    figures = {"load": loaded - start, "first token": done - start, "prompt again": again, "peak GB": peak / 1e9}
    print(json.dumps(figures))


def phases(folder: str) -> None:
    """Runs in a process of its own: what loading consists of, each part by itself, one layer after another; as JSON."""
    torch.zeros(1, device=DEVICE)
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        before = time.perf_counter()
        made = work()
        if CUDA:
            torch.cuda.synchronize()
        found[name] = time.perf_counter() - before
        return made

    opened: QuantizedFolder = timed("headers and skeleton", lambda: QuantizedFolder.open(folder))
    keys = [key for key in opened.source.names() if key.rpartition(".")[0] in opened.schemes]
    here = timed("read into memory", lambda: opened.source.tensors(keys))
    size = sum(tensor.nbytes for tensor in here.values())
    timed("to the device, pageable", lambda: [tensor.to(DEVICE) for tensor in here.values()])
    here.clear()
    streams = timed("read to the device", lambda: [opened.stream(name, DEVICE) for name in opened.schemes])
    timed("first layout", lambda: hold(streams[0], DTYPE))
    held = timed("lay out", lambda: [hold(stream, DTYPE) for stream in streams])
    found["lay out, GB/s"] = size / found["lay out"] / 1e9
    found["read to the device, GB/s"] = size / found["read to the device"] / 1e9
    streams.clear(), held.clear()
    timed("layers by two threads", lambda: list(opened.held(DEVICE, DTYPE)))
    model = timed("the whole load", lambda: planish.load(folder, device=DEVICE))
    decoder = timed("decoder", lambda: Decoder(model, 1, PROMPT + 1))
    timed("first token", lambda: decoder.start(torch.zeros(1, PROMPT, dtype=torch.int64, device=DEVICE)))
    timed("first token again", lambda: decoder.start(torch.zeros(1, PROMPT, dtype=torch.int64, device=DEVICE)))
    print(json.dumps(found))


def load_figures(shape: str, folder: Path | None) -> dict:
    found: dict = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        kinds = {"planish": Scheme.parse("w4g128asym"), "transformers": None}
        for kind, scheme in kinds.items():
            before = time.perf_counter()
            write(Path(scratch) / kind, shape, scheme)
            files = list((Path(scratch) / kind).glob("*.safetensors"))
            size = sum(len(file.read_bytes()) for file in files)  # into the page cache
            found[kind] = {"GB": size / 1e9, "runs": []}
            print(f"{kind}: {size / 1e9:.2f} GB written and read in {time.perf_counter() - before:.0f} s", flush=True)
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
        for _ in range(2):
            for kind in kinds:
                command = [sys.executable, __file__, "--one", kind, str(Path(scratch) / kind), *["--tiny"] * TINY]
                run = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
                found[kind]["runs"].append(run)
                print(kind, {key: round(value, 2) for key, value in run.items()}, flush=True)
        command = [sys.executable, __file__, "--phases", str(Path(scratch) / "planish"), *["--tiny"] * TINY]
        found["phases"] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        for name, value in found["phases"].items():
            print(f"    {name:26} {value:7.3f}{'' if 'GB/s' in name else ' s'}", flush=True)
    best = {kind: min(run["first token"] for run in found[kind]["runs"]) for kind in kinds}
    return {**found, "times": best["transformers"] / best["planish"]}


def repack_figures(shape: str) -> dict:
    """GB of codes, scales and zeros a second that are laid out."""
    hidden, intermediate, found = *SHAPES[shape][:2], {}
    for scheme in map(Scheme.parse, ("w2g64asym", "w3g128asym", "w4g128asym", "w4g128")):
        stream = random_stream((intermediate, hidden), scheme)
        size = sum(part.nbytes for part in (stream.codes, stream.scale, stream.zero) if part is not None)
        Records.of(stream)
        took = seconds(lambda stream=stream: [Records.of(stream) for _ in range(20)], DEVICE) / 20
        found[str(scheme)] = size / took / 1e9
        print(f"laid out {scheme}: {size / took / 1e9:.1f} GB/s ({took * 1e6:.0f} us)", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", default=None, help=f"shape:scheme, 16 being dense; {CASES}")
    parser.add_argument("--load", action="store_true", help="time loading instead")
    parser.add_argument("--ways", action="store_true", help="time what a step may do without instead")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are written; temporary otherwise")
    parser.add_argument("--profile", action="store_true", help="show the kernels of a step")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--seconds", type=float, default=500, help="start nothing after so long")
    asked = parser.parse_args()
    about = {"versions": versions(), "device": torch.cuda.get_device_name() if CUDA else "cpu", "prompt": PROMPT,
             "new": NEW, "dtype": str(DTYPE)}  # fmt: skip
    shape = "tiny" if TINY else "7b"
    if asked.load:
        result = {"about": about, "load": load_figures(shape, asked.folder), "repack GB/s": repack_figures(shape)}
    elif asked.ways:
        cases = (asked.cases or ("tiny:16,tiny:w2g64asym,tiny:w4g128" if TINY else CASES)).split(",")
        cases = [case for case in cases if not case.startswith("70b")]
        result = {"about": about, "attention": attention_figures(), "ways": compare_ways(cases, asked.seconds)}
    else:
        cases = (asked.cases or ("tiny:16,tiny:w2g64asym,tiny:w4g128" if TINY else CASES)).split(",")
        result = {"about": about, "cases": compare(cases, asked.seconds, asked.profile)}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.perf_counter() - STARTED:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        load_one(*sys.argv[2:4])
    elif sys.argv[1:2] == ["--phases"]:
        phases(sys.argv[2])
    else:
        main()
