"""The implementations that are measured against one another.

A new rival is a subclass of :class:`Peer` and an entry in :func:`default_peers`; one that needs a package which is not
installed, or that cannot run a case, says so in ``why_not`` and the run goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as stock_functional

from benchmarks.cases import Case


class Peer:
    """One implementation: a function per case, and the inputs in the form it likes best."""

    name: str
    title: str

    def why_not(self, case: Case) -> str | None:
        """Why this peer has no part in a case, or None."""
        return None

    def function(self, case: Case) -> Callable[..., torch.Tensor]:
        """The case's op as a function of its tensors."""
        raise NotImplementedError

    def tensors(self, case: Case) -> list[torch.Tensor]:
        """The case's inputs, converted before the clock starts."""
        return case.tensors()


class FastNN(Peer):
    """fastnn's functional interface, in the layout of the case."""

    name, title = "fastnn", "fastnn"

    def function(self, case):
        import fastnn.nn.functional

        return partial(getattr(fastnn.nn.functional, case.workload.op), **case.workload.options)


class Eager(Peer):
    """Stock PyTorch, op after op, in the layout of the case."""

    name, title = "eager", "stock eager"

    def function(self, case):
        return stock(case.workload.op, case.workload.options)


class EagerChannelsLast(Eager):
    """Stock PyTorch with inputs and weights in channels_last, where the case itself is not: the best layout for stock."""

    name, title = "channels_last", "stock channels_last"

    def why_not(self, case):
        if not case.has_layouts:
            return "not images"
        return "the case itself is in channels_last" if case.layout == "channels_last" else None

    def tensors(self, case):
        return replace(case, layout="channels_last").tensors()


def default_peers() -> list[Peer]:
    """Who is measured (first) and against whom."""
    return [FastNN(), Eager(), EagerChannelsLast()]


def stock(op: str, options: dict) -> Callable[..., torch.Tensor]:
    """An op from torch's own functions."""
    if op in _FUSED:
        return partial(_FUSED[op], **options)
    return partial(getattr(stock_functional, op), **options)


def _linear_relu(input, weight, bias=None):
    return torch.relu(stock_functional.linear(input, weight, bias))


def _conv2d_relu(input, weight, bias=None, **options):
    return torch.relu(stock_functional.conv2d(input, weight, bias, **options))


def _conv2d_relu_max_pool2d(
    input, weight, bias=None, *, kernel_size=2, pool_stride=None, pool_padding=0, **options
):
    x = torch.relu(stock_functional.conv2d(input, weight, bias, **options))
    return stock_functional.max_pool2d(x, kernel_size, pool_stride, pool_padding)


# What the fused ops must equal.
_FUSED = {
    "linear_relu": _linear_relu,
    "conv2d_relu": _conv2d_relu,
    "conv2d_relu_max_pool2d": _conv2d_relu_max_pool2d,
}
