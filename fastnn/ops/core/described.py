"""Calls whose sizes are symbols, described by numbers where a rule asks for them: a tracer would tie the graph to the answer."""

from __future__ import annotations

import math
import operator

import torch

from fastnn.ops.core.tracing import is_static

# What stands for a size that is a symbol.
_TYPICAL_SIZE = 32


def _typical(n, of_dynamo):
    """What stands for a size or stride: itself, if it is known."""
    if is_static(n):
        return operator.index(n)  # for Dynamo too a number, and no symbol of one value
    if torch.compiler.is_dynamo_compiling():
        return of_dynamo
    import sympy

    # With the symbols that it is made of as typical sizes, so that shapes which follow from others still do.
    expression = n.node.expr
    return int(
        expression.xreplace({symbol: sympy.Integer(_TYPICAL_SIZE) for symbol in expression.free_symbols})
    )


class Described:
    """Stands in for a tensor with sizes that are symbols, where only a tensor's description is asked for."""

    def __init__(self, tensor):
        self.dtype, self.device, self.layout = tensor.dtype, tensor.device, tensor.layout
        self.is_cpu, self.is_cuda = tensor.is_cpu, tensor.is_cuda
        # What is exported is to be served.
        self.requires_grad = tensor.requires_grad and not torch.compiler.is_exporting()
        self.shape = tuple([_typical(n, _TYPICAL_SIZE) for n in tensor.shape])
        # A stride that is a symbol is the product of some sizes.
        self._strides = tuple([_typical(n, _TYPICAL_SIZE**2) for n in tensor.stride()])
        self._element_size = tensor.element_size()

    def dim(self):
        return len(self.shape)

    def numel(self):
        return math.prod(self.shape)

    def stride(self, dim):
        return self._strides[dim]

    def element_size(self):
        return self._element_size


def _is_static(tensor) -> bool:
    return all([is_static(n) for n in tensor.shape])


def are_known(args: tuple) -> bool:
    """Whether the sizes of an op's arguments are numbers, and those of every call of the graph that is traced."""
    if torch.compiler.is_exporting():
        return False
    return all([_is_static(a) for a in args if isinstance(a, torch.Tensor)])


def described(args: tuple) -> tuple:
    """An op's arguments as they are where their sizes are known, else with descriptions in place of the tensors.

    A decision about a traced call follows from what is static: so it adds no guard, and holds for every size.
    """
    if are_known(args):
        return args
    return tuple([Described(a) if isinstance(a, torch.Tensor) else _number(a) for a in args])


def _number(value):
    # Dynamo's symbols pass for ints.
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return _typical(value, _TYPICAL_SIZE)
    return value
