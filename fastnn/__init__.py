"""Drop-in PyTorch layers on fast kernels.

>>> from fastnn import nn  # instead of: from torch import nn
>>> import fastnn.nn.functional as F  # instead of: import torch.nn.functional as F
"""

from fastnn import (
    _library,  # noqa: F401  (loads the ops; must come first)
    nn,
    ops,
)
from fastnn._explain import explain
from fastnn._tune import tune
from fastnn.convert import convert, revert
from fastnn.freeze import freeze, load

__version__ = "0.1.0"

__all__ = ["__version__", "convert", "explain", "freeze", "load", "nn", "ops", "revert", "tune"]
