"""Objective: a language model and its loss as one module, which any trainer can train.

    loss = sum over tokens of `next_token`, over the tokens that have a label

Its state is what is trained and nothing else. The other model of a distillation comes as its last hidden states:
they take hidden / vocabulary of the room of its logits, and are made once, block by block (`fit.teacher`); or anew
at each step, by the same modules without their quantizers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planish.arch import Arch
from planish.fit.loss import NO_LABEL, in_chunks, next_token
from planish.quant import as_float


def logits_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The head as a function: hidden states [tokens, hidden] -> logits [tokens, vocabulary], scaled and capped."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        values: Tensor = head(hidden)
        values = values if factor == 1 else values.float() * factor
        return values if cap is None else torch.tanh(values.float() / cap) * cap

    return logits


def shifted(labels: Tensor) -> Tensor:
    """Labels [n, tokens] aligned with ids -> aligned with the position that predicts them; the last has none."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], NO_LABEL)], dim=1)


class Objective(nn.Module):
    """Loss of a model on tokens.

    Args:
        model: an ordinary transformers language model, its trainable tensors marked.
        arch: where its decoder is.
        distill, temperature: see `next_token`.
        teacher_logits: the other model's head, taking its hidden states; None distils from the model itself without
            its quantizers.
    """

    accepts_loss_kwargs = True  # to transformers' Trainer: the sum is divided by the tokens of the whole step

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Arch,
        *,
        distill: float = 0.0,
        temperature: float = 1.0,
        teacher_logits: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.decoder_name = arch.decoder
        self.distill, self.temperature = distill, temperature
        self._logits = logits_of(model)
        self.own_teacher = distill > 0 and teacher_logits is None
        self._teacher_logits = teacher_logits or self._logits

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        teacher: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """{"loss": mean over the tokens that have a label}.

        Args:
            input_ids: int64 [batch, tokens]. labels: as of `shifted`.
            teacher: the other model's last hidden states [batch, tokens, hidden].
            num_items_in_batch: tokens with a label in the whole step, where this is a part of it.
        """
        if self.own_teacher:
            teacher = self.own_hidden(input_ids)
        hidden = self.model.get_submodule(self.decoder_name)(input_ids=input_ids, use_cache=False)[0]
        total = self.of_hidden(hidden, labels, teacher)
        count = (labels != NO_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}

    @torch.no_grad()
    def own_hidden(self, input_ids: Tensor) -> Tensor:
        """Last hidden states [batch, tokens, hidden] of the float model whose weights the quantizers started from."""
        was = self.model.training
        self.model.eval()
        with as_float(self.model):
            hidden: Tensor = self.model.get_submodule(self.decoder_name)(input_ids=input_ids, use_cache=False)[0]
        self.model.train(was)
        return hidden

    def of_hidden(self, hidden: Tensor, labels: Tensor, teacher: Tensor | None = None) -> Tensor:
        """Summed loss of last hidden states [batch, tokens, hidden]."""
        flat, wanted = hidden.flatten(0, 1), labels.flatten()
        theirs = None if teacher is None else teacher.flatten(0, 1)

        def loss(piece: Tensor, part: slice) -> Tensor:
            logits = None
            if self.distill > 0:
                assert theirs is not None
                with torch.no_grad():
                    logits = self._teacher_logits(theirs[part])
            return next_token(self._logits(piece), wanted[part], logits, self.distill, self.temperature)

        return in_chunks(flat, loss)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is trained, by name."""
        return {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take back what `state_dict` gave."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        result.missing_keys.clear()  # what isn't trained isn't missing
        return result
