"""A stand-in for :mod:`torch.nn.functional`: the accelerated functions, and every other name from torch.

>>> import fastnn.nn.functional as F  # instead of: import torch.nn.functional as F
"""

from typing import TYPE_CHECKING

import torch.nn.functional

if TYPE_CHECKING:
    from torch.nn.functional import *  # noqa: F403

from fastnn.nn import _stand_in
from fastnn.nn._multi_head_attention import multi_head_attention_forward
from fastnn.ops.conv import conv1d, conv2d, conv2d_relu, conv2d_relu_max_pool2d
from fastnn.ops.linear import linear, linear_relu

__all__ = [
    "conv1d",
    "conv2d",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "linear",
    "linear_relu",
    "multi_head_attention_forward",
]

#: The functions that are fastnn's; every other name of this module is torch's.
ACCELERATED = tuple(__all__)

if not TYPE_CHECKING:
    __getattr__, __dir__, __all__ = _stand_in.hand_on(torch.nn.functional, globals())
