"""Source: the model to quantize, read piece by piece, so that memory holds blocks and never the whole.

    source = open_source("org/name")       a folder, a hub id, a .gguf file, or a model in memory
    model = source.skeleton()              parameters on meta, buffers real
    source.load(block, "model.layers.0", device)  ...  source.unload(block)

Names are those of the model's modules, however the files spell them (see `naming`); tied tensors go by the
embedding's name. What a checkpoint says of itself is checked (see `guard`) before anything is made of it. Knows
nothing of quantizers or formats.
"""

import copy
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from planish.arch import discover
from planish.errors import PlanishError, first_line
from planish.experts import unfuse
from planish.gguf_header import read_header
from planish.guard import Stored, check_config, read_json, reading
from planish.naming import module_names
from planish.shards import FLOATS, Place, opened, scan, stored_dtype, total
from planish.skeleton import build, is_unstarted, on_meta, put, ready, start_buffers, tied_names

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_QUANTIZED = (nn.Linear, nn.Embedding)  # modules whose weight may be stored under other names
_MOST_PER_BYTE = 8  # weights, in the smallest type that GGUF has
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "model.safetensors", "model-*.safetensors"]


class QuantizedOnceWarning(UserWarning):
    """The weights were quantized before: a measure against them flatters every method."""


class Source(ABC):
    """A model that is loaded and unloaded by parts.

    Args:
        model: parameters on meta, buffers real; tied parameters are one object.
        config: the model's configuration as its author saved it.
        label: how messages call it.
        folder: where tokenizer and side files lie, if anywhere.

    Attributes:
        dtype: of the model's parameters.
    """

    def __init__(self, model: PreTrainedModel, config: PreTrainedConfig, label: str, folder: Path | None) -> None:
        self.config = config
        self.label = label
        self.folder = folder
        self.dtype = model.dtype
        self._model = ready(model)
        self._ties = tied_names(model)

    def skeleton(self) -> PreTrainedModel:
        """The model with its parameters on meta: the same object at every call, in eval mode, without
        gradients or cache."""
        return self._model

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors of the checkpoint; a tied one once, under the embedding's name."""

    def files(self) -> list[Path]:
        """What the weights are read from; nothing if they are in memory."""
        return [] if self.folder is None else sorted(self.folder.glob("*.safetensors"))

    @abstractmethod
    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in any order; a tensor is borrowed until the next one is asked for."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None if the source has none."""

    def get(self, name: str) -> Tensor:
        """One tensor of `names()` as it is stored, on the CPU, the caller's own.

        Raises:
            PlanishError: if there is no such tensor, or it holds NaN or infinity.
        """
        return self.tensors([name])[name]

    def tensors(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Several tensors, as `get` gives one, on a device; a file that holds more than one of them is opened once."""
        return {name: self._taken(name, tensor, device) for name, tensor in self._read(names)}

    def _taken(self, name: str, tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        """A borrowed tensor as the caller's own; checked where it comes to, since a GPU looks through it faster."""
        there = tensor.detach().to(device)
        self._check_finite(name, there)
        return there.to(dtype or tensor.dtype, copy=there.device == tensor.device)

    def load(
        self, module: nn.Module, prefix: str, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> None:
        """Fill the meta parameters of a part of the skeleton; parameters tied to them are filled too.

        Args:
            module: the part; its buffers move to `device` and keep their dtype.
            prefix: its full name, "" for the skeleton itself.
            device: where the parameters shall be, in private memory.
            dtype: of floating-point parameters; None keeps each one's own.

        Raises:
            PlanishError: if a tensor is missing, or holds NaN or infinity.
        """
        wanted = {}
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                full = f"{prefix}.{name}" if prefix else name
                wanted[self._ties.get(full, [full])[0]] = name, dtype or parameter.dtype
        for full, tensor in self._read(wanted):
            name, kind = wanted[full]
            if kind.is_floating_point and not tensor.is_floating_point():
                raise PlanishError(f"{self.label}: {full} holds codes, but config.json names no scheme for it")
            real = self._taken(full, tensor, device, kind if tensor.is_floating_point() else None)
            filled = nn.Parameter(real, requires_grad=False)
            put(module, name, filled)
            for tied in self._ties.get(full, ()):
                put(self._model, tied, filled)
        for name, buffer in module.named_buffers():
            put(module, name, buffer.to(device))

    def unload(self, module: nn.Module) -> None:
        """Put the parameters of a part, and those tied to them, back on meta; buffers stay."""
        emptied = {id(real): on_meta(real) for real in module.parameters() if not real.is_meta}
        tied = [self._model.get_submodule(name.rpartition(".")[0]) for name in self._ties]
        for part in [*module.modules(), *tied]:
            for leaf, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, leaf, emptied.get(id(parameter), parameter))

    @contextmanager
    def lend(
        self, parts: Sequence[str], device: torch.device | str, dtype: torch.dtype | None = None
    ) -> Iterator[PreTrainedModel]:
        """The skeleton with some parts loaded, by their full names, for as long as the context lasts."""
        try:
            for name in parts:
                self.load(self._model.get_submodule(name), name, device, dtype)
            yield self._model
        finally:
            for name in parts:
                self.unload(self._model.get_submodule(name))

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in FLOATS.values() or not tensor.numel():
            return
        low, high = tensor.aminmax()  # NaN passes through; no temporary of the tensor's size
        if not (low.isfinite() and high.isfinite()):
            raise PlanishError(f"{self.label}: {name} holds NaN or infinity; get the checkpoint again")


class FolderSource(Source):
    """A Hugging Face folder with model.safetensors, whole or in shards; tensors are read when needed.

    Args:
        label: how messages call it.
        trust_remote_code: run Python code that comes with the model.
        quantized: accept a quantized checkpoint, whose layers have other tensors than the skeleton: those
            keep their names on disk, and only `load` refuses what is missing.
    """

    def __init__(
        self, folder: Path, *, label: str | None = None, trust_remote_code: bool = False, quantized: bool = False
    ) -> None:
        label = label or str(folder)
        if not (folder / "config.json").is_file():
            raise PlanishError(f"{label} has no config.json; give the folder of a Hugging Face model")
        said, on_disk = read_json(folder / "config.json"), scan(folder, label)
        stored = total(on_disk)
        check_config(said, stored, folder / "config.json")
        config = _read_config(folder, label, trust_remote_code)
        self.quantization_config: dict[str, Any] | None = getattr(config, "quantization_config", None)
        if not quantized:
            _refuse_quantized(config, label)
        elif self.quantization_config is not None:
            del config.quantization_config
        self.trust = trust_remote_code
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else stored_dtype(on_disk)
        model = build(config, dtype, label, trust_remote_code, stored)
        self._places = {name: on_disk[key] for key, name in module_names(model, on_disk).items()}
        if self._untie(model):
            config.tie_word_embeddings = model.config.tie_word_embeddings = False
        with reading(f"{label}: transformers can't use config.json", "check it"):
            super().__init__(model, config, label, folder)
        for name, group in self._ties.items():
            if name in self._places and name != group[0]:
                self._places.setdefault(group[0], self._places.pop(name))
        self._check_parameters(quantized)
        start_buffers(model, label, stored)
        self._fill_buffers()

    def names(self) -> list[str]:
        return list(self._places)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        assert self.folder is not None
        if not any(self.folder.glob("tokenizer*")):
            return None
        for file in (self.folder / name for name in _TOKENIZER_FILES):
            if file.is_file():
                read_json(file)
        with reading(f"{self.label}: transformers can't read the tokenizer"):
            return transformers.AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust)

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        by_file = defaultdict(list)
        for name in names:
            if name not in self._places:
                raise PlanishError(f"{self.label} has no tensor {name}")
            by_file[self._places[name].file].append(name)
        for file, inside in by_file.items():
            with opened(file) as handle:
                for name in inside:
                    with reading(f"{file}: {name} can't be read"):
                        tensor = handle.get_tensor(self._places[name].key)
                    yield name, tensor

    def _untie(self, model: PreTrainedModel) -> bool:
        """Give tied parameters that differ on disk their own; True if there were any."""
        pairs = [(group[0], name) for name, group in tied_names(model).items() if name != group[0]]
        apart = [
            name
            for first, name in pairs
            if first in self._places and name in self._places and not self._same(first, name)
        ]
        for name in apart:
            put(model, name, on_meta(model.get_parameter(name)))
        return bool(apart)

    def _same(self, first: str, second: str) -> bool:
        one, other = self._places[first], self._places[second]
        if (one.shape, one.dtype) != (other.shape, other.dtype) or one.dtype not in FLOATS:
            return False
        return torch.equal(*dict(self._read([first, second])).values())

    def _check_parameters(self, quantized: bool) -> None:
        for name, parameter in self._model.named_parameters():
            place = self._places.get(name)
            if place is None:
                owner, _, leaf = name.rpartition(".")
                if quantized and leaf == "weight" and isinstance(self._model.get_submodule(owner), _QUANTIZED):
                    continue
                discover(self._model)  # what it refuses (fused experts, no blocks) is the better reason
                raise PlanishError(
                    f"{self.label}: the tensor {name} is missing; get the checkpoint again, "
                    "or load it with transformers and pass the model"
                )
            if not (quantized and place.dtype == "I8" and self._holds_codes(name)):
                self._check_place(name, place, parameter)

    def _holds_codes(self, name: str) -> bool:
        """Is a weight on disk codes of a byte each? Which scale they have is said beside them."""
        owner, _, leaf = name.rpartition(".")
        return leaf == "weight" and f"{owner}.weight_scale" in self._places

    def _check_place(self, name: str, place: Place, wanted: Tensor) -> None:
        if place.shape != wanted.shape:
            raise PlanishError(
                f"{self.label}: {name} is {list(place.shape)} on disk but by config.json "
                f"{list(wanted.shape)}; get the checkpoint again"
            )
        if wanted.is_floating_point() and place.dtype not in FLOATS:
            raise PlanishError(
                f"{self.label}: {name} is stored as {place.dtype}, not as one of {', '.join(FLOATS)}; "
                "give the 16-bit original"
            )

    def _fill_buffers(self) -> None:
        """Persistent buffers come from disk; one that the model itself didn't start either is refused."""
        names = [name for name, _ in self._model.named_buffers()]
        on_disk = [name for name in names if name in self._places]
        for name in on_disk:
            self._check_place(name, self._places[name], self._model.get_buffer(name))
        for name, tensor in self._read(on_disk):
            self._check_finite(name, tensor)
            put(self._model, name, tensor.clone())
        for name in names:
            if is_unstarted(self._model.get_buffer(name)):
                raise PlanishError(
                    f"{self.label}: the buffer {name} can't be computed without the weights; "
                    "load it with transformers and pass the model"
                )


