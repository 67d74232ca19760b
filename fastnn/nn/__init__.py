"""A stand-in for :mod:`torch.nn`: the accelerated modules, and every other name from torch.

>>> from fastnn import nn  # instead of: from torch import nn
"""

from typing import TYPE_CHECKING

import torch.nn

if TYPE_CHECKING:
    from torch.nn import *  # noqa: F403

from fastnn.nn import _stand_in
from fastnn.nn.attention import MultiheadAttention
from fastnn.nn.container import Sequential
from fastnn.nn.conv import Conv1d, Conv2d, ConvReLU2d, ConvReLUMaxPool2d
from fastnn.nn.linear import Linear, LinearGELU, LinearReLU
from fastnn.nn.pool import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AvgPool1d,
    AvgPool2d,
    MaxPool1d,
    MaxPool2d,
)
from fastnn.nn.transformer import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AvgPool1d",
    "AvgPool2d",
    "Conv1d",
    "Conv2d",
    "ConvReLU2d",
    "ConvReLUMaxPool2d",
    "Linear",
    "LinearGELU",
    "LinearReLU",
    "MaxPool1d",
    "MaxPool2d",
    "MultiheadAttention",
    "Sequential",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

#: The modules that are fastnn's; every other name here is torch's.
ACCELERATED = tuple(__all__)

if not TYPE_CHECKING:
    __getattr__, __dir__, __all__ = _stand_in.hand_on(torch.nn, globals())
    _stand_in.hand_on_submodules()
