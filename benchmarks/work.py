"""How fastnn served a call: by which of its ops, or why by torch's, and how much work the ops declare that to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Work:
    """`torch_reason` is None if native kernels served the whole call. Without a declaration the figures are None."""

    torch_reason: str | None
    flops: float | None
    bytes: float | None


class _NativeOps(TorchDispatchMode):
    """Adds up the declared cost of each op of fastnn that runs, backward ops included."""

    def __init__(self, declared):
        super().__init__()
        self.declared, self.flops, self.bytes, self.count = declared, 0.0, 0.0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastnn":
            cost = self.declared[func._opname].cost(*args)
            self.flops, self.bytes, self.count = (
                self.flops + cost.flops,
                self.bytes + cost.bytes,
                self.count + 1,
            )
        return func(*args, **(kwargs or {}))


def observe(call: Callable[[], object], backward: bool) -> Work:
    """Run `call` once and tell how fastnn served it."""
    from fastnn.ops import _declare

    routed = []
    before, _declare.recorder = _declare.recorder, lambda op, args, reason: routed.append((op, args, reason))
    try:
        with _NativeOps(_declare.OPS) as native:
            call()
    finally:
        _declare.recorder = before
    reasons = [reason for _, _, reason in routed if reason is not None]
    if not routed:
        reasons = ["torch's own function"]
    if not reasons:
        return Work(None, native.flops, native.bytes)
    if backward or not routed:
        return Work(reasons[0], None, None)
    costs = [op.cost(*args) for op, args, _ in routed]
    return Work(reasons[0], sum(c.flops for c in costs), sum(c.bytes for c in costs))
