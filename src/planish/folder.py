"""A quantized checkpoint as a folder: read it as a model, write what goes beside its tensors, verify it.

    QuantizedFolder.open(path)    the format, the scheme of each linear, each linear's QTensor
    assemble(source, layers)      an ordinary transformers model with packed layers

Verification reads a folder back as `load` would and compares every code, scale and zero by hash.
"""

import functools
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from planish.arch import Arch, discover, linears
from planish.attention import install
from planish.bitstream import Stream
from planish.checkpoint import CheckpointWriter, Content
from planish.errors import PlanishError
from planish.experts import gates
from planish.formats import detect
from planish.formats.format import Format
from planish.guard import read_json, reading
from planish.kernels.linear import PackedLinear, packed_layers
from planish.kernels.pack import Packed
from planish.kernels.records import Weight, hold
from planish.naming import disk_speller
from planish.qtensor import QTensor
from planish.scheme import Scheme
from planish.source import FolderSource, Source, find_folder
from planish.tables import put_table, table_shapes

Result = TypeVar("Result")

PROCESSORS = "*processor_config.json"
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    PROCESSORS,
)


@dataclass(frozen=True, kw_only=True)
class QuantizedFolder:
    """A folder whose config.json has a `quantization_config` of one of our formats.

    Args:
        schemes: of every quantized linear, and of the embedding and the head if they are quantized.
        shapes: (out, in) of every linear of the blocks, and of what else is quantized.
        tables: (vocabulary, hidden) of the embedding and an untied head.
        embedding: name of the first of these.
    """

    source: FolderSource
    format: Format
    schemes: dict[str, Scheme]
    shapes: dict[str, tuple[int, int]]
    tables: dict[str, tuple[int, int]]
    embedding: str

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> "QuantizedFolder | None":
        """The folder (or hub id), or None if its model isn't quantized.

        Raises:
            PlanishError: if there is no such folder, or its format isn't one of ours.
        """
        if str(path).endswith(".gguf"):
            return None
        source = FolderSource(find_folder(path, revision=revision), label=os.fspath(path), quantized=True)
        how = source.quantization_config
        if how is None:
            return None
        with reading(f"{source.label}: quantization_config can't be read", "check config.json"):
            found = detect(how)
            skeleton = source.skeleton()
            arch = discover(skeleton)
            shapes, around = linears(arch, skeleton), table_shapes(arch, skeleton)
            schemes = layer_schemes(found, how, arch, skeleton)
            shapes |= {name: shape for name, shape in around.items() if name in schemes}
        for name, scheme in schemes.items():
            if scheme.group_in(shapes[name][1]) > shapes[name][1]:
                raise PlanishError(
                    f"{name}: {scheme} has a group larger than its {shapes[name][1]} inputs; check config.json"
                )
        return cls(source=source, format=found, schemes=schemes, shapes=shapes, tables=around, embedding=arch.embedding)

    def layers(self) -> Iterator[tuple[str, QTensor]]:
        """(name, QTensor) of each quantized layer, one at a time."""
        return ((name, stream.qtensor()) for name, stream in self.streams())

    def packed(self, device: torch.device) -> Iterator[tuple[str, Packed]]:
        """(name, Packed) of each quantized layer on a device; some are read ahead."""
        return self.each(lambda name, stream: Packed.from_stream(stream), device)

    def held(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Weight]]:
        """The same for a model that isn't trained, with activations of `dtype`; laid out there where that is faster."""

        def work(name: str, stream: Stream) -> Weight:
            plain = name == self.embedding or self.schemes[name].activations is not None
            return Packed.from_stream(stream) if plain else hold(stream, dtype)

        return self.each(work, device)

    def streams(self) -> Iterator[tuple[str, Stream]]:
        """(name, Stream) of each quantized layer; some are read ahead."""
        return self.each(lambda name, stream: stream)

    def each(
        self, work: Callable[[str, Stream], Result], device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Result]]:
        """(name, work(name, Stream on a device)) of each quantized layer, in order; two are worked on at a time, for a
        GPU four, since they wait for pages and copies."""
        threads = 2 if torch.device(device).type == "cpu" else 4
        return _ahead(lambda name: (name, work(name, self.stream(name, device))), self.schemes, threads)

    def stream(self, name: str, device: torch.device | str = "cpu") -> Stream:
        """One quantized layer."""
        tensors = self.source.tensors(self._keys[name], device)
        with reading(f"{self.source.label}: {name} can't be read"):
            return self.format.read(name, tensors, self.schemes[name], self.shapes[name])

    @functools.cached_property
    def _keys(self) -> dict[str, list[str]]:
        """Names of each quantized layer's tensors."""
        of_layer: dict[str, list[str]] = {name: [] for name in self.schemes}
        for key in self.source.names():
            name = key.rpartition(".")[0]
            if name in of_layer:
                of_layer[name].append(key)
        return of_layer


