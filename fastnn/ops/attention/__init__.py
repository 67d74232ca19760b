"""Scaled dot product attention."""

from fastnn.ops.attention.functional import *  # noqa: F403
from fastnn.ops.attention.functional import __all__ as __all__
