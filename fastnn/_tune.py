"""``fastnn.tune``: measure on this GPU which candidate takes each call of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fastnn.ops import _choice, _declare

__all__ = ["Tuned", "Tuning", "tune"]

#: Rounds in which the candidates take turns, after one to warm up.
ROUNDS = 10


class Tuned(NamedTuple):
    """The candidates of one class of calls."""

    op: str
    calls: str  # the class
    seconds: dict[str, float]  # the median of each candidate that ran and agreed with torch's
    chosen: str


class Tuning:
    """What was measured, printed as a table.

    Attributes
    ----------
    rows : list of Tuned
    """

    def __init__(self, rows: list[Tuned]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Tuned]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            times = ", ".join(f"{name} {seconds * 1e6:.1f} us" for name, seconds in row.seconds.items())
            lines.append(f"{row.op} ({row.calls}): {row.chosen} of {times}")
        return "\n".join([*lines, f"stored in {_choice.path()}"])

    __repr__ = __str__


def tune(model: Callable, *inputs: Any, **kwargs: Any) -> Tuning:
    """Run a model once on a GPU, measure every candidate for each of its calls, and keep the fastest for calls like them.

    The candidates of an op are torch's own and fastnn's kernels. The choices are kept as readable JSON in the user's cache
    folder, and hold for this user, this kind of GPU and these versions of fastnn and torch from then on. Where gradients are
    enabled and the output requires them, the backward pass is measured as well; the parameters' gradients are as before.

    Parameters
    ----------
    model : torch.nn.Module or callable
        What to run, in the mode it is in, training or evaluation.
    *inputs, **kwargs
        What to call it with, on the GPU.

    Returns
    -------
    Tuning
        A row per class of calls; prints as a table.

    Raises
    ------
    RuntimeError
        If no call of the model ran on a GPU.
    OSError
        If the choices cannot be stored.
    """
    calls = _record(model, inputs, kwargs)
    rows, choices = [], {}
    for (name, of), (op, args) in calls.items():
        seconds = _measure(op, args)
        best = min(seconds, key=seconds.get)
        rows.append(Tuned(name, of, seconds, best))
        choices.setdefault(args[0].get_device(), {}).setdefault(name, {})[of] = best
    if not rows:
        raise RuntimeError(
            "fastnn.tune found no call to measure: it measures ops with kernels for GPUs, of models and inputs that are on one"
        )
    for index, made in choices.items():
        _choice.store(index, made)
    return Tuning(rows)


def _is_on_gpu(t) -> bool:
    return isinstance(t, torch.Tensor) and t.is_cuda


def _record(model, inputs, kwargs) -> dict:
    """The first call of each op and class, on the kernels wherever they cover it, so that their backward ops are seen."""
    calls = {}

    def seen(op, args, reason):
        if reason is None and _is_on_gpu(args[0]):
            kept = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
            calls.setdefault((op.name, _choice.call_class(args)), (op, kept))

    before = _declare.recorder, _declare.prefer_kernels
    _declare.recorder, _declare.prefer_kernels = seen, True
    try:
        output = model(*inputs, **kwargs)
        wanted = [t for t in _tensors(output) if t.requires_grad]
        leaves = [t for t in _tensors((inputs, kwargs)) if t.requires_grad and t.is_leaf]
        if isinstance(model, torch.nn.Module):
            leaves += [p for p in model.parameters() if p.requires_grad]
        if wanted and leaves:
            torch.autograd.grad(wanted, leaves, [torch.ones_like(t) for t in wanted], allow_unused=True)
    finally:
        _declare.recorder, _declare.prefer_kernels = before
    return calls


def _tensors(value) -> Iterator[torch.Tensor]:
    return (t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor))


def _measure(op: _declare.Op, args: tuple) -> dict[str, float]:
    """Median seconds of torch's op, and of each kernel that runs and agrees with it."""
    with torch.no_grad():
        want = op.oracle(*args)
        candidates = {_choice.TORCH: op.stock}
        for name, function in op.candidates.items():
            try:
                agrees = _agree(function(*args), want)
            except Exception:  # such as shared memory that this GPU has not: one candidate less
                agrees = False
            if agrees:
                candidates[name] = function
        times = {name: [] for name in candidates}
        names = list(candidates)
        for round_ in range(ROUNDS + 1):
            for i in range(len(names)):
                name = names[(i + round_) % len(names)]
                elapsed = _seconds(candidates[name], args)
                if round_ > 0:
                    times[name].append(elapsed)
    return {name: sorted(measured)[ROUNDS // 2] for name, measured in times.items()}


def _agree(ours, want) -> bool:
    """Whether all that is a number is about the same: places and what only backward reads need not be alike."""
    ours, want = (made if isinstance(made, tuple) else (made,) for made in (ours, want))
    for mine, theirs in zip(ours, want, strict=False):
        if theirs is None or theirs.numel() == 0 or not theirs.is_floating_point():
            continue
        # To tell a kernel that is broken on this GPU, no more: tf32 and the order of sums may differ.
        scale = theirs.abs().max().clamp(min=1e-6)
        if mine.shape != theirs.shape or not bool((mine - theirs).abs().max() / scale < 2e-2):
            return False
    return True


def _seconds(function: Callable, args: tuple) -> float:
    """Seconds of a call on the device, of several in a row where one is short."""
    calls = 5
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function(*args)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls / 1e3
