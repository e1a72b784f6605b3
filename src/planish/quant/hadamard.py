"""Hadamard matrices of many orders, and their fast transform: x H / sqrt(n), H of +1 and -1, H H^T = n.

n = 2^k * m: Sylvester's matrix of order 2^k (k butterflies) times a core of order m: 1, or Paley's, from the
squares modulo a prime q: m = q + 1 for q = 3 mod 4, m = 2 (q + 1) for q = 1 mod 4. The core is as small as can be
found: 1536 = 128 * 12, 576 = 8 * 72, 11008 = 2 * 5504. Where there is none, a block of the largest power of two
is turned, the others alike: still orthogonal, less mixing. Knows nothing of models.
"""

import functools

import torch
from torch import Tensor

LARGEST_CORE = 512  # a core costs m multiplications for each value


@functools.cache
def core_of(size: int) -> tuple[int, Tensor]:
    """(2^k, core [m, m], orthogonal, fp64) with 2^k * m a divisor of `size`, as a rule `size` itself."""
    power = size & -size
    for twos in [power >> i for i in range(power.bit_length())]:
        order = size // twos
        core = _paley(order) if 1 < order <= LARGEST_CORE else torch.ones(1, 1) if order == 1 else None
        if core is not None:
            return twos, core.double() / order**0.5
    return power, torch.ones(1, 1, dtype=torch.float64)


def _paley(order: int) -> Tensor | None:
    """Paley's first or second construction; None if the order has none."""
    if order % 4:
        return None
    if _is_prime(order - 1):
        return _bordered(order - 1, skew=True) + torch.eye(order)
    if (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        conference = _bordered(order // 2 - 1, skew=False)
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(conference, one) + torch.kron(torch.eye(order // 2), other)
    return None


def _bordered(q: int, skew: bool) -> Tensor:
    """Jacobsthal's matrix of residues modulo q, with a border of ones."""
    residue = -torch.ones(q)
    residue[torch.arange(1, q) ** 2 % q] = 1
    residue[0] = 0
    index = torch.arange(q)
    found = torch.zeros(q + 1, q + 1)
    found[1:, 1:] = residue[(index.unsqueeze(1) - index) % q]
    found[0, 1:], found[1:, 0] = 1, -1 if skew else 1
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))


@functools.cache
def _core_on(size: int, device: torch.device, dtype: torch.dtype) -> tuple[int, Tensor]:
    """As `core_of`, kept where it is needed: nothing may be copied to a GPU while a step is captured."""
    power, core = core_of(size)
    return power, core.to(device, dtype)


def turn(x: Tensor, signs: Tensor | None = None) -> Tensor:
    """x diag(signs) H / sqrt(n) over the last dimension; computed at least in fp32, in the dtype of x."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    if signs is not None:
        values = values * signs.to(values)
    power, core = _core_on(x.shape[-1], values.device, values.dtype)
    values = values.unflatten(-1, (-1, power, len(core)))
    if len(core) > 1:
        values = values @ core
    half = 1
    while half < power:
        pairs = values.unflatten(-2, (-1, 2, half))
        first, second = pairs.unbind(-3)
        values = torch.stack([first + second, first - second], -3).flatten(-4, -2)
        half *= 2
    return (values * power**-0.5).flatten(-3).to(x.dtype)
