"""Scheme: how one linear's weights are stored. SchemeMap: which linear gets which Scheme.

A scheme is written as the field writes it:

    w2g64      2 bits, one scale for 64 inputs, symmetric (full range, signed scale)
    w2g64asym  the same with an integer zero point for every group
    w4         4 bits with the customary groups of 128
    w4pc       4 bits, one scale for each output channel
    w3g16k     3 bits, groups of 16 whose scales are small multiples of one they share: Q3_K in a GGUF
    W4A16, W4A16_ASYM, w3a16g64: the same, activations left in 16 bits
    w4a4       activations of 4 bits too, each token by its own range; weights by output channel
    w8a8s, w4g128a8, w4a4kv4: activations symmetric; groups of 128; query, key and value in 4 bits too
    w4a4h      inputs turned by a Hadamard matrix first, where that loses less
    w4a4kv4h   query and key of each head turned before they are rounded
    w2.5g64    2.5 bits on average: linears get 2, 3, 4 or 8 by what each would lose, see Average

This file knows nothing of models or methods.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from planish.errors import PlanishError

BITS = (2, 3, 4, 6, 8)
ACTIVATION_BITS = (4, 5, 6, 7, 8)
DEFAULT_GROUP = 128

_ACTIVATIONS = r"(?:a(?P<act>\d+)(?P<even>s(?!ym))?(?P<turned>h)?)?(?:kv(?P<kv>\d+)(?P<kvturned>h)?)?"
_GROUP = r"(?:g(?P<group{0}>\d+)(?P<k{0}>k)?|(?P<pc{0}>pc))?"
SHARING = 16  # groups in a row whose scales share one
_PATTERN = re.compile(
    rf"w(?P<bits>\d+){_GROUP.format(1)}{_ACTIVATIONS}{_GROUP.format(2)}_?(?P<sym>asym|sym)?"
)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """How what a linear multiplies is rounded, each token by its own range.

    Args:
        bits: of its inputs, 4 to 8, or 16 to leave them.
        symmetric: without a zero point. turned: multiplied by a Hadamard matrix before they are rounded.
        kv_bits: of query, key and value in its block, each head of a token by its own range; 16 to leave them.
        kv_turned: query and key are turned before they are rounded, which leaves their products.
    """

    bits: int = 16
    symmetric: bool = False
    turned: bool = False
    kv_bits: int = 16
    kv_turned: bool = False

    def __post_init__(self) -> None:
        for what, bits in (("activations", self.bits), ("query, key and value", self.kv_bits)):
            if bits not in (*ACTIVATION_BITS, 16):
                raise PlanishError(f"{what} of {bits} bits aren't supported; use 4 to 8, or 16")

    def __str__(self) -> str:
        inputs = f"a{self.bits}{'s' * self.symmetric}{'h' * self.turned}"
        heads = f"kv{self.kv_bits}{'h' * self.kv_turned}" if self.kv_bits < 16 else ""
        return heads if heads and self.bits == 16 else inputs + heads


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Storage of one weight matrix [out, in].

    Args:
        bits: bits of a code, one of 2, 3, 4, 8.
        group_size: inputs that share a scale, a multiple of 8; None is the whole row (one scale a channel).
        symmetric: True has a signed scale and the constant zero point 2^(bits-1); False stores an
            integer zero point for each group.
        activations: how what the weight is multiplied by is rounded; None leaves it in 16 bits.
        shared: scales of 16 groups in a row are integers of 6 bits times one fp16 number, see `qtensor.store_shared`.
    """

    bits: int
    group_size: int | None = DEFAULT_GROUP
    symmetric: bool = True
    activations: Activations | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise PlanishError(f"{self.bits} bits aren't supported; use one of {', '.join(map(str, BITS))}")
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            raise PlanishError(
                f"group size {self.group_size} isn't supported; use a multiple of 8, such as 32, 64 or 128"
            )
        if self.shared and (self.bits, self.group_size, self.symmetric, self.activations) != (3, 16, True, None):
            raise PlanishError(f"{self} isn't supported: GGUF's Q3_K alone has scales that share one; use w3g16k")

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read 'w2g64', 'w4', 'w3g128asym', 'w4pc', 'W4A16_ASYM', 'w4a4', 'w4g128a8'.

        Raises:
            PlanishError: if the text is no scheme.
        """
        match = _PATTERN.fullmatch(text.strip().lower())
        if match is None:
            raise PlanishError(f"no scheme {text!r}; write it as w4g128, w2g64asym, w3pc or W4A16")
        size, whole = match["group1"] or match["group2"], match["pc1"] or match["pc2"]
        if (match["group1"] or match["pc1"]) and (match["group2"] or match["pc2"]):
            raise PlanishError(f"no scheme {text!r}: it names its groups twice; write it as w4g128a8")
        rounded = int(match["act"] or 16) < 16
        activations = None
        if rounded or int(match["kv"] or 16) < 16:
            activations = Activations(
                bits=int(match["act"] or 16),
                symmetric=bool(match["even"]),
                turned=bool(match["turned"]),
                kv_bits=int(match["kv"] or 16),
                kv_turned=bool(match["kvturned"]),
            )
        group = None if whole or (rounded and not size) else int(size or DEFAULT_GROUP)
        return cls(
            bits=int(match["bits"]),
            group_size=group,
            symmetric=match["sym"] != "asym",
            activations=activations,
            shared=bool(match["k1"] or match["k2"]),
        )

    def __str__(self) -> str:
        group = "pc" if self.group_size is None else f"g{self.group_size}{'k' * self.shared}"
        return f"w{self.bits}{group}{self.activations or ''}{'' if self.symmetric else 'asym'}"

    @property
    def turned(self) -> bool:
        """Are its inputs to be turned?"""
        return self.activations is not None and self.activations.turned

    def unturned(self) -> "Scheme":
        """The same with its inputs left as they come."""
        how = self.activations
        return self if how is None else dataclasses.replace(self, activations=dataclasses.replace(how, turned=False))

    def group_in(self, in_features: int) -> int:
        """Group size for a row of in_features inputs (the row itself if group_size is None)."""
        return in_features if self.group_size is None else self.group_size

    def groups_in(self, in_features: int) -> int:
        """Groups in a row; the last one is shorter if the group size doesn't divide the row."""
        return -(-in_features // self.group_in(in_features))

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits a weight: code, fp16 scale (6 bits and a share of one) and, if asymmetric, a zero point of `bits`
        bits."""
        overhead = (6 + 16 / SHARING if self.shared else 16) + (0 if self.symmetric else self.bits)
        return self.bits + overhead * self.groups_in(in_features) / in_features


MIXED_BITS = (2, 3, 4, 8)
_AVERAGE = re.compile(r"w(?P<bits>\d+\.\d+)(?P<rest>.*)")


@dataclass(frozen=True, kw_only=True)
class Average:
    """Bits of a code that linears have on average, scales not counted, as in w2g64; written as w2.5g64.

    Args:
        candidates: the schemes on offer, by bits; alike otherwise.
    """

    bits: float
    candidates: tuple[Scheme, ...]

    @classmethod
    def parse(cls, text: str) -> "Average | None":
        """Read 'w2.5g64', 'w3.0', 'w2.25g64asym'; None if the bits are a whole number, without a point.

        Raises:
            PlanishError: if the average is out of range, or what follows it is no scheme.
        """
        match = _AVERAGE.fullmatch(text.strip().lower())
        if match is None:
            return None
        bits = float(match["bits"])
        if not MIXED_BITS[0] <= bits <= MIXED_BITS[-1]:
            raise PlanishError(f"no average of {bits:g} bits; ask for {MIXED_BITS[0]} to {MIXED_BITS[-1]}")
        return cls(bits=bits, candidates=tuple(Scheme.parse(f"w{width}{match['rest']}") for width in MIXED_BITS))

    def __str__(self) -> str:
        first = str(self.candidates[0])
        return first.replace(f"w{self.candidates[0].bits}", f"w{self.bits}", 1)


@dataclass(frozen=True, kw_only=True)
class SchemeMap:
    """Which linear gets which scheme: the first rule whose regex is found in the name wins.

    Args:
        default: scheme of every linear that no rule names.
        rules: (regex, Scheme), or (regex, None) to leave the linear in 16 bits.
    """

    default: Scheme
    rules: tuple[tuple[str, Scheme | None], ...] = ()

    @classmethod
    def parse(cls, scheme: str, layers: Iterable[str] = (), ignore: Iterable[str] = ()) -> "SchemeMap":
        """From a scheme, 'REGEX=SCHEME' texts and regexes to ignore (these win)."""
        rules: list[tuple[str, Scheme | None]] = [(pattern, None) for pattern in ignore]
        for text in layers:
            pattern, sep, value = text.rpartition("=")
            if not sep or not pattern:
                raise PlanishError(f"layer rule {text!r} isn't REGEX=SCHEME; write it as 'down_proj=w4g64'")
            rules.append((pattern, Scheme.parse(value)))
        for pattern, _ in rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise PlanishError(f"{pattern!r} is no regular expression: {error}") from error
        return cls(default=Scheme.parse(scheme), rules=tuple(rules))

    def __getitem__(self, name: str) -> Scheme | None:
        for pattern, scheme in self.rules:
            if re.search(pattern, name):
                return scheme
        return self.default

    def named(self, name: str) -> bool:
        """Does a rule name the linear?"""
        return any(re.search(pattern, name) for pattern, _ in self.rules)

    def resolve(self, shapes: dict[str, tuple[int, int]]) -> dict[str, Scheme]:
        """Scheme of every linear to quantize.

        Args:
            shapes: name -> (out_features, in_features) of every candidate linear.

        Raises:
            PlanishError: if a rule matches no linear, a group is larger than a row, or nothing is left.
        """
        for pattern, _ in self.rules:
            if not any(re.search(pattern, name) for name in shapes):
                raise PlanishError(
                    f"{pattern!r} matches none of the {len(shapes)} linears; `planish info` lists their names"
                )
        chosen = {name: scheme for name in shapes if (scheme := self[name]) is not None}
        if not chosen:
            raise PlanishError("no linear is left to quantize; relax --ignore")
        for name, scheme in chosen.items():
            if scheme.group_size is not None and scheme.group_size > shapes[name][1]:
                raise PlanishError(
                    f"{name}: group size {scheme.group_size} is larger than its {shapes[name][1]} inputs; "
                    "use a smaller group, or 'pc' for one scale a row"
                )
        return chosen

    def __str__(self) -> str:
        return ", ".join([str(self.default), *self.said])

    @property
    def said(self) -> list[str]:
        """The rules as text."""
        return [f"{pattern}={scheme or '16-bit'}" for pattern, scheme in self.rules]


def bits_per_weight(schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]], parameters: int) -> float:
    """Stored bits a weight over a whole model, what stays in 16 bits (embeddings, norms) counted too.

    Args:
        schemes: of the quantized linears.
        shapes: (out, in) of at least those.
        parameters: of the whole model, tied ones once.
    """
    bits, quantized = 0.0, 0
    for name, scheme in schemes.items():
        count = shapes[name][0] * shapes[name][1]
        bits += count * scheme.bits_per_weight(shapes[name][1])
        quantized += count
    return (bits + 16 * (parameters - quantized)) / parameters
