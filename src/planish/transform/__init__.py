"""Transforms: equivalences of a model that quantization likes better; each folds away into its weights."""

from planish.transform.smooth import Smooth

__all__ = ["Smooth"]
