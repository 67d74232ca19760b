"""Modules run as parts of a fused op: when they may be, and what stands in their place."""

from __future__ import annotations

from torch.nn import GELU, Identity, Module


def runs_alone(module: object, kind: type[Module]) -> bool:
    """Whether `module` is of this very class, with nothing that a call of it would run beside its forward.

    A subclass (and so a parametrized module), a forward set on the instance, or a hook asks for the call.
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
    )


def is_plain_gelu(module: object) -> bool:
    """Whether `module` is GELU itself and not its approximation by tanh."""
    return runs_alone(module, GELU) and module.approximate == "none"


class Fused(Identity):
    """Stands in a Sequential where an activation or a pooling stood that the layer before it now does.

    It keeps the module, outside of the model's tree, for :func:`fastnn.revert` to put back.
    """

    def __init__(self, replaced: Module) -> None:
        super().__init__()
        self.training = replaced.training
        self._replaced = (replaced,)

    @property
    def replaced(self) -> Module:
        self._replaced[0].train(self.training)
        return self._replaced[0]

    def extra_repr(self) -> str:
        return repr(self._replaced[0])
