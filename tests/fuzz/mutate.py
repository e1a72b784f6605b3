"""Mutate: damage a checkpoint in a way that somebody might, or that a machine might; the seed decides how.

A checkpoint is a dict of file name -> bytes; a mutation changes that dict and says what it did. JSON and the headers
of safetensors and GGUF are changed by their structure, so that most of them still parse; any file is also cut,
flipped, emptied and exchanged. Knows nothing of Planish.
"""

import copy
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

Files = dict[str, bytes]

NUMBERS = (
    -1,
    0,
    1,
    2,
    7,
    31,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**31),
    -(2**63),
    10**5,
    10**6,
    10**7,
    10**8,
    10**9,
    10**12,
    10**30,
    10**400,
    0.5,
    -0.5,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
)
TEXTS = (
    "",
    "x",
    "..",
    "../x",
    "../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "\x00",
    "\ud800",
    "a" * 100_000,
    "%s%n",
    "re:(a+)+$",
    "(a+)+$",
    "(.*)*x",
    ".*" * 12 + "x",
    "(((((",
    "[",
    "int8",
    "float16",
    "cuda",
    "main",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "org/repo",
    "org/repo:kernel",
    "auto",
)
THINGS = (None, True, False, [], {}, [[]], [{}], {"": None}, [0] * 5000, ["x"] * 5000, {"a": {"b": {"c": 1}}})
# fields that transformers acts on, whatever the model
FIELDS = {
    "num_labels": 10**9,
    "pruned_heads": {"0": [0, 1]},
    "auto_map": {"AutoConfig": "evil.Evil"},
    "configuration_files": ["config.4.0.0.json", "config../../x.json"],
    "attn_implementation": "org/kernel",
    "_attn_implementation": "flash_attention_2",
    "experts_implementation": "org/kernel",
    "dtype": "int8",
    "torch_dtype": "float64",
    "layer_types": ["full_attention"] * 3000,
    "model_type": "gpt2",
    "transformers_weights": "../x.safetensors",
    "text_config": {"num_hidden_layers": 10**9},
    "vision_config": {"depth": 10**9},
    "sliding_window": 10**9,
    "rope_scaling": {"rope_type": "yarn", "factor": -1},
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 0},
    "architectures": ["Nonsense"],
    "is_encoder_decoder": True,
    "tie_word_embeddings": "x",
    "name_or_path": "/etc",
    "base_model_tp_plan": 5,
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True},
    "max_position_embeddings": 10**9,
    "mlp_bias": True,
    "attention_bias": True,
    "hidden_act": "nonsense",
    "extra_config": {"(a+)+$": {"bits": 4}, ".*" * 12 + "x": {"bits": 16}},
    "dynamic": {"-:(.*)*x": {}},
    "layers": {"lm_head": "w4pc"},
    "scheme": "w2g1000000000",
    "generation_config": {"max_length": -1},
}
MODEL_TYPES = (
    "gpt2",
    "opt",
    "bloom",
    "mixtral",
    "qwen3_moe",
    "gemma3",
    "mamba",
    "xlm",
    "bert",
    "gptj",
    "t5",
    "phi3",
    "llama4",
    "rwkv",
    "falcon",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_5",
    "lfm2",
    "llava",
    "whisper",
    "olmo2",
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "")


def mutated(files: Mapping[str, bytes], others: list[Mapping[str, bytes]], random: Random) -> tuple[Files, list[str]]:
    """A damaged copy, and what was done; one to three mutations."""
    changed, done = dict(files), []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        name = random.choice(sorted(changed)) if changed else ""
        kind = name.rpartition(".")[2]
        structured = {"json": in_json, "safetensors": in_safetensors, "gguf": in_gguf}.get(kind)
        if not changed or random.random() < 0.04:
            done.append(_exchange(changed, name, others, random))
        elif structured is not None and random.random() < 0.8:
            try:
                changed[name], what = structured(changed[name], random)
            except RecursionError:  # an earlier mutation nested it deep
                changed[name], what = in_bytes(changed[name], random)
            done.append(f"{name}: {what}")
        else:
            changed[name], what = in_bytes(changed[name], random)
            done.append(f"{name}: {what}")
    return changed, done


def _exchange(files: Files, name: str, others: list[Mapping[str, bytes]], random: Random) -> str:
    """Remove a file, or take one of another checkpoint."""
    other = random.choice(others)
    if name and random.random() < 0.3:
        del files[name]
        return f"{name}: removed"
    name = random.choice(sorted(other))
    files[name] = other[name]
    return f"{name}: another's"


# ---- bytes


