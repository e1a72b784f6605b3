"""The float model's last hidden states on every sample, made block by block, so that it is never whole in memory.

Its head turns them into logits when a batch needs them: hidden states take hidden / vocabulary of the room, and
serve every epoch. The final norm is applied by the decoder itself, its blocks replaced by what they gave.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from planish.stream import BlockStream, Recorder


class Given(Recorder):
    """Stands where a block was and gives hidden states that are there already."""

    def __init__(self, block: nn.Module, hidden: Tensor) -> None:
        super().__init__(block, last=False)
        self.given = hidden

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.given


@torch.no_grad()
def finish(decoder: nn.Module, blocks: nn.ModuleList, ids: Tensor, hidden: Tensor) -> Tensor:
    """The decoder's last hidden states [batch, tokens, hidden], had its blocks given `hidden`."""
    original = list(blocks)
    try:
        for index, block in enumerate(original):
            blocks[index] = Given(block, hidden)
        return decoder(input_ids=ids, use_cache=False)[0]  # type: ignore[no-any-return]
    finally:
        for index, block in enumerate(original):
            blocks[index] = block


@torch.no_grad()
def last_hidden(
    stream: BlockStream,
    decoder: nn.Module,
    blocks: nn.ModuleList,
    ids: Tensor,
    load: Callable[[int], nn.Module],
    unload: Callable[[int], None],
) -> Tensor:
    """Last hidden states [samples, tokens, hidden] of all samples, where the stream lives.

    Args:
        stream: at block 0 of the float model, without a quantized stream.
        decoder: the part of the model that holds the blocks; what is outside of them is loaded.
        load, unload: a block by its index, on the stream's device and away.
    """
    for index in range(len(blocks)):
        stream.advance(stream.fp, load(index), index)
        unload(index)
    for part in stream.parts():
        hidden = finish(decoder, blocks, ids[part].to(stream.device), stream.fp[part].to(stream.device))
        stream.fp[part] = hidden.to(stream.fp.device)
    return stream.fp
