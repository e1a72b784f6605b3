"""How much each linear's rounding moves the model's predictions, to second order, one block in memory at a time.

    KL(p || p_hat) ~ 1/2 sum over tokens and outputs of  (dL/dy)^2 (dW x)^2,    dW = W_hat - W,  y = W x

dL/dy is the gradient of the loss on tokens drawn from the model's own predictions, so that its square is the
diagonal of the Fisher information (Gauss-Newton); dW x is the error that the output really makes, with all that
cancels over inputs. The float blocks go forward once, each one's input kept, and backward once, each run anew.
Weights have no gradient, W_hat is the searched range of each width, and of a wide linear every so many-th output is
measured. Knows nothing of budgets.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from planish.fit.seen import input_moments
from planish.fit.spans import Blocks
from planish.fit.teacher import Given
from planish.quant import MinMax, Quantizer, Searched
from planish.scheme import Scheme
from planish.stream import BlockStream

WIDE = 8  # bits at which min/max ranges do
ROWS = 256  # outputs that stand for all of a linear, or a few more: rows are rounded each by itself


def sensitivities(
    blocks: Blocks,
    stream: BlockStream,
    candidates: Mapping[str, Sequence[Scheme]],
    gradient: Callable[[slice, Tensor], Tensor],
) -> dict[str, list[float]]:
    """By linear the loss in nats a token, at each of its candidates.

    Args:
        stream: at block 0 of the float model, without a quantized stream; used up.
        candidates: by full name; linears not named aren't measured.
        gradient: (which samples, hidden states behind the last block) -> gradient of the summed loss for them.
    """
    inputs: list[Tensor] = []
    moments: dict[str, Tensor] = {}
    for index in range(len(blocks.names)):
        block = blocks.load(index)
        linears = _linears(blocks.names[index], block, candidates)
        inputs.append(stream.copy(stream.fp))
        moments |= input_moments(linears, functools.partial(stream.advance, stream.fp, block, index))
        blocks.unload(index)
    grads = torch.cat([gradient(part, stream.fp[part].to(stream.device)).to(stream.fp.device)
                       for part in stream.parts()])  # fmt: skip
    found: dict[str, list[float]] = {}
    for index in reversed(range(len(blocks.names))):
        block, hidden = blocks.load(index), inputs.pop()
        linears = _linears(blocks.names[index], block, candidates)
        errors = {name: _errors(part.weight[:: _step(part)], candidates[name], moments.get(name))
                  for name, part in linears.items()}  # fmt: skip
        with _Watched(linears, errors) as watched:
            for part in stream.parts():
                grads[part] = _backward(stream, block, index, hidden[part], grads[part]).to(grads.device)
        tokens = hidden.shape[0] * hidden.shape[1]
        found |= {name: (losses / (2 * tokens)).tolist() for name, losses in watched.losses.items()}
        blocks.unload(index)
    return {name: found[name] for name in candidates}


def drawn_gradient(
    model: nn.Module, blocks: nn.ModuleList, ids: Tensor, seed: int
) -> Callable[[slice, Tensor], Tensor]:
    """`gradient` for `sensitivities`: of the loss on tokens that the model itself predicts, drawn by chance.

    Args:
        model: all but its blocks loaded, the head among it. ids: int64 [samples, tokens].
    """

    def gradient(part: slice, hidden: Tensor) -> Tensor:
        hidden = hidden.detach().requires_grad_()
        draw = torch.Generator(hidden.device).manual_seed(seed + part.start)
        original = list(blocks)
        try:
            for index, block in enumerate(original):
                blocks[index] = Given(block, hidden)
            logits = model(input_ids=ids[part].to(hidden.device), use_cache=False).logits.float().flatten(0, 1)
        finally:
            for index, block in enumerate(original):
                blocks[index] = block
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw).squeeze(-1)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return torch.autograd.grad(loss, hidden)[0]

    return gradient


class _Watched:
    """While it lasts, what each linear's error at each candidate costs, summed up as gradients come by."""

    def __init__(self, linears: Mapping[str, nn.Linear], errors: Mapping[str, Sequence[Tensor]]) -> None:
        self.linears, self.errors = linears, errors
        self.losses = {
            name: torch.zeros(len(errors[name]), dtype=torch.float64, device=part.weight.device)
            for name, part in linears.items()
        }

    def __enter__(self) -> "_Watched":
        self.handles = [part.register_forward_hook(self._note(name)) for name, part in self.linears.items()]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, name: str) -> Callable[..., None]:
        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()

            def backward(grad: Tensor) -> None:
                weight = grad[..., :: _step(module)].float().square() * _step(module)
                for i, error in enumerate(self.errors[name]):
                    moved = nn.functional.linear(x, error).float()
                    self.losses[name][i] += (moved.square() * weight).sum(dtype=torch.float64)

            output.register_hook(backward)

        return forward


def _linears(name: str, block: nn.Module, wanted: Mapping[str, Sequence[Scheme]]) -> dict[str, nn.Linear]:
    named = ((f"{name}.{path}", part) for path, part in block.named_modules())
    return {full: part for full, part in named if isinstance(part, nn.Linear) and full in wanted}


def _step(linear: nn.Module) -> int:
    """Of how many rows one is measured."""
    return max(1, linear.get_parameter("weight").shape[0] // ROWS)


@torch.no_grad()
def _errors(weight: Tensor, schemes: Sequence[Scheme], moment: Tensor | None) -> list[Tensor]:
    """W_hat - W at each scheme."""
    found = []
    for scheme in schemes:
        slot = MinMax if scheme.bits >= WIDE else Searched
        found.append(Quantizer(weight, scheme, range_slot=slot, importance=moment)(weight) - weight)
    return found


def _backward(stream: BlockStream, block: nn.Module, index: int, hidden: Tensor, grad: Tensor) -> Tensor:
    """Gradient of what enters the block, from that of what leaves it."""
    hidden = hidden.to(stream.device).detach().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others add gradients up in any order
        output = stream.run(block, index, hidden)
        return torch.autograd.grad(output, hidden, grad.to(output))[0]
