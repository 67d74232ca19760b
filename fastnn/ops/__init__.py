"""The ops of fastnn: a package per family, each op declared once, and what all of them share in ``core``."""

from fastnn.ops import attention, conv, linear, norm, pool

__all__ = ["attention", "conv", "linear", "norm", "pool"]
