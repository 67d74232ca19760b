"""The container whose layers run together where one op does what several of them do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules import module as _torch_module

from fastnn.nn._layer import FUSIONS, Fusion, Layer, declare_layer, is_plain, is_traced

__all__ = ["Sequential"]

_has_global_hooks = _torch_module._has_any_global_hook

# What a process-wide forward hook gets in place of the output of a layer that ran as part of the layer before it.
FUSED = object()


def sees_fused(hook):
    """Marks a process-wide hook for which layers run together as without it; each gets its calls all the same.

    Those of the layers that the first one does come after the first one's, with :data:`FUSED` as output.
    """
    hook.sees_fused = True
    return hook


def may_fuse() -> bool:
    """Whether no process-wide hook wants each layer run for itself."""
    return not _has_global_hooks() or all(getattr(hook, "sees_fused", False) for hook in _global_hooks())


def _global_hooks():
    return (
        *_torch_module._global_forward_pre_hooks.values(),
        *_torch_module._global_forward_hooks.values(),
        *_torch_module._global_backward_pre_hooks.values(),
        *_torch_module._global_backward_hooks.values(),
    )


def fusion_at(layers: list, position: int) -> tuple[Fusion, list] | None:
    """What the layer at a position does in one op with those after it, and these; None where it runs alone."""
    layer, end = layers[position], len(layers)
    by_next = FUSIONS.get(type(layer))
    if by_next is None or position + 1 == end:
        return None
    fusions = by_next.get(type(layers[position + 1]))
    if fusions is None or not is_plain(layer) or not is_plain(layers[position + 1]):
        return None
    for fusion in fusions:
        after = fusion.after
        followers = layers[position + 1 : position + 1 + len(after)]
        if len(after) == 1:
            if fusion.fits(*followers):
                return fusion, followers
        elif (
            [type(follower) for follower in followers] == list(after)
            and all([is_plain(follower) for follower in followers[1:]])
            and fusion.fits(*followers)
        ):
            return fusion, followers
    return None


def groups(sequential: torch.nn.Sequential) -> list[list[str]]:
    """The names of the layers of a Sequential, those that run together in one list."""
    names, layers = list(sequential._modules), list(sequential._modules.values())
    found, position = [], 0
    while position < len(layers):
        fused = fusion_at(layers, position) if isinstance(sequential, Sequential) else None
        count = 1 if fused is None else 1 + len(fused[1])
        found.append(names[position : position + count])
        position += count
    return found


def _run(fusion: Fusion, followers, layer, input):
    return fusion.run(layer, input, *followers)


def _run_seen(fusion: Fusion, followers, layer, input):
    """A fused call of which the process-wide hooks are told as of calls of the layers."""
    before = tuple(_torch_module._global_forward_pre_hooks.values())
    after = tuple(_torch_module._global_forward_hooks.values())
    output = None
    for hook in before:
        hook(layer, (input,))
    try:
        output = fusion.run(layer, input, *followers)
    finally:
        for hook in after:
            hook(layer, (input,), output)
    for follower in followers:
        for hook in before:
            hook(follower, (output,))
        for hook in after:
            hook(follower, (output,), FUSED)
    return output


@declare_layer(torch.nn.Sequential, inherited=True)
class Sequential(Layer, torch.nn.Sequential):
    """:class:`torch.nn.Sequential` that runs layers together where one op of fastnn does what several of them do.

    A Conv2d or a Linear and the activation right after it (ReLU, GELU, SiLU, ReLU6, Hardswish, Sigmoid, Tanh) are one op, and so
    are a Conv2d, the ReLU and the MaxPool2d after it. That is looked for at each call, and the layers stay what they are: they may be
    replaced, changed, moved and given hooks at any time. A layer runs by itself if its class is a subclass (and so if it is parametrized), if it has a
    hook, a forward of its own or is compiled by itself, or if process-wide module hooks are set.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "__iter__" in vars(cls) and "forward" not in vars(cls):
            cls.forward = torch.nn.Sequential.forward  # which goes by it

    def forward(self, input):
        """Pass the input through the layers in turn; see :meth:`torch.nn.Sequential.forward`."""
        layers = list(self._modules.values())
        run = _run
        if _has_global_hooks():
            run = _run_seen if may_fuse() else None
        if type(input) is not Tensor and is_traced(input):
            run = None
        fused = 0
        for position, layer in enumerate(layers):
            if fused:
                fused -= 1
            elif type(layer) in FUSIONS and run is not None and (found := fusion_at(layers, position)):
                input = run(*found, layer, input)
                fused = len(found[1])
            else:
                input = layer(input)
        return input
