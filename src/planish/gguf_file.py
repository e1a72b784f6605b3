"""GGUF export: a quantized folder as one .gguf file that llama.cpp runs.

    write_gguf(QuantizedFolder.open("quantized"), Path("model.gguf"))

Tensors get llama.cpp's names; rows of q and k are put in its rotary order where it has its own (llama); norms that
add one on the fly (gemma3) are stored with it. Layers pass one at a time from the folder into the file; what was
written is read back and compared before the file gets its name. Blocks are `formats.gguf`'s, the tokenizer is
`gguf_tokenizer`'s. It doesn't know how codes were found.
"""

import dataclasses
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from planish.bitstream import Stream
from planish.checkpoint import sync
from planish.errors import PlanishError, UnsupportedScheme, nearest
from planish.folder import QuantizedFolder
from planish.formats.gguf import KINDS, canonical, decode, encode, plan_type, type_of
from planish.gguf_header import Place, read_header
from planish.gguf_tokenizer import add_tokenizer
from planish.quant import Quantizer
from planish.scheme import Scheme
from planish.source import Source

EMBEDDINGS = ("q8_0", "q4_0", "f16", "bf16")
_CHUNK = 1 << 22  # weights of an embedding that are quantized at a time


class Family(NamedTuple):
    """How llama.cpp's model differs from transformers': its name, and what is done to tensors."""

    arch: str
    activation: str = "silu"
    permuted: bool = False
    norm_shift: float = 0.0


# by config.json's model_type
FAMILIES = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma3_text": Family("gemma3", activation="gelu_pytorch_tanh", norm_shift=1.0),
}


class Piece(NamedTuple):
    """A tensor of the file: its name there, shape, kind, and name in the model."""

    name: str
    shape: tuple[int, ...]
    kind: str
    key: str

    @property
    def nbytes(self) -> int:
        kind, count = KINDS[self.kind], int(np.prod(self.shape))
        return count // kind.weights * kind.bytes


def write_gguf(
    folder: QuantizedFolder,
    out: Path,
    *,
    embeddings: str = "q8_0",
    types: str = "smallest",
    overwrite: bool = False,
    name: str | None = None,
    errors: Mapping[str, float] | None = None,
) -> Path:
    """Write a quantized folder as a .gguf file.

    Args:
        out: the file; its parents are made.
        embeddings: q8_0, q4_0, f16 or bf16, of the token embedding and of an output layer that isn't quantized.
        types: "smallest", or "compatible" for a llama.cpp from before mid-2026, which has no Q2_0.
        overwrite: replace a file that is there, once the new one is whole.
        name: of the model, in the file's metadata; the folder's if not given.
        errors: relative squared error of each layer that was rounded once more to be held; kept in the metadata as
            two arrays, planish.rounded_again.layers and .errors (float32).

    Raises:
        UnsupportedScheme: if GGUF can't hold a layer.
        PlanishError: if llama.cpp hasn't this family, or not this variant of it; if the file can't be written, or is
            read back different.
    """
    gguf = _package()
    if out.suffix != ".gguf" or out.is_dir():
        raise PlanishError(f"{out} can't be the file; choose a name that ends in .gguf")
    if out.exists() and not overwrite:
        raise PlanishError(f"{out} exists; choose another name, or --overwrite")
    if embeddings not in EMBEDDINGS:
        raise PlanishError(f"no type {embeddings!r} for embeddings; {nearest(embeddings, EMBEDDINGS)}")
    family = family_of(folder.source)
    kinds = types_of(folder, types)
    pieces = _pieces(gguf, folder, family, kinds, embeddings)
    with _whole_file(out) as partial, closing(gguf.GGUFWriter(partial, family.arch)) as writer:
        writer.add_name(name or Path(folder.source.label).resolve().name)
        _describe(gguf, writer, folder, family, kinds)
        if errors:
            writer.add_array("planish.rounded_again.layers", list(errors))
            writer.add_array("planish.rounded_again.errors", list(errors.values()))
        add_tokenizer(gguf, writer, folder.source.folder, folder.source.config.vocab_size)
        for piece in pieces:  # a shape of weights, not of bytes; some ids are newer than the package
            raw = KINDS[piece.kind].id
            writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), piece.nbytes, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        digests = _write_tensors(writer, folder, family, pieces)
        writer.close()
        _verify(partial, folder, pieces, digests)
    return out


