"""The ops of fastnn, one file per family, each op declared once."""

from fastnn.ops import attention, conv, layer_norm, linear, pool

__all__ = ["attention", "conv", "layer_norm", "linear", "pool"]
