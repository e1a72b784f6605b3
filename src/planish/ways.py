"""Ways: how a whole-model stage trains, by what memory there is for it.

    size = whole_size(skeleton, schemes, stage, dtype)     what decides its memory
    setting = planned(setting, size, stage, seqlen)        by the Trainer, or lean where memory is short

`EndToEnd.ways` says what is tried one after another; each is refused here if there is no room for it, before any work.
"""

import dataclasses
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from planish.arch import Arch, discover, linears
from planish.errors import PlanishError
from planish.fit.norms import norms_of
from planish.fit.watch import Setting, begun
from planish.fit.whole import EndToEnd
from planish.log import Event
from planish.plan import MARGIN, WholeSize, gigabytes, gpu_memory, host_memory, plan_whole
from planish.quant.low_rank import TILE
from planish.scheme import Scheme

CHECKPOINTING_FROM = 500_000_000  # weights
TILE_PIECES = 6  # fp32 tiles that a product with factors inside holds at a time


def planned(setting: Setting, size: WholeSize, stage: EndToEnd, seqlen: int) -> Setting:
    """The setting with what the plan decides: lean or not, and samples in a pass. To be asked before any work.

    A run that goes on trains as it did; without a GPU it is lean only if it shall be, and what isn't optional is tried.

    Raises:
        PlanishError: if neither way fits, or not the Trainer's where slots are trained `if_room`; or the Trainer would
            be taken for another GPU than the first.
    """
    before = begun(setting.folder) if setting.resume else {}
    lean = before.get("lean") if setting.lean is None else setting.lean
    micro = before.get("micro_batch", min(setting.micro_batch, stage.batch_size))
    if stage.if_room and before and set(before["rates"]) != set(stage.rates):
        raise PlanishError(f"the run began without {stage.spared}, and goes on so")
    if setting.device.type != "cuda":
        free = host_memory() - size.waiting
        if stage.if_room:
            _check_room(stage, bool(lean), size.peak(seqlen, lean=False, checkpointing=False), free)
        micro = micro if lean else size.most(micro, seqlen, free, stage.optional)
        return dataclasses.replace(setting, lean=bool(lean), micro_batch=micro)
    plan = plan_whole(
        size,
        seqlen=seqlen,
        batch_size=stage.batch_size,
        micro_batch=micro,
        checkpointing=setting.checkpointing,
        lean=lean,
        free=gpu_memory(setting.device),
        host=host_memory(),
    )
    if stage.if_room:
        _check_room(stage, plan.lean, plan.by_trainer, plan.free)
    if not plan.lean and not trains_on(setting.device):
        raise PlanishError(
            f"transformers' Trainer takes the first GPU that it sees, not {setting.device}; set "
            f"CUDA_VISIBLE_DEVICES={setting.device.index} and give the device as cuda, or finetune lean (--lean)"
        )
    if plan.lean and setting.progress:
        setting.progress(Event(stage=stage.name, index=0, total=0, note=plan.summary()))
    return dataclasses.replace(setting, lean=plan.lean, micro_batch=plan.micro_batch)


def _check_room(stage: EndToEnd, lean: bool, need: int, free: int) -> None:
    if lean or MARGIN * need > free:
        raise PlanishError(
            f"{stage.name} leaves {stage.spared} as they are: to train them takes "
            f"{gigabytes(need)} by the Trainer, and {gigabytes(free)} are free"
        )


def trains_on(device: torch.device) -> bool:
    """Does transformers' Trainer train on this device? Of GPUs it takes the first."""
    return not device.index


def whole_size(
    skeleton: PreTrainedModel, schemes: Mapping[str, Scheme], stage: EndToEnd, dtype: torch.dtype
) -> WholeSize:
    """What decides the memory of a stage, of a model that needn't be there yet.

    Args:
        skeleton: before anything is packed; parameters may be on meta.
        schemes: of the linears that are (to be) packed.
        dtype: of what isn't packed, and of activations.
    """
    arch, config = discover(skeleton), skeleton.config.get_text_config()
    shapes, item = linears(arch, skeleton), dtype.itemsize
    of_block = [sum(norms) if "norm" in stage.rates else 0 for norms in _norm_sizes(skeleton, arch)]
    rest = [value for name, value in skeleton.named_parameters() if name.removesuffix(".weight") not in schemes]
    codes, graph, latent = -item * sum(of_block), [0] * arch.num_blocks, "weight" in stage.rates
    for name, (rows, columns) in shapes.items():
        block = int(name.removeprefix(f"{arch.blocks}.").partition(".")[0])
        # a linear's input and output; as much again for norms, activation functions and gradients on their way
        graph[block] += 2 * item * (rows + columns)
        if (scheme := schemes.get(name)) is None:
            continue
        groups, stored = rows * scheme.groups_in(columns), {"scale": 2} if scheme.symmetric else {"scale": 2, "zero": 1}
        if stage.inside is not None:
            # the frozen weight has no codes either, and units where it has 8 bits
            codes += rows * columns + 4 * groups if stage.inside.in_8_bits else item * rows * columns
            of_block[block] += stage.inside.rank * (rows + columns) + groups * ("offset" in stage.rates)
        else:
            # weights that are trained have no codes, but what they started from and what they round to
            codes += 2 * item * rows * columns if latent else rows * scheme.bits * -(-columns // 8)
        codes += groups * sum(count for slot, count in stored.items() if slot not in stage.rates)
        of_block[block] += groups * sum(slot in stage.rates for slot in stored) + rows * columns * latent
    head = config.vocab_size * config.hidden_size * item if stage.distill > 0 else 0
    packed = [shapes[name] for name in schemes]
    largest_linear = max((rows * columns for rows, columns in packed), default=0)
    return WholeSize(
        fixed=codes + head + item * sum(value.numel() for value in rest),
        trained=sum(of_block),
        largest=max(of_block),
        weights=sum(rows * columns for rows, columns in packed),
        packed=0 if stage.inside is not None else _stored(schemes, shapes),
        dense=item * largest_linear + TILE_PIECES * 4 * min(TILE, largest_linear) * (stage.inside is not None),
        graph=max(graph),
        logits=4 * config.vocab_size * (10 if stage.distill > 0 else 6),
        boundary=config.hidden_size * item,
        blocks=arch.num_blocks,
    )


def _stored(schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of packed linears."""
    sizes = ((shapes[name], scheme) for name, scheme in schemes.items())
    return round(sum(rows * columns * scheme.bits_per_weight(columns) for (rows, columns), scheme in sizes) / 8)


def _norm_sizes(skeleton: PreTrainedModel, arch: Arch) -> list[list[int]]:
    """By block the sizes of its norms."""
    blocks = ({name: skeleton.get_submodule(name)} for name in map(arch.block, range(arch.num_blocks)))
    return [[norm.get_parameter("weight").numel() for norm in norms_of(block).values()] for block in blocks]


def wants_checkpointing(size: WholeSize, device: torch.device) -> bool:
    """Whether blocks are recomputed in the backward pass: where their activations would outweigh the weights."""
    return device.type == "cuda" and size.weights > CHECKPOINTING_FROM