def check(source: Source, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse before any work what `write_gguf` would refuse of a model once it is quantized, as far as can be told.

    Raises:
        PlanishError: as `write_gguf`.
    """
    _package()
    family_of(source)
    if source.folder is None or not (source.folder / "tokenizer.json").is_file():
        raise PlanishError(f"{source.label}: GGUF needs a tokenizer.json beside the model; save the tokenizer there")
    for name, scheme in schemes.items():
        if scheme.activations is not None:
            raise UnsupportedScheme(f"{name}: GGUF can't say that activations are rounded; use --format native")
        plan_type(name, scheme, shapes[name])


def types_of(folder: QuantizedFolder, types: str = "smallest") -> dict[str, str]:
    """The kind that each quantized layer will have in the file; layers are read only where their data decides.

    Raises:
        UnsupportedScheme: if GGUF can't hold one.
    """
    kinds = {name: plan_type(name, scheme, folder.shapes[name], types) for name, scheme in folder.schemes.items()}
    tensors = set(folder.source.names())
    undecided = {
        name: scheme
        for name, scheme in folder.schemes.items()
        if kinds[name] not in KINDS or scheme.shared or f"{name}.offset" in tensors or f"{name}.order" in tensors
    }
    for name, q in dataclasses.replace(folder, schemes=undecided).layers():
        kinds[name] = type_of(name, q, types, folder.schemes[name].shared)
    return kinds


def family_of(source: Source) -> Family:
    """The family of a model.

    Raises:
        PlanishError: if GGUF export doesn't know it, or llama.cpp computes it otherwise.
    """
    config, label = source.config, source.label
    if config.model_type not in FAMILIES:
        raise PlanishError(
            f"{label}: GGUF export knows no {config.model_type}, only {', '.join(FAMILIES)}; use another format"
        )
    family = FAMILIES[config.model_type]
    fixed = {"hidden_act": family.activation, "hidden_activation": family.activation, "attn_logit_softcapping": None,
             "use_bidirectional_attention": False}  # fmt: skip
    if family.arch == "gemma3":  # 1 / sqrt of this scales attention; llama.cpp knows the largest model by its depth
        largest = config.num_hidden_layers == 62
        heads = config.hidden_size // config.num_attention_heads
        fixed["query_pre_attn_scalar"] = heads if largest else config.head_dim
    for key, value in fixed.items():
        if getattr(config, key, value) != value:
            other = getattr(config, key)
            raise PlanishError(f"{label}: llama.cpp's {family.arch} has {key} {value}, not {other}; use another format")
    return family


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise PlanishError("GGUF export needs the gguf package; pip install planish[gguf]") from error
    return gguf


@contextmanager
def _whole_file(out: Path) -> Iterator[Path]:
    """A hidden file to write, which becomes `out` if all goes well and vanishes if not."""
    partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        partial.replace(out)
        sync(out.parent)
    except OSError as error:
        raise PlanishError(f"can't write {out}: {error.strerror or error}; make room, or write elsewhere") from error
    finally:
        partial.unlink(missing_ok=True)


# Tensors


def _pieces(
    gguf: Any, folder: QuantizedFolder, family: Family, kinds: Mapping[str, str], embeddings: str
) -> list[Piece]:
    """Every tensor of the file: plain ones first, then quantized layers as `folder.layers()` gives them."""
    source = folder.source
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, source.config.num_hidden_layers)

    def named(key: str) -> str:
        name: str | None = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise PlanishError(f"{source.label}: llama.cpp's {family.arch} has no place for the tensor {key}")
        return name

    pieces = [Piece("rope_freqs.weight", (_head_dim(source.config) // 2,), "F32", "")] * (_rope(folder) == "llama3")
    for key in source.names():
        layer, _, leaf = key.rpartition(".")
        if (layer in kinds and leaf != "bias") or leaf == "inv_freq":
            continue
        name, shape = named(key), tuple(source.skeleton().get_parameter(key).shape)
        pieces.append(Piece(name, shape, _plain_kind(name, key, shape, source.dtype, embeddings), key))
    return pieces + [Piece(named(f"{layer}.weight"), folder.shapes[layer], kinds[layer], layer) for layer in kinds]


def _plain_kind(name: str, key: str, shape: tuple[int, ...], dtype: torch.dtype, embeddings: str) -> str:
    """The kind of a tensor that isn't quantized: what holds it exactly, but for embedding and output."""
    if len(shape) == 1:
        return "F32"
    if name not in ("token_embd.weight", "output.weight"):
        return {torch.bfloat16: "BF16", torch.float16: "F16"}.get(dtype, "F32")
    if shape[1] % KINDS[embeddings.upper()].weights:
        raise PlanishError(
            f"{key}: {embeddings} needs rows in multiples of 32, not {shape[1]}; use bf16 for embeddings"
        )
    return embeddings.upper()


def _write_tensors(writer: Any, folder: QuantizedFolder, family: Family, pieces: list[Piece]) -> dict[str, str]:
    """Write the tensors in their order; digests of the quantized ones, by their names in the file."""
    for piece in pieces:
        if piece.key not in folder.schemes:
            writer.write_tensor_data(_plain(folder, family, piece))
    digests = {}
    by_layer = {piece.key: piece for piece in pieces}
    for layer, q in folder.layers():
        piece = by_layer[layer]
        if (order := _order(folder, family, layer)) is not None:
            parts = {"codes": q.codes, "scale": q.scale} | ({} if q.zero is None else {"zero": q.zero})
            q = dataclasses.replace(q, **{name: part[order] for name, part in parts.items()})  # type: ignore[arg-type]
        digests[piece.name] = Stream.of(canonical(q)).digest()
        writer.write_tensor_data(encode(q, piece.kind).numpy())
    return digests


def _plain(folder: QuantizedFolder, family: Family, piece: Piece) -> np.ndarray:
    """The bytes of a tensor that isn't quantized in the folder."""
    if piece.name == "rope_freqs.weight":
        return _rope_factors(folder).numpy()
    tensor = folder.source.get(piece.key)
    owner, _, leaf = piece.key.rpartition(".")
    if (order := _order(folder, family, owner)) is not None:
        tensor = tensor[order]
    if owner.endswith("norm") and leaf == "weight":
        tensor = tensor.float() + family.norm_shift
    if piece.kind in ("Q8_0", "Q4_0"):
        return _quantized(tensor, piece.kind).numpy()
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(piece.kind, torch.float32)
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        raise PlanishError(f"{piece.key} has values beyond fp16; use bf16 for embeddings")
    return cast.contiguous().view(torch.uint8).numpy()


def _quantized(weight: Tensor, kind: str) -> Tensor:
    """An embedding rounded to nearest, some rows at a time."""
    scheme = Scheme(bits={"Q8_0": 8, "Q4_0": 4}[kind], group_size=32)
    rows = max(1, _CHUNK // weight.shape[1])
    return torch.cat([encode(Quantizer(part, scheme).quantize(part), kind) for part in weight.split(rows)])


def _order(folder: QuantizedFolder, family: Family, layer: str) -> Tensor | None:
    """Where each row of a q or k comes from: the halves of a head's rotary pairs lie side by side; None: as it is."""
    config, leaf = folder.source.config, layer.rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(leaf)
    if not family.permuted or heads is None:
        return None
    rows = torch.arange(heads * _head_dim(config))
    return rows.view(heads, 2, -1).transpose(1, 2).flatten()


def _verify(path: Path, folder: QuantizedFolder, pieces: list[Piece], digests: Mapping[str, str]) -> None:
    """Read the file's own header, then every quantized layer; each must have the digest that was written."""
    found, data = tensor_places(path), np.memmap(path, mode="c")
    for piece in pieces:
        kind, shape, start = found.get(piece.name, Place(-1, (), 0))
        same = (kind, shape) == (KINDS[piece.kind].id, piece.shape)
        if same and piece.name in digests:
            raw = torch.from_numpy(data[start : start + piece.nbytes]).view(shape[0], -1)
            q = decode(piece.key, raw, piece.kind, folder.schemes[piece.key], folder.shapes[piece.key])
            same = Stream.of(q).digest() == digests[piece.name]
        if not same:
            raise PlanishError(
                f"{piece.key} was read back different from what was written; the disk or memory may be faulty"
            )


def tensor_places(path: Path) -> dict[str, Place]:
    """Where each tensor of a file of ours lies."""
    return read_header(path, {kind.id: (kind.weights, kind.bytes) for kind in KINDS.values()}).places


# Metadata


def _describe(gguf: Any, writer: Any, folder: QuantizedFolder, family: Family, kinds: Mapping[str, str]) -> None:
    """What llama.cpp needs to know of the model, and what people see of the file."""
    config = folder.source.config
    weights: Counter[str] = Counter()
    for layer, kind in kinds.items():
        weights[kind] += folder.shapes[layer][0] * folder.shapes[layer][1]
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(KINDS[weights.most_common(1)[0][0] if weights else "BF16"].file_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _describe_rope(gguf, writer, folder, family)
    _describe_window(writer, config, family)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_parameters(folder: QuantizedFolder) -> dict[str, Any]:
    parameters = folder.source.config.rope_parameters
    return dict(parameters.get("full_attention", parameters))


def _rope(folder: QuantizedFolder) -> str:
    return str(_rope_parameters(folder).get("rope_type", "default"))


def _describe_rope(gguf: Any, writer: Any, folder: QuantizedFolder, family: Family) -> None:
    rope, kind = _rope_parameters(folder), _rope(folder)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    plain = {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings"}
    beyond = [key for key, value in rope.items() if key not in plain and value is not None]
    unknown = kind not in ("default", "linear", "yarn", "llama3") or (kind == "yarn" and beyond)
    if unknown or (kind == "llama3" and family.arch != "llama"):
        raise PlanishError(f"{folder.source.label}: GGUF export knows no rope scaling {rope}; use another format")


def _rope_factors(folder: QuantizedFolder) -> Tensor:
    """By how much llama3's scaling divides each frequency [head_dim / 2]."""
    dim = _head_dim(folder.source.config)
    plain = _rope_parameters(folder)["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    buffers = dict(folder.source.skeleton().named_buffers())
    return plain / next(value for name, value in buffers.items() if name.endswith("rotary_emb.inv_freq"))


def _describe_window(writer: Any, config: Any, family: Family) -> None:
    """Context and sliding window; where llama.cpp has none, the context ends where the window would begin to slide."""
    context, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    writer.add_context_length(context if family.arch == "gemma3" else min(context, window or context))
    if family.arch != "gemma3":
        return
    writer.add_sliding_window(window)
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    if slides != [(layer + 1) % 6 != 0 for layer in range(len(slides))]:
        writer.add_sliding_window_pattern(slides)
    local = config.rope_parameters["sliding_attention"]["rope_theta"]
    if local != 10000:
        writer.add_rope_freq_base_swa(local)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
