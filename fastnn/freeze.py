"""Making a copy of a model for inference, whose weights are packed beforehand."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch.nn import Module

from fastnn.convert import convert
from fastnn.nn._layer import drop_packs, make_packs

__all__ = ["freeze"]

M = TypeVar("M", bound=Module)


def freeze(model: M, /, *example_inputs, **example_keywords) -> M:
    """Copy a model for inference on the CPU, with weights in the order in which the kernels read them.

    The copy is in evaluation mode, its parameters want no gradients, and its layers are converted as by
    :func:`fastnn.convert`. Linear layers, the projections of :class:`fastnn.nn.MultiheadAttention`, and convolutions of 24
    channels or more each way hold their weight in packed form beside the weight itself, so that calls need not pack
    it. That takes as much memory again, for float16 twice as much.

    A packed form is read in inference only: not where a gradient is wanted, nor under autocast, nor in a graph of
    ``torch.compile``, ``torch.export`` or ``torch.jit.trace``; by linear layers from 5 rows on, by convolutions for channels_last
    images. A weight that has changed since is read itself: one that was replaced, or written by ``load_state_dict``
    or an op in place. Not seen is what writes past autograd's count of such ops: through ``.data``, a numpy array or
    DLPack, in another process, and by optimizers with ``fused=True``, unless the weight is seen to want a gradient: a layer that
    is set to training, or called while its weight requires a gradient, reads no packed form from then on. Freeze the model
    again after a change. A copy that is moved or cast (``to``, ``bfloat16``) packs its weights anew.

    Parameters
    ----------
    model : torch.nn.Module
        Is not changed.
    *example_inputs, **example_keywords
        The arguments of a call. If there are any, the copy is called with them once, and keeps only those packed forms that
        the call read.

    Returns
    -------
    torch.nn.Module
        The copy. Its own copies and its pickles pack their weights anew, for the processor on which they are made; not under
        ``torch.inference_mode``, whose new tensors count no ops in place.

    See Also
    --------
    fastnn.explain : shows which layers read a packed weight.
    """
    with torch.inference_mode(False), torch.no_grad():
        frozen = convert(copy.deepcopy(model)).eval().requires_grad_(False)
        make_packs(frozen)
        if example_inputs or example_keywords:
            frozen(*example_inputs, **example_keywords)
            for module in frozen.modules():
                drop_packs(module, lambda packed: not packed.used)
    return frozen
