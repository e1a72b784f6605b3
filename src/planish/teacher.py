"""Teacher: the float model to distil from, as its last hidden states on every sample and its head.

    teacher = teacher_of(source, ids, ...)     made block by block, kept on the host or on disk

How well it reads the text is said: what it can't read it can't teach. Knows nothing of what is trained.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planish.arch import discover
from planish.errors import PlanishError
from planish.fit.loss import NO_LABEL, next_token
from planish.fit.objective import logits_of, shifted
from planish.fit.teacher import last_hidden
from planish.log import Event, Progress
from planish.plan import measure_room, plan_streams
from planish.source import Source
from planish.stream import BlockStream

# perplexity that no float model has of text it can read: Gemma-3-270M had 13 of WikiText, and 527 by a broken tokenizer
STRANGE, READ, ROWS = 200.0, 4, 256


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The model to distil from.

    Args:
        hidden: its last hidden states [samples, tokens, hidden], of the samples that are trained on.
        logits: its head, hidden states [tokens, hidden] -> [tokens, vocabulary].
    """

    hidden: Tensor
    logits: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def perplexity(self, labels: Tensor, device: torch.device) -> float:
        """Of the first READ samples, whose labels are int64 [samples, tokens]; the head is on `device`."""
        total, labels = torch.zeros((), dtype=torch.float64, device=device), shifted(labels[:READ]).to(device)
        for hidden, row in zip(self.hidden[:READ], labels, strict=True):
            for states, wanted in zip(hidden.to(device).split(ROWS), row.split(ROWS), strict=True):
                total += next_token(self.logits(states), wanted)
        return float((total / (labels != NO_LABEL).sum()).exp())


def teacher_of(
    source: Source,
    ids: Tensor,
    *,
    labels: Tensor | None = None,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch: int,
    directory: Path,
    progress: Progress | None = None,
) -> Teacher:
    """The float model's last hidden states on `ids` [samples, tokens]; its head stays loaded on the device.

    They go to host memory, or to a file in `directory` if that is too small. Its perplexity is said, of `labels` (every
    token, if not given): a tokenizer that isn't the model's shows there, and nowhere else before all work is done.

    Raises:
        PlanishError: if neither has room for them.
    """
    skeleton = source.skeleton()
    arch = discover(skeleton)
    blocks = skeleton.get_submodule(arch.blocks)
    assert isinstance(blocks, nn.ModuleList) and arch.head is not None
    decoder = skeleton.get_submodule(arch.decoder)
    # the Trainer takes its samples from the host
    room = dataclasses.replace(measure_room(device, directory), device=0)
    hidden_size = source.config.get_text_config().hidden_size
    plan = plan_streams(len(ids), ids.shape[1], hidden_size, dtype, "auto", device, room, count=1)
    if progress:
        progress(Event(stage="teacher", index=0, total=arch.num_blocks, note=f"the teacher's {plan.summary()}"))

    def load(index: int) -> nn.Module:
        source.load(blocks[index], arch.block(index), device, dtype)
        return blocks[index]

    with source.lend(arch.around, device, dtype):
        stream = BlockStream(
            decoder, blocks, ids, device=device, storage=plan.where, micro_batch=micro_batch, quantized=False,
            directory=directory,
        )  # fmt: skip
        hidden = last_hidden(stream, decoder, blocks, ids, load, lambda index: source.unload(blocks[index]))
    source.load(skeleton.get_submodule(arch.head), arch.head, device, dtype)
    teacher = Teacher(hidden=hidden, logits=logits_of(skeleton))
    if progress:
        found = teacher.perplexity(ids if labels is None else labels, device)
        strange = "; is this its tokenizer, and a text of a kind that it knows?" if found > STRANGE else ""
        note = f"perplexity of the float model on {min(READ, len(ids))} windows: {found:.1f}{strange}"
        progress(Event(stage="teacher", index=0, total=arch.num_blocks, note=note))
    return teacher


def check_vocabulary(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher whose logits don't stand for the same tokens.

    Raises:
        PlanishError: if the vocabularies have different sizes.
    """
    ours, theirs = (part.config.get_text_config().vocab_size for part in (model, teacher))
    if ours != theirs:
        raise PlanishError(f"the teacher has a vocabulary of {theirs}, the model one of {ours}; give its own original")
