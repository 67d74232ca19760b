"""How fastnn served a call: by which of its ops, or why by torch's, and how much work the ops declare that to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Case


@dataclass(frozen=True)
class Work:
    """`torch_reason` is None if native kernels served the whole call. Without a declaration the figures are None.

    `kernels` are the names of those that ran on a GPU, by op.
    """

    torch_reason: str | None
    flops: float | None
    bytes: float | None
    kernels: dict[str, str] = field(default_factory=dict)


class _NativeOps(TorchDispatchMode):
    """Adds up the declared cost of each op of fastnn that runs, backward ops included."""

    def __init__(self, declared):
        super().__init__()
        self.declared, self.flops, self.bytes, self.count = declared, 0.0, 0.0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastnn" and func._opname in self.declared:
            op = self.declared[func._opname]
            cost = op.cost(*args[: len(op.schema.arguments)])  # without algorithms, which `raw` takes
            self.flops, self.bytes, self.count = (
                self.flops + cost.flops,
                self.bytes + cost.bytes,
                self.count + 1,
            )
        return func(*args, **(kwargs or {}))


def observe(call: Callable[[], object], case: Case) -> Work:
    """Run `call`, fastnn's of a case, once and tell how it was served.

    The operations and bytes are those that fastnn's ops declare; where torch's served the call, `count` has them.
    """
    from fastnn.ops.core.op import OPS
    from fastnn.ops.core.watch import watching

    routed = []
    with (
        watching(lambda op, args, plan: routed.append((op, args, plan))),
        _NativeOps(OPS) as native,
    ):
        call()
    reasons = [plan.reason for _, _, plan in routed if plan.algorithm is None]
    kernels = {}
    for op, args, plan in routed:
        if plan.algorithm is not None and not args[0].is_cpu:
            kernels.setdefault(op.name, plan.algorithm)
    if case.direction == "backward" or not case.elementwise:
        # The forward pass was before this call, and its route with it; a module may mix both.
        reason = reasons[0] if reasons else None if native.count else "torch's own function"
        return Work(reason, *count(case), kernels)
    if not routed:
        reasons = ["torch's own function"]
    if not reasons:
        return Work(None, native.flops, native.bytes, kernels)
    return Work(reasons[0], *count(case), kernels)


def count(case: Case) -> tuple[float, float]:
    """Operations of stock PyTorch's matrix products and convolutions, and bytes if each tensor moves once.

    A backward pass reads inputs and upstream gradient again and writes a gradient for each input that wants one.
    """
    function, tensors = case.call("stock")
    with FlopCounterMode(display=False) as counter:
        # As views: the counter's hooks on modules refuse leaves that want gradients.
        output = function(*(t.view_as(t) if t.requires_grad else t for t in tensors))
        forward = counter.get_total_flops()
        if case.backward:
            wanted = [t for t in tensors if t.requires_grad]
            torch.autograd.grad(output, wanted, torch.ones_like(output))
    flops = counter.get_total_flops()
    size = sum(t.nbytes for t in tensors) + output.nbytes
    moved = 0 if case.direction == "backward" else size
    if case.backward:
        moved += size + sum(t.nbytes for t in wanted)
    return float(flops - forward if case.direction == "backward" else flops), float(moved)
