"""Fully connected layers, alone and fused with the activation behind them."""

from fastnn.ops.linear.functional import *  # noqa: F403
from fastnn.ops.linear.functional import __all__ as __all__
