"""Making a copy of a model for inference, whose weights are packed beforehand."""

from __future__ import annotations

import copy
import os
import warnings
from typing import TypeVar, overload

import torch
from torch.nn import Module

from fastnn.convert import convert
from fastnn.nn._layer import drop_packs, make_packs

__all__ = ["freeze", "load"]

M = TypeVar("M", bound=Module)


@overload
def freeze(model: M, /) -> M: ...
@overload
def freeze(model: Module, /, *example_inputs, **example_keywords) -> Module: ...
def freeze(model: Module, /, *example_inputs, **example_keywords) -> Module:
    """Make a model for inference, with weights in the order in which the kernels read them.

    With the arguments of a call the whole model is captured as a graph (:func:`torch.export.export`): batch norms become part of the
    convolutions before them, and residuals, activations and poolings part of the products; convolutions run on channels_last images;
    each product takes the algorithm that is fastest here, which is measured. Calls of other sizes are captured when they first
    come. A model that cannot be captured is frozen layer by layer, with a warning that says why.

    Without arguments it is frozen layer by layer: a copy whose layers are converted as by :func:`fastnn.convert`. Linear layers, the
    projections of :class:`fastnn.nn.MultiheadAttention`, and convolutions of 24 channels or more each way hold their weight in
    packed form beside the weight itself, so that calls need not pack it. That takes as much memory again, for float16 twice as much.

    Parameters
    ----------
    model : torch.nn.Module
        Is not changed.
    *example_inputs, **example_keywords
        The arguments of a call.

    Returns
    -------
    torch.nn.Module
        In evaluation mode. With arguments a :class:`fastnn.graph.frozen.FrozenModel`, which takes and gives what the model does, without
        gradients. Without, a copy of the model, whose own copies and pickles pack their weights anew, for the processor on
        which they are made; not under ``torch.inference_mode``, whose new tensors count no ops in place.

    See Also
    --------
    fastnn.explain : shows what runs, and which layers read a packed weight.

    Notes
    -----
    In a copy that was frozen layer by layer a packed form is read in inference only: not where a gradient is wanted, nor under
    autocast, nor in a graph of ``torch.compile``, ``torch.export`` or ``torch.jit.trace``; by linear layers from 5 rows on, by
    convolutions for channels_last images. A weight that has changed since is read itself: one that was replaced, or written by
    ``load_state_dict`` or an op in place. Not seen is what writes past autograd's count of such ops: through ``.data``, a numpy
    array or DLPack, in another process, and by optimizers with ``fused=True``, unless the weight is seen to want a gradient: a
    layer that is set to training, or called while its weight requires a gradient, reads no packed form from then on. Freeze the
    model again after a change. A copy that is moved or cast (``to``, ``bfloat16``) packs its weights anew.
    """
    if example_inputs or example_keywords:
        from fastnn.graph.capture import CannotCapture  # torch.export takes a second to import
        from fastnn.graph.frozen import FrozenModel

        try:
            with torch.inference_mode(False):
                return FrozenModel(model, example_inputs, example_keywords)
        except CannotCapture as error:
            warnings.warn(f"fastnn.freeze: the model is frozen layer by layer, since {error}", stacklevel=2)
    return freeze_layers(model, *example_inputs, **example_keywords)


def load(path: str | os.PathLike) -> Module:
    """Load a model that :func:`freeze` captured and its ``save`` wrote, without the code that it was made of.

    Parameters
    ----------
    path : str or path
        Of a file in the safetensors format, which holds weights and graphs of named ops: nothing of it is run as code.

    Returns
    -------
    torch.nn.Module
        A :class:`fastnn.graph.frozen.FrozenModel`, which takes the kinds of calls that were captured when it was saved.

    Raises
    ------
    ValueError
        If the file is cut off, was altered, is of another version, or names what is none of torch's and fastnn's ops. A
        call of another kind raises it too.
    OSError
        If there is no such file.
    """
    from fastnn.graph.frozen import FrozenModel

    return FrozenModel.load(path)


def freeze_layers(model: M, /, *example_inputs, **example_keywords) -> M:
    """A copy frozen layer by layer; called with arguments once, it keeps the packed forms alone that the call read."""
    with torch.inference_mode(False), torch.no_grad():
        frozen = convert(copy.deepcopy(model)).eval().requires_grad_(False)
        make_packs(frozen)
        if example_inputs or example_keywords:
            frozen(*example_inputs, **example_keywords)
            for module in frozen.modules():
                drop_packs(module, lambda packed: not packed.used)
    return frozen
