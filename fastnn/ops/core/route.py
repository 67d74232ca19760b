"""The way of a call from a public function to a kernel or to torch's op, by its plan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from fastnn import _library, _settings
from fastnn.ops.core import autocast, autograd, on_gpus, watch
from fastnn.ops.core.autocast import any_autocast
from fastnn.ops.core.op import Op
from fastnn.ops.core.options import PackedOptions
from fastnn.ops.core.plan import REAL, Plan, fastest, in_transform, plan, torchs, why_constant

_compiler = torch.compiler  # its is_compiling() is these two, but takes 40 ns more
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_tracing_state = torch._C._get_tracing_state
_watching_modes = torch._C._len_torch_dispatch_stack

# Kinds of calls whose plans an op remembers; with more, it begins anew.
_MOST_PLANS = 4096

_remembered: list[dict] = []


def forget_plans() -> None:
    """Have every plan made anew: the choices, or the instruction set, are others."""
    for plans in _remembered:
        plans.clear()


_library.on_set_isa.append(forget_plans)


def hand_over(op: Op, args: tuple, reason: str) -> None:
    """Notes that a public function gives torch a call, with the op's arguments, before the op's route sees it."""
    if not (_is_dynamo_compiling() or _compiler._is_compiling_flag):
        watch.record(op, args, torchs(reason))


def _packed_options_of(op: Op) -> PackedOptions | None:
    """For the overload that takes the options as a few numbers, where the op has one."""
    if "packed" not in op.packet.overloads():
        return None
    return PackedOptions([str(a.type) == "Optional[int]" for a in op.schema.arguments[op.tensors :]])


def _kernel_of(op: Op) -> Callable:
    """The kernel alone, by the overload that takes the options packed where there is one and they fit."""
    count, kernel, options = op.tensors, op.packet.raw._op, _packed_options_of(op)
    if options is None:
        return kernel
    packed = op.packet.packed._op

    def run(*args):
        if args[0].is_cpu and not _watching_modes():
            numbers = options[args[count:]]
            if numbers is not None:
                return packed(*args[:count], *numbers)
        return kernel(*args)

    return run


def _kind_of(op: Op) -> Callable:
    """From the arguments of an eager call, and whether it wants gradients, to all that its plan on the CPU depends on."""
    count = op.tensors
    if len(op.required) != 2:

        def kind(args, wants):
            given = [args[i] for i in op.required]
            return given[0].dtype, args[count:], wants, *[(t.shape, t.stride()) for t in given]

    elif op.by_layout:

        def kind(args, wants):
            a, b = args[0], args[1]
            wants = wants and (a.requires_grad or b.requires_grad)
            return a.shape, b.shape, a.dtype, a.stride(), b.stride(), args[count:], wants

    else:

        def kind(args, wants):
            a, b = args[0], args[1]
            wants = wants and (a.requires_grad or b.requires_grad)
            return a.shape, b.shape, a.dtype, args[count:], wants

    return kind


def route_of(op: Op) -> Callable:
    """The function that has a call of an op done by whom its plan names."""
    count, stock, run = op.tensors, op.stock, _kernel_of(op)
    function, casts, constants = autograd.as_function(op, run), op.autocast, op.constant
    chooses, kind = op.slower is not None, _kind_of(op)
    plans: dict[tuple, Plan] = {}
    _remembered.append(plans)

    def route(*args):
        if (
            _tracing_state() is not None
            or _is_dynamo_compiling()
            or _compiler._is_compiling_flag
            or watch.watched
            or _settings.log
            or _settings.disabled
            or in_transform() is not None
            or forward_ad._current_level >= 0
            or (casts and any_autocast())
        ):
            return otherwise(args)
        wants, enabled = False, _is_grad_enabled()
        for t in args[:count]:
            if t is not None:
                if type(t) not in REAL:
                    return carefully(args)
                if enabled and t.requires_grad:
                    wants = True
        if args[0] is None or not args[0].is_cpu:
            return carefully(args)
        if chooses and not watch.prefer_kernels:
            try:
                key = kind(args, wants)
                known = plans.get(key) or remember(key, fastest(op, args))
            except Exception:
                known = None  # the rules make no sense of the arguments: the op will refuse them
            if known is not None and known.algorithm is None:
                return stock(*args)
        try:
            if not wants:
                return run(*args)
            if not constants or why_constant(op, args) is None:
                return function.apply(*args)
        except Exception:
            # The op refuses what it does not cover: that is torch's, to do or to refuse in its own words.
            if plan(op, args).algorithm is not None:
                raise
        return stock(*args)

    def remember(key, known):
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plans[key] = known
        return known

    def otherwise(args):
        if _tracing_state() is not None:
            # torch.jit.trace takes no autograd.Function, and has to find the same ops without gradients.
            return stock(*args)
        if _is_dynamo_compiling() or _compiler._is_compiling_flag:
            # The tracer sees one op; gradients are the dispatcher's. The cast is here, for the plan is about what it gives.
            cast = autocast.as_called(op, args)
            return stock(*args) if plan(op, cast).algorithm is None else op.packet.default(*cast)
        return carefully(args)

    def carefully(args):
        original = args
        if in_transform() is None and forward_ad._current_level < 0:
            args = autocast.as_called(op, args)
        made = plan(op, args)
        watch.record(op, args, made)
        if made.algorithm is None:
            return stock(*original)
        call = run
        if _is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:count]):
            call = function.apply
        if args[0].is_cpu or len(op.candidates) < 2:
            return call(*args)
        with on_gpus.planned(op.name, made.algorithm):
            return call(*args)

    route.__name__ = route.__qualname__ = op.name
    route.op = op
    return route