class MemorySource(Source):
    """A model in memory: parts are copied, the model itself is left as it is."""

    def __init__(self, model: PreTrainedModel, *, label: str | None = None) -> None:
        label = label or type(model).__name__
        _refuse_quantized(model.config, label)
        twin = unfuse(copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}))
        tensors = twin.state_dict(keep_vars=True)
        self._tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
        for name, tensor in self._tensors.items():
            if tensor.is_meta:
                raise PlanishError(f"{label}: {name} is on the meta device; load the model whole")
        memo = {id(parameter): on_meta(parameter) for parameter in twin.parameters()}
        super().__init__(copy.deepcopy(twin, memo), model.config, label, None)

    def names(self) -> list[str]:
        return [name for name in self._tensors if self._ties.get(name, [name])[0] == name]

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return None

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            if name not in self._tensors:
                raise PlanishError(f"{self.label} has no tensor {name}")
            yield name, self._tensors[name]


class GgufSource(MemorySource):
    """A .gguf file, dequantized to bf16 in memory by transformers."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()  # a bare name would be looked for in the working directory first
        with reading(f"{path}: transformers can't read it", "get it again"):
            try:
                model = self._model_of(read_header(path).stored)
            except ImportError as error:
                raise PlanishError(f"{path}: GGUF needs two packages; pip install gguf accelerate") from error
        model.config.architectures = [type(model).__name__]
        super().__init__(model, label=str(path))

    def _model_of(self, stored: Stored) -> PreTrainedModel:
        """Made without weights first, to know that what is asked for is there."""
        folder, file = self._path.parent, str(self._path)
        config = transformers.AutoConfig.from_pretrained(folder, gguf_file=file)
        skeleton = build(config, torch.bfloat16, file, False, stored)
        sizes = [parameter.numel() for parameter in skeleton.parameters()]
        if len(sizes) > stored.tensors or sum(sizes) > _MOST_PER_BYTE * stored.bytes:
            raise PlanishError(f"{file}: its metadata make a larger model than its tensors are; get it again")
        made: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            config=config,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        model, report = made
        if report["missing_keys"]:
            raise PlanishError(f"{file}: the tensor of {min(report['missing_keys'])} is missing; get it again")
        return model

    def files(self) -> list[Path]:
        return [self._path]

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        with reading(f"{self.label}: transformers can't read the tokenizer", "get it again"):
            return transformers.AutoTokenizer.from_pretrained(self._path.parent, gguf_file=str(self._path))


def open_source(
    model: str | os.PathLike[str] | PreTrainedModel, *, revision: str | None = None, trust_remote_code: bool = False
) -> Source:
    """Open what is to be quantized.

    Args:
        model: a Hugging Face folder, a .gguf file, a hub id, or a model in memory.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        PlanishError: if it isn't there, is damaged, incomplete, pickled, or quantized already.
    """
    if isinstance(model, PreTrainedModel):
        return MemorySource(model)
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        warnings.warn(
            f"{model}: the weights of a GGUF were quantized once; prefer the original",
            QuantizedOnceWarning,
            stacklevel=2,
        )
        return GgufSource(path)
    folder = find_folder(model, revision=revision, trust_remote_code=trust_remote_code)
    return FolderSource(folder, label=os.fspath(model), trust_remote_code=trust_remote_code)


def find_folder(model: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of a model: the one named, or where a hub id was downloaded to.

    Raises:
        PlanishError: if there is none.
    """
    label, path = os.fspath(model), Path(model).expanduser()
    if revision is not None and path.exists():
        raise PlanishError(f"{label} is on this machine; drop the revision, which is for hub ids")
    if path.is_dir():
        return path
    if path.exists() or path.suffix == ".gguf" or not _HUB_ID.fullmatch(label):
        raise PlanishError(
            f"no such folder: {label}; give a Hugging Face folder, a hub id such as org/name, or a .gguf file"
        )
    return _download(label, revision, trust_remote_code)


def _download(hub_id: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import snapshot_download  # here, not above: most runs don't need the network

    patterns = _HUB_FILES + ["*.py"] * code
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise PlanishError(
            f"no such folder: {hub_id}, nor does the hub give such a model ({first_line(error)}); check the name"
        ) from error


def _read_config(folder: Path, label: str, code: bool) -> PreTrainedConfig:
    mend = "a model with code of its own needs trust_remote_code"
    with reading(f"{label}: transformers can't read config.json", mend):
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=code)


def _refuse_quantized(config: PreTrainedConfig, label: str) -> None:
    how = getattr(config, "quantization_config", None)
    if how is not None:
        method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", None)
        raise PlanishError(f"{label} is quantized already ({method}); give the 16-bit original")