def _ahead(work: Callable[[str], Result], names: Iterable[str], threads: int) -> Iterator[Result]:
    """work(name) for each name, in order, by some threads that are at most one result more than they are ahead."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for name in names:
            pending.append(pool.submit(work, name))
            if len(pending) > threads + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def layer_schemes(format: Format, words: Mapping[str, Any], arch: Arch, model: PreTrainedModel) -> dict[str, Scheme]:
    """Scheme of everything that is quantized, by its name in the model; a configuration may spell it as on disk."""
    around = table_shapes(arch, model)
    # a head may be quantized in any format, an embedding in ours
    shapes = linears(arch, model) | {
        name: shape for name, shape in around.items() if name == arch.head or format.name == "native"
    }
    spell = disk_speller(model)
    ways = [{name: name for name in shapes}, {name: spell(name) for name in shapes}]
    for way in ways[::-1] if gates(model) else ways:
        if schemes := format.schemes(words, {way[name]: shape for name, shape in shapes.items()}):
            return {name: schemes[way[name]] for name in shapes if way[name] in schemes}
    return {}


def assemble(
    source: Source,
    layers: Iterable[tuple[str, Weight | nn.Module]],
    device: torch.device,
    dtype: torch.dtype,
    schemes: Mapping[str, Scheme] | None = None,
) -> PreTrainedModel:
    """The source's model with the given layers, on the device already, and all else in `dtype`.

    Args:
        layers: what linears multiply by, or what takes their place.
        schemes: of the layers; they say how activations are rounded.
    """
    model = source.skeleton()
    arch = discover(model, PackedLinear)
    for name, quantized in layers:
        if name == arch.embedding:
            assert isinstance(quantized, Packed)
            put_table(model, arch, quantized, dtype)
            continue
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, leaf = name.rpartition(".")
        if isinstance(quantized, nn.Module):
            setattr(model.get_submodule(parent), leaf, quantized)
            continue
        bias = None if linear.bias is None else source.get(f"{name}.bias").to(device)
        how = schemes.get(name) if schemes else None
        packed = PackedLinear(
            quantized,
            None if bias is None else bias.to(dtype),
            how.activations if how else None,
            how is not None and how.shared,
        )
        setattr(model.get_submodule(parent), leaf, packed)
    source.load(model, "", device, dtype)
    model.tie_weights()
    install(model, schemes or {})
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = True
    model.config.name_or_path = str(source.folder or source.config.name_or_path)
    if source.folder is not None and (source.folder / "generation_config.json").is_file():
        read_json(source.folder / "generation_config.json")
        with reading(f"{source.label}: generation_config.json can't be read"):
            model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model


def verify_folder(folder: Path, digests: Mapping[str, str], original: QuantizedFolder | None = None) -> None:
    """Read a folder back as `load` would; every layer must have the digest that was written, or be what it is in the
    `original` if that is an empty one.

    Raises:
        PlanishError: naming the layer that differs.
    """

    def is_same(name: str, stream: Stream) -> bool:
        if original is not None and digests.get(name) == "":
            return stream.equal(original.stream(name))
        return stream.digest() == digests.get(name)

    written = QuantizedFolder.open(folder)
    read = {} if written is None else dict(written.each(is_same))
    for name in sorted(digests.keys() | read.keys()):
        if not read.get(name):
            raise PlanishError(
                f"{name} was read back different from what was written; the disk or memory may be faulty"
            )


def write_model(
    model: PreTrainedModel,
    writer: CheckpointWriter,
    format: Format,
    *,
    source: Source | None = None,
    tokenizer: Any = None,
    extra: Mapping[str, Content] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write a model in memory, its packed layers in a format; read back before the folder gets its name.

    Args:
        source: what the model was made of: configuration and side files are taken over from there.
        tokenizer: goes beside it where the source has no folder.
        extra: more files, by name.
        finish: called with the folder when it was read back, before it gets its name.

    Raises:
        PlanishError: if the format can't hold a layer, the disk is full, or something is read back different.
    """
    packed, spell = packed_layers(model), disk_speller(model)
    schemes = schemes_of(model)
    digests: dict[str, str] = {}
    ordered = any(part.order is not None for part in packed.values())

    def verify(folder: Path) -> None:
        verify_folder(folder, digests)
        if finish is not None:
            finish(folder)

    with writer:
        for name, module in packed.items():
            stream = Stream.of(module.qtensor()).to("cpu")
            digests[name] = stream.digest()
            for key, tensor in format.write(name, stream).items():
                writer.add(spell(key), tensor)
        for key, tensor in plain_tensors(model):
            writer.add(spell(key), tensor)
        return writer.finish(
            config_of(
                model.config if source is None else source.config,
                model,
                model.dtype,
                words_of(format, schemes, model, ordered),
            ),
            {**side_files(None if source is None else source.folder, model, tokenizer), **(extra or {})},
            verify=verify,
        )


