"""transformers loads and saves our formats by itself, once it is asked to:

    planish.register()
    model = AutoModelForCausalLM.from_pretrained("dir")     packed layers, on our kernels
    model.save_pretrained("copy")                           the same format, every code, scale and zero the same

While transformers reads a checkpoint, each quantized linear's place is held by the format's own tensors: where
they go, and when they are read, is its affair. Then they are decoded and packed, one layer at a time. A
configuration that none of our formats reads is left to transformers' own quantizer. Knows nothing of how the
codes were found.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from planish.arch import Arch, discover
from planish.attention import install
from planish.bitstream import Stream
from planish.errors import PlanishError
from planish.experts import is_merge, unfuse
from planish.folder import block_shapes, layer_schemes, plain_tensors, schemes_of, words_of
from planish.formats import FORMATS, choose, detect
from planish.formats.format import Format
from planish.kernels.linear import PackedLinear, packed_layers
from planish.kernels.pack import Packed
from planish.kernels.records import hold
from planish.kernels.siblings import settle
from planish.naming import module_names
from planish.qtensor import QTensor
from planish.scheme import Scheme
from planish.shards import header
from planish.tables import put_table

NAME = "planish"  # of our quantizer in transformers' tables
METHODS = (NAME, "auto-round", "gptq", "awq", "compressed-tensors")  # `quant_method` of what FORMATS read
# linears that any configuration can be asked about
_SAMPLE = dict.fromkeys(("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"), (4096, 4096))


def register() -> None:
    """Let transformers' from_pretrained() load every format of `planish.formats.FORMATS` as packed layers.

    For methods that transformers knows, ours is asked first; what Planish doesn't read goes to theirs. Until
    then, and after `unregister`, transformers is as it was. A second call changes nothing.
    """
    AUTO_QUANTIZER_MAPPING[NAME] = PlanishQuantizer  # type: ignore[assignment]
    for method in METHODS:
        own = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
        if not _is_ours(own):
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = type("PlanishConfig", (PlanishConfig,), {"own": own})


def unregister() -> None:
    """Take `register` back; models that were loaded stay as they are."""
    AUTO_QUANTIZER_MAPPING.pop(NAME, None)
    for method, entry in list(AUTO_QUANTIZATION_CONFIG_MAPPING.items()):
        if _is_ours(entry):
            del AUTO_QUANTIZATION_CONFIG_MAPPING[method]
            if entry.own is not None:
                AUTO_QUANTIZATION_CONFIG_MAPPING[method] = entry.own


def attach(model: PreTrainedModel, quantization_config: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Let save_pretrained() and push_to_hub() write a model with packed layers in a format; no `register` needed.

    Args:
        model: with PackedLinear layers, changed in place.
        quantization_config: of the config.json that it came from; of the format that `planish.save` would
            choose if not given.

    Returns:
        The same model.
    Raises:
        PlanishError: if the configuration is of no format of ours, or no layer is packed.
    """
    if quantization_config is None:
        schemes, shapes = schemes_of(model), block_shapes(model)
        # an embedding is quantized in our own format only
        chosen = choose(schemes, shapes) if schemes.keys() == shapes.keys() else FORMATS["native"]
        quantization_config = words_of(chosen, schemes, model)
    quantizer = PlanishQuantizer(PlanishConfig(quantization_config))
    quantizer.remember(model)
    model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    return model


def _is_ours(entry: Any) -> TypeGuard["type[PlanishConfig]"]:
    return isinstance(entry, type) and issubclass(entry, PlanishConfig)


def _reads(quantization_config: Mapping[str, Any]) -> bool:
    """Does a format of ours read checkpoints of this configuration, by what can be told without the model?"""
    try:
        detect(quantization_config).schemes(quantization_config, _SAMPLE)
    except PlanishError:
        return False
    return True


class PlanishConfig(QuantizationConfigMixin):
    """A `quantization_config` that Planish reads, kept word for word: it is written as it was read.

    Its `quant_method` is what transformers finds our quantizer by, not the one that is written.

    Args:
        quantization_config: of config.json.
    """

    own: Any = None  # what transformers had in its table where a subclass of this stands now

    def __init__(self, quantization_config: Mapping[str, Any]) -> None:
        self.quant_method = NAME  # type: ignore[assignment]
        self.words = copy.deepcopy(dict(quantization_config))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Of this class, or what transformers would have made of it, if Planish doesn't read it."""
        if cls.own is not None and not _reads(config_dict):
            return cls.own.from_dict(config_dict, return_unused_kwargs, **kwargs)
        config = PlanishConfig(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.words)


