"""Planish: take a Hugging Face language model to 2, 3 or 4 bits with the least loss, in the least time.

    import planish
    model = planish.quantize("org/name", recipe="signround", scheme="w2g64")
    planish.save(model, "name-w2g64")
    model = planish.load("name-w2g64")
    planish.perplexity(model, "wiki.test.raw")
    planish.finetune("name-w2g64", "tuned", "e2e_qp", data="train.jsonl")

Importing Planish changes nothing for others: no registration, no patches. Its parts are imported when
they are first used, since torch and transformers take seconds and `planish --help` needs neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planish.api import info, load, quantize, quantize_to, resolve, save
    from planish.decode import generate
    from planish.errors import PlanishError, UnsupportedScheme
    from planish.eval.agreement import agreement, reference
    from planish.eval.perplexity import perplexity
    from planish.eval.tasks import evaluate
    from planish.hf import register, unregister
    from planish.qtensor import QTensor
    from planish.scheme import Scheme, SchemeMap
    from planish.trainable import convert, parameter_groups, prepare
    from planish.transcode import export
    from planish.tuning import finetune

__version__ = "0.1.0"
__all__ = [
    "PlanishError",
    "QTensor",
    "Scheme",
    "SchemeMap",
    "UnsupportedScheme",
    "agreement",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "generate",
    "info",
    "load",
    "parameter_groups",
    "perplexity",
    "prepare",
    "quantize",
    "quantize_to",
    "reference",
    "register",
    "resolve",
    "save",
    "unregister",
]

_HOME = {
    "planish.api": ("info", "load", "quantize", "quantize_to", "resolve", "save"),
    "planish.decode": ("generate",),
    "planish.errors": ("PlanishError", "UnsupportedScheme"),
    "planish.eval.agreement": ("agreement", "reference"),
    "planish.eval.perplexity": ("perplexity",),
    "planish.eval.tasks": ("evaluate",),
    "planish.transcode": ("export",),
    "planish.hf": ("register", "unregister"),
    "planish.qtensor": ("QTensor",),
    "planish.scheme": ("Scheme", "SchemeMap"),
    "planish.trainable": ("convert", "parameter_groups", "prepare"),
    "planish.tuning": ("finetune",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'planish' has no attribute {name!r}")
