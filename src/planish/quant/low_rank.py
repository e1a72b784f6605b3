"""LowRank: factors of low rank added to a frozen weight inside the quantizer, and the product with what is rounded.

    L4Q (arXiv 2402.04902)      W' = W0 + alpha B A,   W_hat = s (clamp(round((W' - o) / s) + z) - z) + o
    LR-QAT (arXiv 2406.06385)   Z = phi + alpha B A,   W_hat = s (clamp(round(Z) + m) - z)
                                phi = W0 / s0 + z - m in 8 bits, m = 2^(bits-1)

With G = dY^T X and `inside` where no code was clamped, the gradients are, for L4Q,

    dX = dY W_hat,  dW' = G inside,  dB = alpha dW' A^T,  dA = alpha B^T dW'
    ds = sum of G ((Q - z) - inside (W' - o) / s),   dz = -sum of s G outside,   do = sum of G outside

and for LR-QAT, whose codes don't depend on s, dZ = s G inside, ds = sum of G (Q - z) and dz = -s sum of G. A graph
holds X, the frozen weight, A, B and the grid, nothing else of the size of a weight; G exists a tile of rows at a time.
Conversion adds up by the same op, so that what was trained is what is packed. A GPU has kernels for the ops below, in
`kernels.merged`. Knows nothing of layers, nor of what trains them.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from planish.qtensor import fake_quantize, fake_quantize_backward, from_groups, midpoint, to_groups
from planish.quant.range import Grid
from planish.scheme import Scheme

TILE = 2**24  # weights of a tile: 64 MiB for each fp32 temporary
LARGER = 4  # times as many where a kernel makes no temporaries: G alone is there, in 16 bits

# device type -> does its kernel of `merged_backward` take this group size and rank without temporaries?
fused: dict[str, Callable[[int, int], bool]] = {}


def tiles(out_features: int, in_features: int, times: int = 1) -> Iterator[slice]:
    """Rows of a weight, a tile at a time, or some together."""
    step = max(1, times * TILE // in_features)
    return (slice(start, start + step) for start in range(0, out_features, step))


def frozen(base: Tensor, unit: Tensor | None, group_size: int) -> Tensor:
    """The frozen part, fp32 [rows, in]; arguments as of `Latent`."""
    base = base.float()
    return base if unit is None else from_groups(to_groups(base, group_size) * unit, base.shape[1])


@torch.library.custom_op("planish::merged", mutates_args=())
def merged(base: Tensor, unit: Tensor | None, a: Tensor, b: Tensor, alpha: float, group_size: int) -> Tensor:
    """base * unit + alpha b a, fp32 [rows, in]; arguments as of `Latent`, differentiable in a and b."""
    with torch.autocast(base.device.type, enabled=False):  # or training would round otherwise than conversion
        return torch.addmm(frozen(base, unit, group_size), b.float(), a.float(), alpha=alpha)


@merged.register_fake
def _(base: Tensor, *_: object) -> Tensor:
    return torch.empty_like(base, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[2:4])
    ctx.alpha = inputs[4]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    a, b = ctx.saved_tensors
    grads = ctx.alpha * (b.float().T @ grad).to(a.dtype), ctx.alpha * (grad @ a.float().T).to(b.dtype)
    return None, None, *grads, None, None


merged.register_autograd(_backward, setup_context=_save)


def round_in_tiles(
    base: Tensor, unit: Tensor | None, a: Tensor, b: Tensor, alpha: float, group_size: int, scale: Tensor, zero: Tensor,
    bits: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W_hat [out, in] of what `merged` gives, as of `fake_quantize`, whose scale and zero [out, G, 1] these are."""
    dense = torch.empty_like(base, dtype=dtype)
    for rows in tiles(*base.shape):
        whose = unit if unit is None or len(unit) == 1 else unit[rows]
        groups = to_groups(merged(base[rows], whose, a, b[rows], alpha, group_size), group_size)
        values = fake_quantize(groups, None, scale[rows], zero[rows], bits, dtype)
        dense[rows] = from_groups(values, base.shape[1])
    return dense


merged_round = torch.library.custom_op("planish::merged_round", round_in_tiles, mutates_args=())


