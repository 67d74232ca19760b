"""Autocast: the cast of an op's inputs, before it is planned and in the dispatcher."""

from __future__ import annotations

import torch

from fastnn.ops.core.library import LIBRARY
from fastnn.ops.core.op import Op

any_autocast = torch._C._is_any_autocast_enabled
_DEVICES = ("cpu", "cuda")


def as_called(op: Op, args: tuple) -> tuple:
    """The arguments as autocast has them."""
    if op.autocast and any_autocast() and isinstance(args[0], torch.Tensor):
        device = args[0].device.type
        if device in _DEVICES and torch.is_autocast_enabled(device):
            return _cast(args, device)
    return args


def dtype_of(tensor: torch.Tensor) -> torch.dtype | None:
    """What autocast casts to on a tensor's device; None where it is off there."""
    device = tensor.device.type
    on = device in _DEVICES and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def _cast(args: tuple, device: str) -> tuple:
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        a.to(dtype)
        if isinstance(a, torch.Tensor)
        and a.is_floating_point()
        and a.dtype is not torch.float64
        and a.device.type == device
        else a
        for a in args
    )


def register(op: Op) -> None:
    """The same cast for whoever calls ``torch.ops.fastnn.<name>`` itself."""
    for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args, device=device, exclude=exclude):
            with torch._C._ExcludeDispatchKeyGuard(exclude):
                return op.packet.default(*_cast(args, device))

        LIBRARY.impl(op.name, kernel, key)
