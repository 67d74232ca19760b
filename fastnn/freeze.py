"""Making a copy of a model for inference, whose weights are packed beforehand."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from fastnn import nn
from fastnn.convert import convert
from fastnn.nn._multi_head_attention import Packed
from fastnn.ops import _conv_routes
from fastnn.ops.packed import PackedWeight

__all__ = ["freeze"]

M = TypeVar("M", bound=Module)

_LINEAR = (nn.Linear, nn.LinearReLU, nn.LinearGELU)
_CONV = (nn.Conv2d, nn.ConvReLU2d, nn.ConvReLUMaxPool2d)


def freeze(model: M, *example_inputs) -> M:
    """Copy a model for inference on the CPU, with weights in the order in which the kernels read them.

    The copy is in evaluation mode, its parameters want no gradients, and its layers are converted as by
    :func:`fastnn.convert`. Linear layers, the projections of :class:`fastnn.nn.MultiheadAttention`, and convolutions of 24
    channels or more each way hold their weight in packed form beside the weight itself, so that calls need not pack
    it. That takes as much memory again, for float16 twice as much.

    A packed form is read in inference only: not where a gradient is wanted, nor under autocast, nor in a graph of
    ``torch.compile`` or ``torch.export``; by linear layers from 5 rows on, by convolutions for channels_last images. A
    weight that has changed since (by ``load_state_dict``, an op in place, ``to``) is read itself, and so the result is
    always that of the weights; only what is written through ``.data`` goes unseen. Freeze the model again after a change.

    Parameters
    ----------
    model : torch.nn.Module
        Is not changed.
    *example_inputs
        The arguments of a call. If there are any, the copy is called with them once, and keeps only those packed forms that
        the call read.

    Returns
    -------
    torch.nn.Module
        The copy. Its own copies and its pickles pack their weights anew, for the processor on which they are made.

    See Also
    --------
    fastnn.explain : shows which layers read a packed weight.
    """
    with torch.inference_mode(False), torch.no_grad():
        frozen = convert(copy.deepcopy(model)).eval().requires_grad_(False)
        made: dict[Tensor, PackedWeight] = {}

        def pack(weight: Tensor | None, groups: int = 1) -> PackedWeight | None:
            if weight is None or not PackedWeight.can_hold(weight):
                return None
            if weight not in made:
                made[weight] = PackedWeight(weight, groups)
            return made[weight]

        for module in frozen.modules():
            if type(module) in _LINEAR:
                module._packed = pack(module.weight)
            elif type(module) in _CONV:
                if _conv_routes.can_be_packed(module.weight, module.groups):
                    module._packed = pack(module.weight, module.groups)
            elif type(module) is nn.MultiheadAttention:
                module._packed = Packed(pack(module.in_proj_weight), pack(module.out_proj.weight))
        if example_inputs:
            frozen(*example_inputs)
            for module in frozen.modules():
                if type(module) in (*_LINEAR, *_CONV):
                    module._packed = _if_used(module._packed)
                elif type(module) is nn.MultiheadAttention:
                    module._packed = Packed(*map(_if_used, module._packed))
    return frozen


def _if_used(packed: PackedWeight | None) -> PackedWeight | None:
    return packed if packed is not None and packed.used else None
