"""The ops of fastnn, one file per family, each op declared once."""

from fastnn.ops import linear

__all__ = ["linear"]
