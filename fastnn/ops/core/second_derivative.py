"""Derivatives of backward ops by torch's own, for families whose kernels have no such thing."""

from __future__ import annotations

import torch


def differentiate(formula, tensors, needed, grads):
    """The gradients of what `formula` makes of some tensors, which can be differentiated again where gradients are on.

    Parameters
    ----------
    formula : callable
        ``formula(*tensors)`` gives a tuple of results by torch's ops, each of which has a derivative of its own.
    tensors : sequence of Tensor or None
        Its arguments.
    needed : sequence of bool
        Which of them get a gradient.
    grads : sequence of Tensor or None
        The gradients of the results; None where nothing flows back.

    Returns
    -------
    tuple of Tensor or None
        A gradient per tensor, None where none is needed.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one tensor may stand in several places.
        inputs = [
            t if t is None else t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_(need)
            for t, need in zip(tensors, needed, strict=True)
        ]
        pairs = [
            (result, grad.to(result.dtype))
            for result, grad in zip(formula(*inputs), grads, strict=True)
            if grad is not None
        ]
        places = [i for i, need in enumerate(needed) if need and inputs[i] is not None]
        found = [None] * len(inputs)
        if pairs and places:
            results, upstream = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(
                results, [inputs[i] for i in places], upstream, create_graph=again, allow_unused=True
            )
            for place, gradient in zip(places, gradients, strict=True):
                found[place] = gradient
    return tuple(found)