@merged_round.register_fake
def _(base: Tensor, *rest) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.empty_like(base, dtype=rest[-1])


def gradients_of(
    grad: Tensor, base: Tensor, unit: Tensor | None, a: Tensor, b: Tensor, alpha: float, group_size: int, scale: Tensor,
    zero: Tensor, bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dA, dB, ds and dz, fp32, of G [rows, in], any float dtype; dA is these rows' share."""
    groups = to_groups(merged(base, unit, a, b, alpha, group_size), group_size)
    spread = to_groups(grad, group_size).contiguous()
    moved, _, grad_scale, grad_zero = fake_quantize_backward(spread, groups, None, scale, zero, bits, True)
    moved = from_groups(moved, base.shape[1])
    with torch.autocast(base.device.type, enabled=False):
        return alpha * (b.float().T @ moved), alpha * (moved @ a.float().T), grad_scale, grad_zero


merged_backward = torch.library.custom_op("planish::merged_backward", gradients_of, mutates_args=())


@merged_backward.register_fake
def _(grad: Tensor, base: Tensor, unit: Tensor | None, a: Tensor, b: Tensor, alpha: float, group_size: int,
      scale: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    made = [torch.empty_like(part, dtype=torch.float32) for part in (a, b, scale, scale)]
    return made[0], made[1], made[2], made[3]


@dataclass(frozen=True, kw_only=True)
class Latent:
    """What is rounded, but for the grid.

    Args:
        base: the frozen part [out, in], float; or int8, in units of `unit`.
        unit: None, or fp32 [out, G, 1] or [1, 1, 1].
        a, b: the factors, [rank, in] and [out, rank].
        alpha: what their product is multiplied by.
        in_steps: base and product are in steps of the grid (LR-QAT), else in the weight's units (L4Q).
        bits, group_size: of the codes.
    """

    base: Tensor
    unit: Tensor | None
    a: Tensor
    b: Tensor
    alpha: float
    in_steps: bool
    bits: int
    group_size: int

    def parts(self, rows: slice) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float, int]:
        """What `merged` takes of some rows."""
        unit = self.unit if self.unit is None or len(self.unit) == 1 else self.unit[rows]
        return self.base[rows], unit, self.a, self.b[rows], self.alpha, self.group_size

    def rows(self, rows: slice) -> Tensor:
        """W' or Z, fp32 [rows, G, g]."""
        return to_groups(merged(*self.parts(rows)), self.group_size)

    def whole(self) -> Tensor:
        """The same of all rows, [out, G, g], differentiable in a and b."""
        return torch.cat([self.rows(rows) for rows in tiles(*self.base.shape)])

    def round(self, grid: Grid, dtype: torch.dtype) -> Tensor:
        """W_hat [out, in] in `dtype`, rounded once."""
        if not self.in_steps and grid.offset is None:
            return merged_round(*self.parts(slice(None)), grid.scale, grid.zero, self.bits, dtype)
        dense = torch.empty_like(self.base, dtype=dtype)
        for rows in tiles(*self.base.shape):
            dense[rows] = from_groups(self.rounded(self.rows(rows), _rows(grid, rows), dtype), self.base.shape[1])
        return dense

    def rounded(self, groups: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
        """W_hat [rows, G, g] of what `rows` gave."""
        if self.in_steps:
            return (grid.scale * self.levels(groups, grid)).to(dtype)
        assert grid.offset is not None, "without one W_hat is `merged_round`'s"
        values = fake_quantize(groups - grid.offset, None, grid.scale, grid.zero, self.bits, torch.float32)
        return (values + grid.offset).to(dtype)

    def at_once(self, grid: Grid) -> int:
        """Tiles that the gradient is made of together."""
        takes, plain = fused.get(self.base.device.type), not self.in_steps and grid.offset is None
        return LARGER if plain and takes is not None and takes(self.group_size, len(self.a)) else 1

    def levels(self, groups: Tensor, grid: Grid) -> Tensor:
        """Q - z of what is in steps: its codes lie around the middle, whatever z they are decoded with."""
        middle = self._unit_grid(grid)
        return fake_quantize(groups, None, *middle, self.bits, torch.float32) + (middle[1] - grid.zero)

    def _unit_grid(self, grid: Grid) -> tuple[Tensor, Tensor]:
        return torch.ones_like(grid.scale), torch.full_like(grid.scale, midpoint(self.bits))

    def gradients(self, grad: Tensor, rows: slice, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """(share of dA, dB, ds, dz, do), fp32, of G [rows, in]."""
        if not self.in_steps and grid.offset is None:
            return *merged_backward(grad, *self.parts(rows), grid.scale, grid.zero, self.bits), None
        groups, grad = self.rows(rows), to_groups(grad, self.group_size).float()
        if self.in_steps:
            unit = self._unit_grid(grid)
            moved = fake_quantize_backward(grad * grid.scale, groups, None, *unit, self.bits, True)[0]
            grad_scale = (grad * self.levels(groups, grid)).sum(-1, keepdim=True)
            zero, offset = -(grid.scale * grad).sum(-1, keepdim=True), None
        else:
            assert grid.offset is not None
            moved, _, grad_scale, zero = fake_quantize_backward(
                grad.contiguous(), groups - grid.offset, None, grid.scale, grid.zero, self.bits, True
            )
            offset = (grad - moved).sum(-1, keepdim=True)
        moved = from_groups(moved, self.base.shape[1])
        share = self.alpha * (self.b[rows].float().T @ moved)
        return share, self.alpha * (moved @ self.a.float().T), grad_scale, zero, offset


class LowRankProduct(torch.autograd.Function):
    """y = x W_hat^T + bias; see the top of the file."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        zero: Tensor,
        offset: Tensor | None,
        bias: Tensor | None,
        base: Tensor,
        unit: Tensor | None,
        how: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, scale, zero, offset, base, unit)
        ctx.how = how
        latent, grid = Latent(base=base, unit=unit, a=a, b=b, **how), Grid(scale, zero, offset)
        return functional.linear(x, latent.round(grid, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        x, a, b, scale, zero, offset, base, unit = ctx.saved_tensors
        grid, latent = Grid(scale, zero, offset), Latent(base=base, unit=unit, a=a, b=b, **ctx.how)
        flat, inputs, grad_x = grad.reshape(-1, base.shape[0]), x.reshape(-1, base.shape[1]), None
        with torch.autocast(x.device.type, enabled=False):
            parts = [
                latent.gradients(flat[:, rows].T @ inputs, rows, _rows(grid, rows))
                for rows in tiles(len(base), base.shape[1], latent.at_once(grid))
            ]
            shares, *columns = zip(*parts, strict=True)
            grad_a, (grad_b, *grads) = functools.reduce(torch.add, shares), map(_joined, columns)
            if ctx.needs_input_grad[0]:
                grad_x = (flat.to(x.dtype) @ latent.round(grid, x.dtype)).reshape(x.shape)
        grad_bias = flat.sum(0) if ctx.needs_input_grad[6] else None
        return grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype), *grads, grad_bias, None, None, None


def _joined(parts: tuple[Any, ...]) -> Any:
    """A result of tiles below one another as one, if there is any."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


def _rows(grid: Grid, rows: slice) -> Grid:
    return Grid(*(None if part is None else part[rows] for part in grid))  # type: ignore[arg-type]


class LowRank(nn.Module):
    """The weight slot W' = W0 + alpha B A, W0 frozen: it is the layer's own weight, not a copy.

    A starts as in LoRA, uniform in +-1 / sqrt(in), from torch's generator; B at zero, so that nothing is changed. Both
    are held in fp32. A relative rate moves A by a share of its own size, and B so that W' moves by a share of a step of
    the grid, in the root mean square.

    Args:
        weight: W0 [out, in].
        scheme: bits and group size.
        rank: of the product, at most the smaller side of the weight.
        alpha: what it is multiplied by.
        int8: hold W0 in 8 bits, each group by its own largest value; `forward` then leaves the weight it is given.
    """

    in_steps = False

    def __init__(self, weight: Tensor, scheme: Scheme, rank: int = 16, alpha: float = 1.0, int8: bool = False) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.alpha, self.bits, self.group_size = alpha, scheme.bits, scheme.group_in(in_features)
        limit = 1 / math.sqrt(in_features)
        start = torch.empty(rank, in_features, dtype=torch.float32, device=weight.device)
        self.a = nn.Parameter(start.uniform_(-limit, limit))
        self.b = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=weight.device))
        self.base: Tensor | None
        self.unit: Tensor | None
        self.register_buffer("base", None)
        self.register_buffer("unit", None)
        self.units: dict[str, float] = {}
        if int8:
            self._hold(weight)

    def start(self, weight: Tensor, grid: Grid) -> None:
        """Take the units of rates from the grid that the weight [out, in] starts on."""
        size = 1 / math.sqrt(3 * weight.shape[1])  # of an element of A
        step = 1.0 if self.in_steps else grid.scale.abs().mean().item()
        self.units = {"a": size, "b": step / (size * math.sqrt(len(self.a)) * self.alpha)}

    @torch.no_grad()
    def _hold(self, weight: Tensor) -> None:
        """W0 as int8 in units of each group's largest value over 127."""
        groups = to_groups(weight.detach().float(), self.group_size)
        self.unit = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self.base = from_groups((groups / self.unit).round(), weight.shape[1]).to(torch.int8).contiguous()

    def latent(self, weight: Tensor) -> Latent:
        """What is rounded, of the layer's weight [out, in]."""
        return Latent(
            base=weight if self.base is None else self.base, unit=self.unit, a=self.a, b=self.b, alpha=self.alpha,
            in_steps=self.in_steps, bits=self.bits, group_size=self.group_size,
        )  # fmt: skip

    def forward(self, weight: Tensor) -> Tensor:
        """W' [out, in] in fp32 (of LR-QAT, Z)."""
        return from_groups(self.latent(weight).whole(), weight.shape[1] if self.base is None else self.base.shape[1])

    @torch.no_grad()
    def held(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """W0 [out, in] in `dtype`: the layer's own weight, or what the 8 bits say."""
        assert not self.in_steps, "in steps of a grid, what lay beyond its ends is lost"
        if self.base is None:
            return weight
        return frozen(self.base, self.unit, self.group_size).to(dtype)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
        """x W_hat^T + bias, [..., out] of [..., in], in the dtype of x; under autocast as of nn.Linear."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        latent = self.latent(weight)
        how = {name: getattr(latent, name) for name in ("alpha", "in_steps", "bits", "group_size")}
        bias = None if bias is None else bias.to(x.dtype)
        args = x, self.a, self.b, *grid, bias, latent.base, latent.unit, how
        return LowRankProduct.apply(*args)  # type: ignore[no-any-return, no-untyped-call]


class LowRankSteps(LowRank):
    """The weight slot of LR-QAT: phi = W0 / s0 clamped to the levels and held in 8 bits, with factors in grid steps.

    s0 is the grid that the slot is started on by `start`; what is clamped there is lost.

    Args:
        weight, scheme, rank, alpha: as of `LowRank`.
    """

    in_steps = True

    def __init__(self, weight: Tensor, scheme: Scheme, rank: int = 16, alpha: float = 1.0) -> None:
        super().__init__(weight, scheme, rank, alpha)

    @torch.no_grad()
    def start(self, weight: Tensor, grid: Grid) -> None:
        """Take over W0 [out, in] in steps of a grid, signed fixed point with 8 - bits fraction bits."""
        super().start(weight, grid)
        fraction = 2 ** (8 - self.bits)
        steps = to_groups(weight.detach().float(), self.group_size) / grid.scale
        low, high = -grid.zero, 2**self.bits - 1 - grid.zero
        # an asymmetric grid reaches up to 2^bits - 1 on one side: around its middle all of it fits 8 bits
        middle = grid.zero - midpoint(self.bits)
        fixed = ((steps.clamp(low, high) + middle) * fraction).round().clamp(-128, 127)
        self.base = from_groups(fixed, weight.shape[1]).to(torch.int8).contiguous()
        self.unit = torch.full((1, 1, 1), 1 / fraction, device=weight.device)
