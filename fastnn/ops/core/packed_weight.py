"""Weights that were packed beforehand, for inference: what layers hold that :func:`fastnn.freeze` made.

Packed is the order in which the kernels of the running instruction-set level read a weight. A kernel that finds another
level's order reads the weight itself, which every call has beside it.
"""

from __future__ import annotations

import copy

import torch

from fastnn.ops.core.op import FLOATS

__all__ = ["READ_PACKED", "PackedWeight"]

#: The algorithms of convolutions and linear layers that read a packed weight in place of the weight.
READ_PACKED = frozenset(("linear", "rows", "pixels", "blocked", "registers"))

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled


class PackedWeight:
    """A weight in packed form, which stands for it as long as that is what it was.

    Each call that might read it asks whether the weight is still the one that was packed: the same tensor, at the same place in
    memory with the same strides, and with the same count of ops in place (``Tensor._version``). The memory is kept, so that no
    other weight can come to lie at that place. What is seen so: ``load_state_dict``, ops in place, optimizers that count them, a
    parameter that was replaced, moved, cast or given other data.

    Some writes are counted by nobody: those of ``torch.optim``'s fused optimizers, and those through ``.data``, a detached
    numpy array, DLPack or a raw pointer. Against the optimizers, a weight that a call sees wanting a gradient is never
    read packed again, and a layer that is set to training lets go of it. The others are not seen.

    Copies and pickles hold the weight alone, and pack it anew.

    Parameters
    ----------
    weight : Tensor or None
        Of a linear layer, shape ``(out_features, in_features)``, or of a convolution, ``(K, C / groups, R, S)``. An
        inference tensor, which counts nothing, is not packed, and neither is None.
    groups : int
        The convolution's.
    """

    def __init__(self, weight, groups=1):
        self.used = False  # whether a call has read it
        self._weight, self._groups = weight, groups
        if weight is None or weight.is_inference():
            self._forget()
        else:
            self._pack()

    def _pack(self):
        weight = self._weight
        self._packed = weight  # the tensor that `_data` stands for
        self._memory = weight.detach()
        self._place, self._strides, self._version = weight.data_ptr(), weight.stride(), weight._version
        self._data = torch.ops.fastnn._pack_weight(self._memory, self._groups)

    def _forget(self):
        self._packed = self._memory = self._data = self._place = self._strides = self._version = None

    @staticmethod
    def can_hold(weight):
        """Whether there is a packed form of a tensor: a plain one on the CPU, with elements of a floating dtype."""
        return (
            type(weight) in (torch.Tensor, torch.nn.Parameter)
            and weight.is_cpu
            and weight.dtype in FLOATS
            and weight.layout is torch.strided
            and weight.numel() > 0
            and not weight.is_inference()
        )

    def renew(self, weight, groups=1):
        """Pack a weight that has been moved or cast, or the one in its place; None or one that has no packed form for neither."""
        if self._weight is None or (self._packed is weight and self._is_unchanged(weight)):
            return
        if weight is not None and self.can_hold(weight) and not weight.requires_grad:
            self._weight, self._groups = weight, groups
            self._pack()
        else:
            self._forget()

    def __reduce__(self):
        return PackedWeight, (self._weight, self._groups)

    def __deepcopy__(self, memo):
        return PackedWeight(copy.deepcopy(self._weight, memo), self._groups)

    def _is_unchanged(self, weight):
        return (
            weight._version == self._version
            and weight.data_ptr() == self._place
            and weight.stride() == self._strides
        )

    def _fits(self, input, weight):
        if weight is not self._packed or _is_compiling():  # a graph is to run elsewhere too
            return False
        if weight.requires_grad:
            self._weight = None  # for good
            self._forget()
            return False
        return (
            weight._version == self._version
            and weight.data_ptr() == self._place
            and weight.stride() == self._strides
            and input.dtype is weight.dtype
            and not (_is_grad_enabled() and input.requires_grad)
            and not _any_autocast()
        )

    def data_for(self, input, weight):
        """The packed weight for a call outside of autograd; None where `weight` has changed or the call is another kind."""
        return self._data if self._fits(input, weight) else None


def instead(*args) -> None:
    """In place of torch's op, where another way was faster: whoever called an op with a packed weight does the call without it."""


def unfit(packed):
    """Why a tensor is no packed weight, or None."""
    return (
        None if packed.dim() == 1 and packed.dtype is torch.uint8 and packed.is_contiguous() else "not packed"
    )
