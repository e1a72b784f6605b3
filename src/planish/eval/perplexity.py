"""Perplexity: exp of the mean loss of each next token, by the field's customary protocol.

    non-overlapping windows of seqlen tokens (the rest is left out), no BOS,
    the last seqlen - 1 tokens of each window count, losses in float32, their sum in float64

The head runs on one window at a time, some rows at once: the logits of a batch would be the largest
tensor of all. This file knows nothing of quantization; any causal language model of transformers will do.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish import data
from planish.errors import PlanishError
from planish.folder import tokenizer_of

# rows of logits at once: 256 rows of a 262k vocabulary in float32 are 256 MiB
LOGIT_ROWS = 256


@torch.no_grad()
def perplexity(
    model: nn.Module,
    text: str | Path | Tensor,
    *,
    tokenizer: Any = None,
    seqlen: int = 2048,
    batch_size: int = 8,
    limit: int | None = None,
    bos: bool = False,
) -> float:
    """Perplexity of a model on a text, on the device that the model is on.

    Args:
        model: a causal language model of transformers.
        text: token ids int64 [n], or a source as `planish.data` reads it: a file, 'embedded-eval', ...
        tokenizer: for a source; by default the one of the model's own folder.
        seqlen: tokens of a window.
        batch_size: windows at once.
        limit: only the first so many windows.
        bos: begin the text with the token that the tokenizer begins every text with, if there is one: once, not each
            window, as GPTQ's code and what follows it do.

    Raises:
        PlanishError: if the text is shorter than one window, or its tokenizer can't be found.
    """
    ids = text if isinstance(text, Tensor) else _tokens(model, text, tokenizer, bos)
    windows = data.split(ids, seqlen, "the text" if isinstance(text, Tensor) else str(text))[:limit]
    model.eval()
    decoder, head = parts(model, windows[0, :8])
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in windows.split(batch_size):
        batch = batch.to(device)
        for hidden, target in zip(decoder(batch), batch, strict=True):
            total += _loss_sum(head, hidden[:-1], target[1:])
    return float(torch.exp(total / (len(windows) * (seqlen - 1))))


def _loss_sum(head: Any, hidden: Tensor, target: Tensor) -> Tensor:
    """Sum of losses in float64: hidden [n, width] or logits, target [n]."""
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for rows, wanted in zip(hidden.split(LOGIT_ROWS), target.split(LOGIT_ROWS), strict=True):
        total += nn.functional.cross_entropy(head(rows).float(), wanted, reduction="sum").double()
    return total


def parts(model: Any, probe: Tensor) -> tuple[Any, Any]:
    """(ids -> hidden, hidden -> logits) of a model.

    Most models are a decoder and a linear head. Some scale or cap their logits: a few tokens tell, and
    then the model itself gives the logits, a whole batch of them, and the head is the identity.
    """

    def decoder(ids: Tensor) -> Tensor:
        return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    def whole(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    head = model.get_output_embeddings()
    probe = probe[None].to(model.get_input_embeddings().weight.device)
    plain = head is not None and torch.allclose(head(decoder(probe)), whole(probe), rtol=1e-3, atol=1e-3)
    return (decoder, head) if plain else (whole, nn.Identity())


def _tokens(model: Any, source: str | Path, tokenizer: Any, bos: bool) -> Tensor:
    tokenizer = tokenizer or tokenizer_of(model)
    if tokenizer is None:
        raise PlanishError(f"no tokenizer in {model.config.name_or_path!r}; pass tokenizer=, or token ids")
    ids = data.tokens(tokenizer, source)
    begin = [token for token in tokenizer("")["input_ids"][:1] if bos and token == tokenizer.bos_token_id]
    return torch.cat([torch.tensor(begin, dtype=ids.dtype), ids])
