"""Attention. No kernel of fastnn covers it yet: every call runs on torch's op, and ``explain`` shows it."""

from torch.nn.functional import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
