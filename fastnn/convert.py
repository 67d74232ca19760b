"""Swapping the layers of an existing model for fastnn's, and back."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.nn import Module, Sequential

from fastnn import nn
from fastnn.nn._fusing import Fused, is_plain_gelu, runs_alone

__all__ = ["convert", "revert"]

M = TypeVar("M", bound=Module)

# The layers that torch has too, by torch's class. Each holds the state that torch's holds.
_OURS = {getattr(torch.nn, name): getattr(nn, name) for name in nn.ACCELERATED if hasattr(torch.nn, name)}
_UNFUSED = {
    nn.LinearReLU: nn.Linear,
    nn.LinearGELU: nn.Linear,
    nn.ConvReLU2d: nn.Conv2d,
    nn.ConvReLUMaxPool2d: nn.Conv2d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


def convert(model: M) -> M:
    """Swap the layers of a model for fastnn's, in place.

    A layer changes its class and nothing else: parameters, buffers, names, hooks and ``state_dict`` stay. In a
    :class:`torch.nn.Sequential`, a Conv2d and the ReLU right after it become one op, with the MaxPool2d after
    them too, and so do a Linear and the ReLU or GELU after it; an :class:`torch.nn.Identity` takes the place of what was
    fused into the layer before. A layer stays as it is if its class is a subclass of torch's (and so if it is
    parametrized) or its forward was replaced. Fusing also needs modules without hooks, and a layer that the model
    holds in one place only, for elsewhere its result might be read before the activation. A model that itself reads what
    passes between the modules of a Sequential finds the fused result there.

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
    """
    for module in model.modules():
        ours = _OURS.get(type(module))
        if ours is not None and "forward" not in module.__dict__:
            module.__class__ = ours
    places: dict[Module, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            if child is not None:
                places[child] = places.get(child, 0) + 1
    for module in model.modules():
        if _is_sequential(module):
            _fuse(module, places)
    return model


def revert(model: M) -> M:
    """Swap fastnn's layers for torch's, in place: what :func:`convert` did is undone.

    Layers that were made from ``fastnn.nn`` become torch's too, where torch has the same layer; a ConvReLU2d, say, that
    stood in the model before :func:`convert` stays.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The same object.
    """
    for module in model.modules():
        if _is_sequential(module):
            _unfuse(module)
    for module in model.modules():
        torchs = _TORCHS.get(type(module))
        if torchs is not None:
            module.__class__ = torchs
    return model


def _is_sequential(module: Module) -> bool:
    return isinstance(module, Sequential) and type(module).forward is Sequential.forward


def _fuse(sequential: Sequential, places: dict[Module, int]) -> None:
    names = list(sequential._modules)
    for position in range(len(names)):
        layer, *after = (sequential._modules[n] for n in names[position : position + 3])
        if not after or places.get(layer) != 1:
            continue
        relu, gelu = runs_alone(after[0], torch.nn.ReLU), is_plain_gelu(after[0])
        if (relu or gelu) and runs_alone(layer, nn.Linear):
            layer.__class__ = nn.LinearReLU if relu else nn.LinearGELU
            fused = 1
        elif relu and runs_alone(layer, nn.Conv2d):
            if len(after) == 2 and runs_alone(after[1], nn.MaxPool2d) and _is_plain_pool(after[1]):
                layer.__class__ = nn.ConvReLUMaxPool2d
                layer.pool_kernel_size = after[1].kernel_size
                layer.pool_stride = after[1].stride
                layer.pool_padding = after[1].padding
                fused = 2
            else:
                layer.__class__ = nn.ConvReLU2d
                fused = 1
        else:
            continue
        for n, module in zip(names[position + 1 : position + 1 + fused], after, strict=False):
            sequential._modules[n] = Fused(module)


def _is_plain_pool(pool: torch.nn.MaxPool2d) -> bool:
    return pool.dilation in (1, (1, 1)) and not pool.return_indices and not pool.ceil_mode


def _unfuse(sequential: Sequential) -> None:
    fused = None
    for name, module in list(sequential._modules.items()):
        if not isinstance(module, Fused):
            fused = module if type(module) in _UNFUSED else None
        elif fused is not None:
            sequential._modules[name] = module.replaced
            fused.__class__ = _UNFUSED.get(type(fused), type(fused))
            for attribute in ("pool_kernel_size", "pool_stride", "pool_padding"):
                fused.__dict__.pop(attribute, None)
