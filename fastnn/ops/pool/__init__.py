"""Pooling: maximum and average, over windows and to a given output size."""

from fastnn.ops.pool.functional import *  # noqa: F403
from fastnn.ops.pool.functional import __all__ as __all__
