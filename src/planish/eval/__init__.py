"""Evaluation: how good a model is, quantized or not. Knows nothing of how it was quantized.

Perplexity of text, tasks by lm-eval, agreement with the float model on prompts.
"""

from planish.eval.perplexity import perplexity

__all__ = ["perplexity"]
