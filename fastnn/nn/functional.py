"""A stand-in for :mod:`torch.nn.functional`: the accelerated functions, and every other name from torch.

>>> import fastnn.nn.functional as F  # instead of: import torch.nn.functional as F
"""

from typing import TYPE_CHECKING

import torch.nn.functional

if TYPE_CHECKING:
    from torch.nn.functional import *  # noqa: F403

from fastnn.nn import _stand_in
from fastnn.nn._multi_head_attention import multi_head_attention_forward
from fastnn.ops.attention import scaled_dot_product_attention
from fastnn.ops.conv import conv1d, conv2d, conv2d_activation, conv2d_relu, conv2d_relu_max_pool2d
from fastnn.ops.linear import linear, linear_activation, linear_gelu, linear_relu
from fastnn.ops.norm import add_layer_norm
from fastnn.ops.pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    avg_pool1d,
    avg_pool2d,
    max_pool1d,
    max_pool2d,
)

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "add_layer_norm",
    "avg_pool1d",
    "avg_pool2d",
    "conv1d",
    "conv2d",
    "conv2d_activation",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "linear",
    "linear_activation",
    "linear_gelu",
    "linear_relu",
    "max_pool1d",
    "max_pool2d",
    "multi_head_attention_forward",
    "scaled_dot_product_attention",
]

#: The functions that are fastnn's; every other name of this module is torch's.
ACCELERATED = tuple(__all__)

if not TYPE_CHECKING:
    __getattr__, __dir__, __all__ = _stand_in.hand_on(torch.nn.functional, globals())
