"""Planish: take a Hugging Face language model to 2, 3 or 4 bits with the least loss, in the least time.

    import planish
    model = planish.quantize("org/name", recipe="signround", scheme="w2g64")
    planish.save(model, "name-w2g64")
    model = planish.load("name-w2g64")
    planish.perplexity(model, "wiki.test.raw")

Importing Planish changes nothing for others: no registration, no patches.
"""

from planish.api import load, quantize, quantize_to, resolve, save
from planish.errors import PlanishError, UnsupportedScheme
from planish.eval.perplexity import perplexity
from planish.qtensor import QTensor
from planish.scheme import Scheme, SchemeMap

__version__ = "0.1.0"
__all__ = ["PlanishError", "QTensor", "Scheme", "SchemeMap", "UnsupportedScheme", "load", "perplexity", "quantize",
           "quantize_to", "resolve", "save"]
