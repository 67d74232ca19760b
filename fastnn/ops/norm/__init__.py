"""Layer normalization behind a residual connection."""

from fastnn.ops.norm.functional import *  # noqa: F403
from fastnn.ops.norm.functional import __all__ as __all__
