"""An op's gradient as a function of autograd, without the dispatcher's help and with it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastnn.ops.core.op import Op


def as_function(op: Op, run: Callable) -> type[torch.autograd.Function]:
    """The op and its gradient as an autograd.Function: half the cost of the dispatcher's Python autograd on a small call.

    It is applied to the op's arguments and the numbers of the plan, and calls ``run(args, numbers)``.
    """

    def forward(ctx, *args_and_numbers):
        args, numbers = args_and_numbers[:-1], args_and_numbers[-1]
        ctx.set_materialize_grads(False)
        out = run(args, numbers)
        if isinstance(out, tuple):
            ctx.mark_non_differentiable(
                *(t for t in out if not t.is_floating_point())
            )  # keep() may mark others
        op.keep(ctx, args, out)
        return out

    def backward(ctx, *grads):
        return *op.backward(ctx, *grads), None

    name = "".join(part.capitalize() for part in op.name.split("_"))
    return type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )


def register(op: Op) -> None:
    """The same gradient for whoever calls ``torch.ops.fastnn.<name>`` itself."""

    def keep(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        op.keep(ctx, inputs, output)

    torch.library.register_autograd(f"fastnn::{op.name}", op.backward, setup_context=keep)


def no_gradient(name: str) -> Callable:
    """The backward of an op that has none."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"fastnn::{name} has no gradient of its own, so the op that it is the backward of cannot be differentiated "
            f"twice; set FASTNN_DISABLE=1 to use torch's op, where torch has a second derivative"
        )

    return backward