class PlanishQuantizer(HfQuantizer):
    """What transformers calls around loading and saving.

    Raises:
        PlanishError: from all of it, naming the layer, for what can't be read or written.
    """

    quantization_config: PlanishConfig
    requires_calibration = True  # it loads what is quantized; it doesn't quantize
    is_trainable = True  # gradients pass through packed layers
    is_qat_trainable = True  # their scales can be made trainable

    def __init__(self, quantization_config: PlanishConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.format = detect(quantization_config.words)
        self.saved: dict[str, Scheme] = {}
        self.head: nn.Module | None = None  # a tied one, while its embedding is read

    def remember(self, model: nn.Module) -> None:
        """Keep which layers the configuration describes: with others it would be a wrong one."""
        self.saved = {name: layer.scheme for name, layer in packed_layers(model).items()}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what would be moved in and out of a GPU; called again when 'auto' has become a map."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise PlanishError(
                f"device_map puts parts on {' and '.join(sorted(places))}, but packed layers can't be offloaded; "
                "give more GPU memory, or device_map='cpu'"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Put what holds the checkpoint's tensors in place of each quantized linear, all on meta; experts apart."""
        unfuse(model)
        headers = {
            key: torch.empty(place.shape, dtype=str_to_torch_dtype[place.dtype], device="meta")
            for file in checkpoint_files or []
            for key, place in header(Path(file))
        }
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, name in module_names(model, headers).items():
            owner, _, leaf = name.rpartition(".")
            found[owner][leaf] = headers[key]
        self.arch = discover(model)
        schemes = layer_schemes(self.format, self.quantization_config.words, self.arch, model)
        for name, module in model.named_modules():
            leaves = found.get(name, {})
            if leaves and name not in schemes and "weight" in module._parameters and "weight" not in leaves:
                raise PlanishError(
                    f"{name} has {', '.join(sorted(leaves))} and no weight, but quantization_config doesn't say how it "
                    "is quantized; get the checkpoint again"
                )
        for name, scheme in schemes.items():
            if name == self.arch.embedding:
                self.head = _untie_head(model, self.arch)
            model.set_submodule(name, StoredLinear(model.get_submodule(name), scheme, found[name]))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Decode and pack, a layer at a time; its stored tensors are freed."""
        for name in [name for name, module in model.named_modules() if isinstance(module, StoredLinear)]:
            stored = model.get_submodule(name)
            assert isinstance(stored, StoredLinear)
            stream = stored.stream(name, self.format)
            if name == self.arch.embedding:
                model.set_submodule(name, stored.original[0])
                if self.arch.head is not None and self.head is not None:
                    model.set_submodule(self.arch.head, self.head)
                put_table(model, self.arch, Packed.from_stream(stream), stored.dtype)
            else:
                bias, how = None if stored.bias is None else stored.bias.to(stored.dtype), stored.scheme.activations
                weight = Packed.from_stream(stream) if how else hold(stream, stored.dtype)
                layer = PackedLinear(weight, bias, how, stored.scheme.shared)
                model.set_submodule(name, layer.train(stored.training))
        self.remember(settle(model))
        install(model, self.saved)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Without what would put experts together again."""
        kept = [step for step in weight_conversions if not is_merge(step)]
        return super().update_weight_conversions(kept, model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All tensors of the checkpoint by their names in the model; tied ones once.

        Raises:
            PlanishError: if the configuration that was loaded wouldn't give these layers back.
        """
        packed = packed_layers(model)
        for name in sorted(self.saved.keys() | packed.keys()):
            if name not in packed or packed[name].scheme != self.saved.get(name):
                raise PlanishError(f"{name} isn't what it was when loaded; write the model with planish.save()")
        state = {name: tensor.detach() for name, tensor in plain_tensors(model)}
        for name, layer in packed.items():
            state |= self._encoded(name, layer.qtensor().to("cpu"))
        return state, {}

    def _encoded(self, name: str, q: QTensor) -> dict[str, Tensor]:
        """Tensors of a layer, read back: some spellings of others can be read, but not written."""
        try:
            tensors = self.format.encode(name, q)
            if self.format.decode(name, tensors, q.scheme, q.shape).equal(q):
                return tensors
            reason = f"{name} would be read back different"
        except PlanishError as error:
            reason = str(error)
        raise PlanishError(
            f"save_pretrained() keeps the format, and that can't hold this ({reason}); write it with planish.save()"
        )


class StoredLinear(nn.Module):
    """Stands for an nn.Linear or nn.Embedding while its checkpoint is read: buffers named, shaped and typed as on disk.

    Args:
        original: what it stands for, its weight [out, in] on meta.
        scheme: how that is quantized.
        tensors: what the checkpoint has of it, by the last word of their names, on meta.
    """

    bias: Tensor | None

    def __init__(self, original: nn.Module, scheme: Scheme, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        weight, bias = original._parameters["weight"], original._parameters.get("bias")
        assert weight is not None
        self.original = (original,)  # in a tuple it is no part of the model
        self.shape, self.scheme, self.dtype = (weight.shape[0], weight.shape[1]), scheme, weight.dtype
        self.register_buffer("bias", None if bias is None else bias.data)
        for leaf, tensor in tensors.items():
            if not hasattr(self, leaf):  # bias, and words that no format has
                self.register_buffer(leaf, tensor)

    def stream(self, name: str, format: Format) -> Stream:
        """The weight.

        Raises:
            PlanishError: if a tensor is missing, or isn't what scheme and shape promise.
        """
        tensors = dict(self.named_buffers())
        for leaf, tensor in tensors.items():
            # transformers marks what it has read; the rest it leaves as memory came
            if not getattr(tensor, "_is_hf_initialized", False):
                raise PlanishError(f"{name}.{leaf} wasn't read; the checkpoint is incomplete, get it again")
        of_layer = {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items() if leaf != "bias"}
        return format.read(name, of_layer, self.scheme, self.shape)


def _untie_head(model: PreTrainedModel, arch: Arch) -> nn.Module | None:
    """Take out a head that is tied to the embedding, so that transformers doesn't look for its weight; the head."""
    ties = model.all_tied_weights_keys
    if arch.head is None or f"{arch.head}.weight" not in {*ties.keys(), *ties.values()}:
        return None
    head: Any = model.get_submodule(arch.head)
    head.weight = model.get_submodule(arch.embedding).weight
    model.set_submodule(arch.head, nn.Identity())
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.all_tied_weights_keys = {}
    return head
