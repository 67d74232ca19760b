"""One declaration per op, and everything that follows from it.

A family's file states, once per op: what it must equal (its stock form), what the native kernels cover, the shape of the
result, what backward keeps and computes, and how much work it is. :func:`declare` derives the rest: the routed
function, gradients, autocast, the tracing rules of ``torch.compile`` and ``torch.export``, FLOP counting, and the row
that :func:`fastnn.explain` shows. The schema itself stands beside the C++ implementation, so that the library also
works in a process without Python.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.utils.flop_counter

from fastnn.ops.core import autocast as _autocast
from fastnn.ops.core import autograd, gpu
from fastnn.ops.core import on_gpus as _on_gpus
from fastnn.ops.core.algorithms import Algorithms
from fastnn.ops.core.op import OPS, ROUTES, Op
from fastnn.ops.core.route import route_of


def declare(
    name: str,
    *,
    stock: Callable,
    unsupported: Callable,
    fake: Callable,
    cost: Callable,
    keep: Callable | None = None,
    backward: Callable | None = None,
    autocast: bool = False,
    own_dtype: tuple[str, ...] = (),
    constant: tuple[str, ...] = (),
    algorithms: Algorithms | None = None,
    otherwise: Callable | None = None,
    by_layout: bool = False,
    on_cpu: bool = True,
    on_gpus: str | None = None,
    candidates: dict[str, Callable] | None = None,
    covers: dict[str, Callable] | None = None,
    unsupported_on_gpus: Callable | None = None,
    oracle: Callable | None = None,
) -> Callable:
    """Declare the op ``fastnn::<name>`` and return the function that routes a call to it or to torch.

    Every callable takes the op's arguments in the order of its schema.

    Parameters
    ----------
    name
        Name of an op that the library defines.
    stock
        The same result from torch's own ops: the oracle of the tests, the rival of the benchmarks, and where a call
        goes that no kernel covers. It also raises torch's own error for arguments that torch refuses.
    unsupported
        None if the native kernels take these arguments, else the reason why not, in a few words. It is asked only about
        plain strided tensors of one floating dtype on a device with kernels. The op itself must refuse all that this
        does: an eager call asks only where the op raised.
    fake
        The result's shape, dtype and strides, as empty tensors.
    cost
        A :class:`Cost`.
    keep
        ``keep(ctx, inputs, output)`` saves what backward needs.
    backward
        ``backward(ctx, *grads)`` returns a gradient, or None, per argument. A grad is None where nothing flows back.
    autocast
        Whether autocast lowers the op's inputs to its dtype.
    own_dtype
        Names of tensor arguments whose dtype is not that of the first one, such as indices; the op checks it.
    constant
        Names of tensor arguments for which backward gives no gradient; a call that wants one is torch's.
    algorithms
        The algorithms of its kernel on the CPU, where there are several, or torch's op is faster for some calls. Without
        it, or where no rule is known, the kernels take what they cover, and the library chooses among them.
    otherwise
        Does the calls that the kernels do not, where that is not `stock`.
    by_layout
        Whether who is fastest depends on the strides too, of an op of two tensors and a bias.
    on_cpu
        Whether there are kernels for the CPU.
    on_gpus
        "cuda" or "triton": what its kernels for GPUs are written in, if there are any.
    candidates
        The same result from those kernels, by their names, for tensors on a GPU that `unsupported` and
        `unsupported_on_gpus` have nothing against. Without it, the library itself has the one that there is.
    covers
        By the name of a candidate that does not take all of those, but the first, whether it takes a call.
    unsupported_on_gpus
        As `unsupported`, of the kernels for GPUs alone.
    oracle
        The kernels' numbers from torch's ops, where `stock` gives others, since it draws its own random ones.
    """
    packet = getattr(torch.ops.fastnn, name)
    arguments = packet.default._schema.arguments
    tensors = [i for i, a in enumerate(arguments) if "Tensor" in str(a.type)]
    assert tensors == list(range(len(tensors))), f"the tensors of {name} do not come first"

    def places(names):
        return tuple(i for i in tensors if arguments[i].name in names)

    op = OPS[name] = Op(
        name=name,
        packet=packet,
        stock=stock,
        unsupported=unsupported,
        fake=fake,
        cost=cost,
        keep=keep or (lambda ctx, inputs, output: None),
        backward=backward or autograd.no_gradient(name),
        autocast=autocast,
        algorithms=algorithms,
        otherwise=otherwise or stock,
        by_layout=by_layout,
        on_cpu=on_cpu,
        on_gpus=on_gpus,
        candidates=candidates or ({"kernel": packet.raw} if on_gpus else {}),
        covers=covers or {},
        unsupported_on_gpus=unsupported_on_gpus,
        oracle=oracle or stock,
        tensors=len(tensors),
        required=tuple(i for i in tensors if "Optional" not in str(arguments[i].type)),
        own_dtype=places(own_dtype),
        constant=tuple((i, arguments[i].name) for i in places(constant)),
    )
    _register_fake(op)
    autograd.register(op)
    if autocast:
        _autocast.register(op)
    if candidates and (on_gpus == "triton" or gpu.architectures()):
        _on_gpus.register(op)
    torch.utils.flop_counter.register_flop_formula(packet, get_raw=True)(
        lambda *args, out_val=None, **kwargs: int(cost(*args[: len(arguments)]).flops)
    )
    route = ROUTES[name] = route_of(op)
    return route


def _register_fake(op: Op) -> None:
    def fake_on_one_device(*args):
        # The dispatcher comes here too with some tensors on the meta device and others not, whatever the op's kernels check.
        devices = [t.device for t in args[: op.tensors] if t is not None]
        if any([device != devices[0] for device in devices]):
            found = " and ".join(sorted({str(device) for device in devices}))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {found}!"
            )
        return op.fake(*args[: len(op.schema.arguments)])  # without algorithms, which `raw` takes

    for overload in ("", ".raw"):
        torch.library.register_fake(f"fastnn::{op.name}{overload}", fake_on_one_device)
