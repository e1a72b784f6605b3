"""PackedEmbedding: an nn.Embedding whose table is a packed QTensor.

    y = W_hat[ids] * multiplier

Only the rows that are asked for are decoded. A tied head is a `PackedHead`: it multiplies by the same codes. Knows
nothing of how the codes were found, nor of files.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from planish.kernels.linear import PackedLinear
from planish.kernels.pack import Packed


class PackedEmbedding(PackedLinear):
    """Looks rows up.

    Args:
        table: [vocabulary, hidden].
        multiplier: what some models scale their embeddings by (Gemma's `embed_scale`); 1 if they don't.
        dtype: of the result; follows the model's own.
    """

    def __init__(self, table: Packed, multiplier: float, dtype: torch.dtype) -> None:
        super().__init__(table)
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.multiplier = multiplier
        self._like = torch.empty(0, dtype=dtype, device=table.codes.device)

    @property
    def weight(self) -> Tensor:
        """Empty; it says which device and dtype the rows come in."""
        return self._like

    def forward(self, ids: Tensor) -> Tensor:
        """ids, of any shape -> [..., hidden]."""
        rows = self.packed.qtensor(ids.flatten())
        found = rows.dequantize(self._like.dtype).unflatten(0, ids.shape)
        # as in transformers, where the multiplier is rounded to the dtype first
        return found if self.multiplier == 1 else found * self._like.new_tensor(self.multiplier)

    def product(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> x W_hat^T [..., vocabulary]."""
        return super().forward(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedEmbedding":
        super()._apply(fn, recurse)
        self._like = fn(self._like)
        return self


class PackedHead(nn.Module):
    """A head that is tied to a packed embedding."""

    def __init__(self, table: PackedEmbedding) -> None:
        super().__init__()
        self.in_features, self.out_features = table.in_features, table.out_features
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> logits [..., vocabulary]."""
        return self.table.product(x)