def words_of(
    format: Format, schemes: Mapping[str, Scheme | None], model: PreTrainedModel, ordered: bool = False
) -> dict[str, Any]:
    """`quantization_config`; where columns have an order of their own, GPTQ says so or servers don't look for it.

    With experts names are those on disk, as servers know them, and routers and gates are named too: to others they are
    linears like any. Our own format names what may be quantized only.
    """
    if kept := gates(model):
        spell = disk_speller(model)
        schemes = {spell(name): scheme for name, scheme in schemes.items()}
        schemes |= {} if format.name == "native" else dict.fromkeys(map(spell, kept))
    words = format.config(schemes)
    return words | ({"desc_act": True} if ordered and "desc_act" in words else {})


def block_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear of the blocks, packed or not, but for gates of experts."""
    blocks, kept = discover(model, PackedLinear).blocks, set(gates(model))
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.startswith(f"{blocks}.") and isinstance(module, PackedLinear | nn.Linear) and name not in kept
    }


def schemes_of(model: PreTrainedModel) -> dict[str, Scheme | None]:
    """The scheme of every linear of the blocks, None where it is in 16 bits, and of what else is packed."""
    packed = packed_layers(model)
    names = dict.fromkeys([*block_shapes(model), *packed])
    return {name: packed[name].scheme if name in packed else None for name in names}


def plain_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers outside of packed layers, and the biases of those; tied ones once."""
    every = model.named_modules(remove_duplicate=False)
    packed = {name for name, module in every if isinstance(module, PackedLinear)}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        if id(tensor) not in seen and (owner not in packed or leaf == "bias"):
            seen.add(id(tensor))
            yield name, tensor


def config_of(
    config: PreTrainedConfig, model: PreTrainedModel, dtype: torch.dtype, quantization_config: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json: a configuration, with class and dtype as save_pretrained() gives them, and how it is quantized."""
    return {
        "architectures": [type(model).__name__],
        **config.to_diff_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": dict(quantization_config),
    }


def tokenizer_of(model: PreTrainedModel) -> Any:
    """The tokenizer of the folder that a model was loaded from, or None."""
    try:
        return AutoTokenizer.from_pretrained(model.config.name_or_path, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def side_files(folder: Path | None, model: PreTrainedModel, tokenizer: Any) -> dict[str, Content]:
    """What goes beside the tensors, by file name: copied from a folder, else as model and tokenizer write it."""
    if folder is not None:
        return {file.name: file for pattern in SIDE_FILES for file in sorted(folder.glob(pattern)) if file.is_file()}
    files: dict[str, Content] = {}
    origin = model.config.name_or_path
    if origin and Path(origin).is_dir():  # a tokenizer writes itself, but processors of images are files only
        files |= {file.name: file for file in sorted(Path(origin).glob(PROCESSORS)) if file.is_file()}
    if model.generation_config is not None:
        files["generation_config.json"] = model.generation_config.to_json_string()
    if tokenizer is None:
        return files
    with tempfile.TemporaryDirectory() as written:
        tokenizer.save_pretrained(written)
        return files | {file.name: file.read_bytes() for file in Path(written).iterdir() if file.is_file()}