def in_bytes(data: bytes, random: Random) -> tuple[bytes, str]:
    """Cut, flip, repeat, empty or replace."""
    how = random.randrange(8)
    start = random.randrange(min(len(data), 4096) or 1) if random.random() < 0.7 else random.randrange(len(data) or 1)
    if how <= 2:
        flipped = bytearray(data)
        for _ in range(random.choice((1, 2, 8))):
            if flipped:
                flipped[random.randrange(min(len(flipped), 4096))] = random.randrange(256)
        return bytes(flipped), "bytes changed"
    if how == 3:
        return data[:start], f"cut at {start}"
    if how == 4:
        return data[:start] + data[start + random.choice((1, 8, 100)) :], f"bytes left out at {start}"
    if how == 5:
        return data[:start] + random.randbytes(random.choice((1, 8, 1000))) + data[start:], f"bytes put in at {start}"
    if how == 6:
        return data + random.randbytes(random.choice((1, 8, 5000))), "bytes added"
    whole = random.choice(
        (
            b"",
            b"[]",
            b"null",
            b"{",
            b"{}",
            b"\xff\xfe{}",
            b"[" * 200_000,
            b'{"a":' * 100_000,
            b"[" + b"{}," * 1_500_000 + b"{}]",
            b'{"weight_map": {}}',
            bytes(5000),
        )
    )
    return whole, f"replaced by {whole[:20]!r}"


# ---- JSON


