"""Evaluation: how good a model is, quantized or not. Knows nothing of how it was quantized."""

from planish.eval.perplexity import perplexity

__all__ = ["perplexity"]
