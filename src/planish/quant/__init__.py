"""The equation of quantization with its three slots, in pure torch; knows nothing of models or methods."""

from planish.quant.linear import QLinear, as_float
from planish.quant.low_rank import LowRank, LowRankSteps
from planish.quant.quantizer import Quantizer
from planish.quant.range import Clip, Given, Grid, Learned, MinMax, Searched, TunedMinMax, Unclipped, grid_of
from planish.quant.rounding import Nearest, Offset
from planish.quant.weight import Fixed, Free, Steps

__all__ = [
    "Clip",
    "Fixed",
    "Free",
    "Given",
    "Grid",
    "Learned",
    "LowRank",
    "LowRankSteps",
    "MinMax",
    "Nearest",
    "Offset",
    "QLinear",
    "Quantizer",
    "Searched",
    "Steps",
    "TunedMinMax",
    "Unclipped",
    "as_float",
    "grid_of",
]
