"""The ops of fastnn, one file per family, each op declared once."""

from fastnn.ops import conv, linear, pool

__all__ = ["conv", "linear", "pool"]
