"""Convolutions, alone and fused with the ReLU and the max-pooling behind them."""

from fastnn.ops.conv.functional import *  # noqa: F403
from fastnn.ops.conv.functional import __all__ as __all__
