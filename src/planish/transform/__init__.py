"""Transforms: equivalences of a model that quantization likes better; each folds away into its weights."""

from planish.transform.rotate import Rotate
from planish.transform.smooth import Smooth

__all__ = ["Rotate", "Smooth"]
