"""The equation of quantization with its three slots, in pure torch; knows nothing of models or methods."""

from planish.quant.linear import QLinear
from planish.quant.quantizer import Quantizer
from planish.quant.range import Clip, Grid, Learned, MinMax, Searched, TunedMinMax
from planish.quant.rounding import Nearest, Offset
from planish.quant.weight import Fixed, Free

__all__ = [
    "Clip",
    "Fixed",
    "Free",
    "Grid",
    "Learned",
    "MinMax",
    "Nearest",
    "Offset",
    "QLinear",
    "Quantizer",
    "Searched",
    "TunedMinMax",
]
