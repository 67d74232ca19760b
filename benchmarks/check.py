"""Agreement with float64, which every implementation must show on a case before it is timed there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.cases import DTYPES, LAYOUTS, Case


def results(
    function: Callable, tensors: list[torch.Tensor], upstream: torch.Tensor | None
) -> list[torch.Tensor]:
    """The output and, with `upstream`, the gradient of each input that wants one."""
    if upstream is None:
        with torch.no_grad():
            return [function(*tensors)]
    out = function(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]


class Reference:
    """The float64 results of a case, and how far stock is from them in the case's own dtype.

    An implementation agrees if its largest error is at most twice stock's, plus one unit of the dtype's relative
    precision at the largest value, which is what a single rounding may cost.

    Through many layers (``case.elementwise`` is false) that cannot be asked of single elements: where a ReLU's input is 0 but
    for rounding, one implementation hands a gradient on that another stops. There the error is the Euclidean norm of the
    difference, and ``NORM_SLACK`` of a gradient's norm is allowed beside twice stock's; an output's only one rounding.
    """

    # One flip in a million elements.
    NORM_SLACK = 1e-3

    def __init__(self, case: Case):
        self.case = case
        # Layouts hold the same numbers: they share the reference, the dear part of a check.
        exact = _exact(case if case.layout == LAYOUTS[0] else replace(case, layout=LAYOUTS[0]))
        self.upstream, self.values, self.names = exact.upstream, exact.values, exact.names
        self.stock_errors = [max(e) for e in zip(*map(self._errors, exact.from_stock), strict=True)]
        self.worst_stock = max(map(self.worst, exact.from_stock))
        eps = torch.finfo(DTYPES[case.dtype]).eps
        slacks = [eps, *[eps if case.elementwise else self.NORM_SLACK] * (len(self.values) - 1)]
        self.bounds = [
            2 * e + slack * self._size(v)
            for e, slack, v in zip(self.stock_errors, slacks, self.values, strict=True)
        ]

    def disagreement(self, got: list[torch.Tensor], allowed: float | None = None) -> str | None:
        """What is wrong with an implementation's results, or None.

        The bound is the usual one, or the relative error that is `allowed`, of this implementation or in the case, if
        that is more.
        """
        for name, g, v in zip(self.names, got, self.values, strict=True):
            if g.shape != v.shape:
                return f"{name}: expected shape {tuple(v.shape)}, got {tuple(g.shape)}"
            if g.dtype is not DTYPES[self.case.dtype]:
                return f"{name}: expected {DTYPES[self.case.dtype]}, got {g.dtype}"
        kind = "largest error" if self.case.elementwise else "error"
        for name, error, bound, value in zip(
            self.names, self._errors(got), self.bounds, self.values, strict=True
        ):
            bound = max(bound, max(allowed or 0.0, self.case.allowed) * self._size(value))
            if not error <= bound:
                return f"{name}: {kind} {error:.2e} against float64, at most {bound:.2e} is right"
        return None

    def worst(self, got: list[torch.Tensor]) -> float:
        """The largest error of any result, relative to the size of that result."""
        pairs = zip(self._errors(got), self.values, strict=True)
        return max(e / (self._size(v) or 1.0) for e, v in pairs)

    def _errors(self, got):
        return [self._size(g.double() - v) for g, v in zip(got, self.values, strict=True)]

    def _size(self, t: torch.Tensor) -> float:
        if self.case.elementwise or t.numel() == 0:
            return _largest(t)
        value = t.norm().item()
        return math.inf if math.isnan(value) else value


class _Exact(NamedTuple):
    """The gradient that is fed back, the results in float64 and stock's, in each layout that the case has."""

    upstream: torch.Tensor | None
    values: list[torch.Tensor]
    names: list[str]
    from_stock: list[list[torch.Tensor]]


# As many as a run has families, layouts and directions between two cases that share one.
@lru_cache(maxsize=16)
def _exact(case: Case) -> _Exact:
    function, doubled = case.call("stock", double=True)
    upstream = _upstream(case, function, doubled) if case.backward else None
    values = results(function, doubled, upstream)
    names = ["output", *(f"gradient {i}" for i, t in enumerate(doubled) if t.requires_grad)]
    # Stock's kernels differ between layouts, and so do their errors: its own error is the larger.
    layouts = LAYOUTS if case.has_layouts else LAYOUTS[:1]
    from_stock = [results(*case.call("stock", layout=layout), upstream) for layout in layouts]
    return _Exact(upstream, values, names, from_stock)


def _largest(t: torch.Tensor) -> float:
    if t.numel() == 0:
        return 0.0
    value = t.abs().max().item()
    return math.inf if math.isnan(value) else value


def _upstream(case: Case, function, tensors) -> torch.Tensor:
    """The gradient that is fed back: random, but zero where rounding alone decides which input it reaches."""
    with torch.no_grad():
        shape = function(*tensors).shape
        undecided = _undecided(case, tensors) if case.elementwise else None
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(
        case.device, DTYPES[case.dtype]
    )
    return upstream if undecided is None else upstream.masked_fill(undecided, 0)


def _undecided(case: Case, tensors) -> torch.Tensor | None:
    """Where the fused ops' ReLU or max-pool takes the gradient's way by less than the rounding errors of the dtype."""
    op, options = case.workload.op, dict(case.workload.options)
    if op == "linear_relu":
        z = F.linear(*tensors)
    elif op.startswith("conv2d_relu"):
        pool = {k: options.pop(k) for k in ("kernel_size", "pool_stride", "pool_padding") if k in options}
        z = F.conv2d(*tensors, **options)
    else:
        return None
    # A sum of products in fp32 is off by some rounding errors; in bf16 by one or two, when it is stored. A GPU may round what it
    # multiplies to TF32, as torch's convolutions do unless told otherwise.
    eps, roundings = torch.finfo(DTYPES[case.dtype]).eps, 2 if case.dtype == "bf16" else 64
    if case.dtype == "fp32" and case.device == "cuda":
        eps, roundings = 2.0**-10, 2
    tolerance = eps * roundings * _largest(z)
    if not op.endswith("max_pool2d"):
        return z.abs() < tolerance
    kernel, padding = pool.get("kernel_size", 2), pool.get("pool_padding", 0)
    z = F.pad(z, (padding,) * 4, value=-math.inf)
    windows = z.unfold(2, kernel, pool.get("pool_stride") or kernel).unfold(
        3, kernel, pool.get("pool_stride") or kernel
    )
    best = windows.flatten(-2).topk(2, dim=-1).values
    first, second = best[..., 0], best[..., 1]
    return (first.abs() < tolerance) | ((first > 0) & (first - second < tolerance))