def in_json(data: bytes, random: Random) -> tuple[bytes, str]:
    """Change a value somewhere in the tree."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return in_bytes(data, random)
    what = _change_tree(tree, random) if isinstance(tree, dict) else "nothing"
    text = json.dumps(tree)
    if random.random() < 0.05:
        text, what = _twice(text, random), f"{what}; a key twice"
    return text.encode("utf-8", "surrogatepass"), what


def _change_tree(tree: dict[str, Any], random: Random) -> str:
    if random.random() < 0.2:
        key = random.choice(list(FIELDS))
        owner = random.choice([tree, *(value for value in tree.values() if isinstance(value, dict))])
        owner[key] = random.choice(MODEL_TYPES) if key == "model_type" else copy.deepcopy(FIELDS[key])
        return f"{key} set to {_short(owner[key])}"
    places = list(_places(tree))
    if not places:
        return "nothing"
    owner, key = random.choice(places)
    how = random.randrange(10)
    if how == 0:
        del owner[key]
        return f"{key} removed"
    if how == 1 and isinstance(owner, dict):
        new = random.choice((*TEXTS[:8], f"{key}_", str(key).upper(), random.choice(list(FIELDS))))
        owner[new] = owner.pop(key)
        return f"{key} renamed {_short(new)}"
    if how == 2:
        other, place = random.choice(places)
        owner[key] = copy.deepcopy(other[place]) if place in other or isinstance(other, list) else None
        return f"{key} became {_short(owner[key])}"
    owner[key] = new_value(owner[key], random)
    return f"{key} became {_short(owner[key])}"


def new_value(value: Any, random: Random) -> Any:
    """Another value, of the same type more often than not."""
    if random.random() < 0.3:
        return copy.deepcopy(random.choice(THINGS + TEXTS + NUMBERS))
    if random.random() < 0.03:
        for _ in range(random.choice((5, 40, 900))):
            value = [value] if random.random() < 0.5 else {"a": value}
        return value
    if isinstance(value, bool) or value is None:
        return random.choice((True, False, None, 1, "true"))
    if isinstance(value, (int, float)):
        near = (value + 1, value - 1, -value, value * 2, value * 10**6, value // 2 if value == value else 0)
        return random.choice(NUMBERS if random.random() < 0.6 else near)
    if isinstance(value, str):
        return random.choice((*TEXTS, value + "x", value[:-1], value.upper(), value * 2))
    if isinstance(value, list):
        return random.choice((value * 2, value[:-1], value * 500, [*value, None], [], {}))
    return {} if random.random() < 0.5 else {**value, **{"x" * 9: 0}}


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(owner, key) of every value in a tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from _places(tree[key])


def _twice(text: str, random: Random) -> str:
    """Repeat what lies behind the opening brace of some object, up to the first comma."""
    openings = [at for at, letter in enumerate(text) if letter == "{"]
    at = random.choice(openings) + 1 if openings else 0
    comma = text.find(",", at)
    return text[: comma + 1] + text[at : comma + 1] + text[comma + 1 :] if comma > 0 else text


def _short(value: Any) -> str:
    text = "a huge number" if isinstance(value, int) and abs(value) > 10**100 else repr(value)
    return text if len(text) <= 50 else text[:47] + "..."


# ---- safetensors


def in_safetensors(data: bytes, random: Random) -> tuple[bytes, str]:
    """Change the header, whose length stays true more often than not."""
    try:
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        names = [name for name in header if name != "__metadata__"]
        name = random.choice(names)
        what = random.choice(_IN_HEADER)(header, name, random)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError):
        return in_bytes(data, random)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    lie = random.choice(NUMBERS[:25]) if random.random() < 0.05 else len(text)
    if random.random() < 0.05:
        body, what = body[: random.randrange(len(body) or 1)], f"{what}; data cut"
    return (int(lie) % 2**64).to_bytes(8, "little") + text + body, f"{name}: {what}"


def _shape(header: dict[str, Any], name: str, random: Random) -> str:
    shape = header[name]["shape"]
    if shape and random.random() < 0.6:
        at = random.randrange(len(shape))
        shape[at] = random.choice((*NUMBERS, shape[at] + 1, shape[at] * 2))
    else:
        header[name]["shape"] = random.choice(([], [0], shape[::-1], [1, *shape], [0, 2**62], [0] + [2] * 3000, "x"))
    return f"shape {_short(header[name]['shape'])}"


def _dtype(header: dict[str, Any], name: str, random: Random) -> str:
    entry = header[name]
    entry["dtype"] = random.choice(DTYPES)
    wide = {
        "F64": 8,
        "I64": 8,
        "F32": 4,
        "I32": 4,
        "F16": 2,
        "BF16": 2,
        "I16": 2,
        "I8": 1,
        "U8": 1,
        "BOOL": 1,
        "F8_E4M3": 1,
        "C64": 8,
    }.get(entry["dtype"], 1)
    if random.random() < 0.7:  # as many bytes as before
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        rows = entry["shape"][0] if len(entry["shape"]) > 1 else 1
        entry["shape"] = [rows, size // wide // rows] if rows > 1 else [size // wide]
    return f"dtype {entry['dtype']} {_short(entry['shape'])}"


def _offsets(header: dict[str, Any], name: str, random: Random) -> str:
    offsets = header[name]["data_offsets"]
    at = random.randrange(2)
    offsets[at] = random.choice((*NUMBERS, offsets[at] + 1, offsets[at] - 2, offsets[1 - at]))
    return f"offsets {_short(offsets)}"


def _missing(header: dict[str, Any], name: str, random: Random) -> str:
    del header[name]
    return "removed"


def _renamed(header: dict[str, Any], name: str, random: Random) -> str:
    new = random.choice((*TEXTS, name + ".x", name.replace("weight", "bias"), random.choice(list(header))))
    header[new] = header.pop(name)
    return f"renamed {_short(new)}"


def _swapped(header: dict[str, Any], name: str, random: Random) -> str:
    other = random.choice(list(header))
    header[name], header[other] = header[other], header[name]
    return f"exchanged with {other}"


def _many(header: dict[str, Any], name: str, random: Random) -> str:
    header |= {f"{name}.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(3000)}
    return "3000 empty tensors added"


def _anything(header: dict[str, Any], name: str, random: Random) -> str:
    return _change_tree(header, random)


_IN_HEADER: tuple[Callable[[dict[str, Any], str, Random], str], ...] = (
    _shape,
    _shape,
    _dtype,
    _dtype,
    _offsets,
    _missing,
    _renamed,
    _swapped,
    _anything,
    _many,
)


# ---- GGUF

_WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def in_gguf(data: bytes, random: Random) -> tuple[bytes, str]:
    """Change a number of the header: a count, length, type, value, dimension or offset."""
    try:
        at, width = random.choice(_numbers(data))
    except (struct.error, KeyError, IndexError, MemoryError):
        return in_bytes(data, random)
    old = int.from_bytes(data[at : at + width], "little")
    near = (old + 1, old - 1, old * 2, old + 32, old // 2, 2**20, 10**5, 8, 9)
    new = int(random.choice(near if random.random() < 0.5 else NUMBERS[:25])) % 2 ** (8 * width)
    return data[:at] + new.to_bytes(width, "little") + data[at + width :], f"{old} at {at} became {new}"


def _numbers(data: bytes) -> list[tuple[int, int]]:
    """(position, width) of the numbers in a header that is sound."""
    found = [(4, 4), (8, 8), (16, 8)]
    tensors, pairs = struct.unpack_from("<QQ", data, 8)
    at = 24

    def take(width: int) -> int:
        nonlocal at
        found.append((at, width))
        at += width
        if at > len(data):
            raise IndexError
        return int.from_bytes(data[at - width : at], "little")

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            at += take(8)
        elif kind == 9:
            inner, length = take(4), take(8)
            for _ in range(length):
                value(inner)
        else:
            take(_WIDTH[kind])

    for _ in range(pairs):
        value(8)
        value(take(4))
    for _ in range(tensors):
        value(8)
        for _ in range(take(4)):
            take(8)
        take(4)
        take(8)
    return found
