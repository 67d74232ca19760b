"""Swapping the layers of an existing model for fastnn's, and back."""

from __future__ import annotations

from typing import TypeVar

from torch.nn import Module

from fastnn.nn._layer import class_of_ours, class_of_torchs, drop_packs

__all__ = ["convert", "revert"]

M = TypeVar("M", bound=Module)


def convert(model: M) -> M:
    """Swap the layers of a model for fastnn's, in place.

    A layer changes its class and nothing else: parameters, buffers, names, hooks, the order of layers and ``state_dict``
    stay, and so a converted model can be edited as before. A :class:`torch.nn.Sequential` becomes
    :class:`fastnn.nn.Sequential`, which looks at each call which of its layers run together in one op: a Conv2d and the
    ReLU right after it, with the MaxPool2d after them too, or a Linear and the ReLU or GELU after it. So does a subclass of
    Sequential that has no forward of its own, such as torchvision's blocks: its layers are then of a subclass of that class under
    the same name.

    A layer stays as it is if its class is a subclass of torch's (and so if it is parametrized), if its forward was
    replaced, or if ``torch.ao.quantization`` has marked it. Not to be called while another thread runs the model.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The same object.

    See Also
    --------
    revert : undoes it.

    Notes
    -----
    Tools that know layers by their exact class do not know fastnn's: ``torch.ao.quantization`` (``quantize_dynamic``,
    ``prepare``, ``fuse_modules``) and ``torch.fx.experimental.optimization.fuse`` leave them as they are. Where they ask a
    layer, a warning says so; ``fuse_modules`` raises. Graphs of ``torch.export`` hold fastnn's ops, which the
    quantizers of pt2e do not know. For all of these, quantize or fuse first and convert what is left, or call :func:`revert`
    before. ``torch.fx.symbolic_trace`` takes fastnn's layers for leaves, as it does torch's, and ``torch.jit.script`` compiles
    torch's in their place.
    """
    for module in model.modules():
        ours = class_of_ours(type(module))
        if ours is not None and "forward" not in module.__dict__ and module.__dict__.get("qconfig") is None:
            module.__class__ = ours
    return model


def revert(model: M) -> M:
    """Swap fastnn's layers for torch's, in place: what :func:`convert` did is undone.

    Layers that were made from ``fastnn.nn`` become torch's too, where torch has the same layer; a ConvReLU2d, say, stays. The
    packed weights of a model that :func:`fastnn.freeze` made are let go of, so that what is left is torch's alone.
    Not to be called while another thread runs the model.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The same object.
    """
    for module in model.modules():
        drop_packs(module)
        torchs = class_of_torchs(type(module))
        if torchs is not None:
            module.__class__ = torchs
    return model
