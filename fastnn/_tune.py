"""``fastnn.tune``: measure on this machine which candidate takes each call of a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from fastnn.ops.core import choices, cpu_choices, gpu, on_gpus, watch
from fastnn.ops.core.algorithms import covers_by
from fastnn.ops.core.op import ROUTES, Op
from fastnn.ops.core.plan import covers, cpu_class
from fastnn.ops.core.route import forget_plans

__all__ = ["Tuned", "Tuning", "tune"]

#: Rounds in which the candidates take turns, after one to warm up.
ROUNDS = 10

#: By how much a candidate may differ from torch's op: in norm, and in each element against the largest where these have 2 bytes. Two
#: right kernels that sum 8192 products of bfloat16 differ by 3% of the largest somewhere.
MOST_ERROR, MOST_ERROR_IN_ONE = 2e-2, 1e-1


class Tuned(NamedTuple):
    """The candidates of one class of calls."""

    op: str
    calls: str  # the class
    seconds: dict[
        str, float
    ]  # the median of each candidate that ran and agreed with torch's, which stands first
    chosen: str
    dropped: dict[str, str]  # the other candidates that cover such calls, and why each is none
    device: int  # a GPU's number, -1 for the CPU


class DeviceLost(RuntimeError):
    """A candidate left the GPU's context such that no call of this process can run there any more."""


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
            lines += [f"  dropped {name}: {reason}" for name, reason in row.dropped.items()]
        files = dict.fromkeys(cpu_choices.FILE.path() if r.device < 0 else choices.path() for r in self.rows)
        return "\n".join([*lines, *[f"stored in {file}" for file in files]])

    __repr__ = __str__


def tune(model: Callable, *inputs: Any, **kwargs: Any) -> Tuning:
    """Run a model once, measure every candidate for each of its calls, and keep the fastest for calls like them.

    The candidates of an op are torch's own and fastnn's kernels: on a GPU each kernel, on the CPU each algorithm that covers the
    call, for each gradient by itself. One that is less than 3% faster is no better: such ties are torch's. A kernel that fails, or
    disagrees with torch's op, is dropped. The choices are kept as readable JSON in the user's cache folder, and hold for this
    user, this kind of GPU or processor and these versions of fastnn and torch from then on. Where gradients are enabled and the
    output requires them, the backward pass is measured as well; the parameters' gradients are as before. ``torch.compile`` asks
    for choices while it traces, so tune the model before you compile it.

    Parameters
    ----------
    model : torch.nn.Module or callable
        What to run, in the mode it is in, training or evaluation.
    *inputs, **kwargs
        What to call it with.

    Returns
    -------
    Tuning
        A row per class of calls; prints as a table.

    Raises
    ------
    RuntimeError
        If the model makes no call that several candidates take, or if a kernel left the GPU useless to this process.
    OSError
        If the choices cannot be stored.
    """
    with choices.measuring({}):
        rows = measure(model, inputs, kwargs, trying=_untried, on_cpu=True)
    if not rows:
        raise RuntimeError(
            "fastnn.tune found no call to measure: it measures fastnn's ops, of converted models or of fastnn.nn.functional"
        )
    found: dict[int, dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row.device, {}).setdefault(row.op, {})[row.calls] = row.chosen
    for index, made in found.items():
        if index < 0:
            cpu_choices.store(made)
        else:
            choices.store(index, made)
    forget_plans()
    return Tuning(rows)


def _untried(op: str, calls: str, name: str) -> str | None:
    return "no GPU has run it yet" if name in gpu.UNTRIED else None


def _is_on_gpu(t) -> bool:
    return isinstance(t, torch.Tensor) and t.is_cuda


def _is_on_cpu(t) -> bool:
    return isinstance(t, torch.Tensor) and t.is_cpu


def measure(
    model: Callable,
    inputs: tuple,
    kwargs: dict,
    *,
    on_row: Callable[[Tuned], None] = lambda row: None,
    trying: Callable[[str, str, str], str | None] = lambda op, calls, name: None,
    on_cpu: bool = False,
) -> list[Tuned]:
    """Run a model on fastnn's kernels and measure the candidates of each class of calls that this process does not know yet.

    A call is measured before it is made, and is then made on its fastest kernel, so that one which fails does not keep the
    backward pass from being seen. The fastest kernels are in ``choices.known()`` from then on. ``on_row(row)`` is called
    after each class. ``trying(op, class, candidate)`` is called before each call of a candidate; what it returns before the first is
    a reason to drop it, or None. `on_cpu`: whether calls on the CPU are measured too.
    """
    rows: list[Tuned] = []
    known = choices.known()

    def seen(op, args, plan):
        if plan.algorithm is None:
            return
        if not _is_on_gpu(args[0]):
            if on_cpu and _is_on_cpu(args[0]) and _has_rivals(op):
                done = {(row.op, row.calls) for row in rows}
                with watch.watching(None, prefer_kernels=True):
                    made = list(_measure_on_cpu(op, args, done))
                for row in made:
                    rows.append(row)
                    on_row(row)
            return
        key = op.name, choices.gpu_class(args)
        if key in known or key in {(row.op, row.calls) for row in rows}:
            return
        kept = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        # A candidate may call other ops of fastnn.
        with watch.watching(None, prefer_kernels=True):
            seconds, dropped = _measure(op, kept, lambda name: trying(*key, name))
        kernel = choices.fastest_kernel(seconds)
        if kernel and choices.wants_gradients(args):
            known[key] = kernel
            seconds[choices.TORCH] = max(
                0.0, seconds[choices.TORCH] + _lost_in_backward(op, args, seconds, rows, seen)
            )
        rows.append(Tuned(*key, seconds, choices.fastest(seconds), dropped, args[0].get_device()))
        if kernel:
            known[key] = kernel
        on_row(rows[-1])

    with watch.watching(seen, prefer_kernels=True):
        output = model(*inputs, **kwargs)
        wanted = [t for t in _tensors(output) if t.requires_grad]
        leaves = [t for t in _tensors((inputs, kwargs)) if t.requires_grad and t.is_leaf]
        if isinstance(model, torch.nn.Module):
            leaves += [p for p in model.parameters() if p.requires_grad]
        if wanted and leaves:
            torch.autograd.grad(wanted, leaves, [torch.ones_like(t) for t in wanted], allow_unused=True)
    return rows


# ---- on the CPU ----

# A block of calls is timed as one, long enough that the clock's own cost does not count.
_BLOCK_SECONDS = 1e-3


def _measure_on_cpu(op: Op, args: tuple, done: set[tuple[str, str]]) -> Iterator[Tuned]:
    """The algorithms of each result of a call against torch's op, of classes that are not done."""
    results = op.algorithms.results
    for place, result in enumerate(results):
        part = args
        if len(results) > 1:
            *rest, of_input, of_weight, of_bias = args
            if not (of_input if place == 0 else of_weight or of_bias):
                continue
            part = (*rest, of_input, False, False) if place == 0 else (*rest, False, of_weight, of_bias)
        call = result.describe(*part)
        of = cpu_class(op, call, part)
        if (op.name, of) in done:
            continue
        done.add((op.name, of))
        kept = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in part)
        with torch.no_grad():
            mask, calls = result.covering(*kept), {choices.TORCH: partial(op.stock, *kept)}
            want, dropped = op.oracle(*kept), {}
            for number, name in enumerate(op.algorithms.names):
                # Those that are less exact are asked for by torch's switches alone.
                if number == 0 or name == "winograd" or not covers_by(mask, number):
                    continue
                candidate = partial(op.packet.raw, *kept, *(0,) * place, number)
                if reason := _disagreement(candidate(), want):
                    dropped[name] = reason
                else:
                    calls[name] = candidate
            seconds = _in_turns(calls)
        if len(results) == 1 and torch.is_grad_enabled() and any(_wants(t) for t in part):
            seconds[choices.TORCH] = max(0.0, seconds[choices.TORCH] + _lost_in_training(op, part, seconds))
        yield Tuned(op.name, of, seconds, choices.fastest(seconds), dropped, -1)


def _has_rivals(op: Op) -> bool:
    """Whether an op has algorithms to measure on the CPU, with torch's op for a rival."""
    return op.algorithms is not None and op.algorithms.takes_number and op.otherwise is op.stock


def _wants(t) -> bool:
    return isinstance(t, torch.Tensor) and t.requires_grad


def _both_ways(function: Callable, args: tuple) -> Callable:
    """A call and its backward pass."""
    leaves = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
    wanted = [t for t in leaves if _wants(t)]

    def call():
        out = function(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)

    return call


def _lost_in_training(op: Op, args: tuple, seconds: dict[str, float]) -> float:
    """What torch's backward pass takes more than the kernels', which follows from who did the forward pass."""
    both = {"ours": ROUTES[op.name], choices.TORCH: op.stock}
    times = _in_turns({name: _both_ways(function, args) for name, function in both.items()})
    ours = min(t for name, t in seconds.items() if name != choices.TORCH) if len(seconds) > 1 else 0.0
    return (times[choices.TORCH] - seconds[choices.TORCH]) - (times["ours"] - ours)


def _in_turns(calls: dict[str, Callable]) -> dict[str, float]:
    """Median seconds of each, by blocks in turn."""
    names, times, blocks = list(calls), {name: [] for name in calls}, {}
    for name, call in calls.items():
        call()
        blocks[name] = max(1, round(_BLOCK_SECONDS / max(_seconds_on_cpu(call, 1), 1e-7)))
    for round_ in range(ROUNDS):
        for i in range(len(names)):
            name = names[(i + round_) % len(names)]
            times[name].append(_seconds_on_cpu(calls[name], blocks[name]))
    return {name: sorted(measured)[ROUNDS // 2] for name, measured in times.items()}


def _seconds_on_cpu(call: Callable, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _tensors(value) -> Iterator[torch.Tensor]:
    return (t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor))


def _measure(op: Op, args: tuple, trying: Callable[[str], str | None]) -> tuple[dict, dict]:
    """Median seconds of torch's op, and of each kernel that runs and agrees with it; why the others were dropped."""
    with torch.no_grad():
        trying(choices.TORCH)
        want = op.oracle(*args)
        calls, dropped = {choices.TORCH: partial(op.stock, *args)}, {}
        for name in op.candidates:
            if not covers(op, name, args):
                continue
            call = partial(on_gpus.call_candidate, op, name, args)
            reason = trying(name)
            try:
                reason = reason or _disagreement(call(), want)
            except Exception as error:  # such as shared memory that this GPU has not: one candidate less
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                if _is_lost(args[0]):
                    raise DeviceLost(f"{op.name} by {name}: {reason}") from error
            if reason is None:
                calls[name] = call
            else:
                dropped[name] = reason
        times = {name: [] for name in calls}
        names = list(calls)
        for round_ in range(ROUNDS + 1):
            for i in range(len(names)):
                name = names[(i + round_) % len(names)]
                trying(name)
                elapsed = _seconds(calls[name])
                if round_ > 0:
                    times[name].append(elapsed)
    return {name: sorted(measured)[ROUNDS // 2] for name, measured in times.items()}, dropped


def _lost_in_backward(op: Op, args: tuple, seconds: dict, rows: list[Tuned], seen: Callable) -> float:
    """What torch's backward pass takes more than the fastest behind a kernel, which `seen` measures first if it is new."""
    behind = []

    def record(other, its, plan):
        if other is not op:
            seen(other, its, plan)
            behind.append((other.name, choices.gpu_class(its)))

    with watch.watching(record, prefer_kernels=True):
        _both_ways(ROUTES[op.name], args)()
    took = {(row.op, row.calls): min(row.seconds.values()) for row in rows}
    if not all(key in took for key in behind):
        return 0.0
    call = _both_ways(op.stock, args)
    times = sorted(_seconds(call) for _ in range(ROUNDS + 1))
    return times[ROUNDS // 2] - seconds[choices.TORCH] - sum(took[key] for key in behind)


def _disagreement(ours, want) -> str | None:
    """What differs of all that is a number, or None: places and what only backward reads need not be alike."""
    ours, want = (made if isinstance(made, tuple) else (made,) for made in (ours, want))
    for mine, theirs in zip(ours, want, strict=False):
        if theirs is None or theirs.numel() == 0 or not theirs.is_floating_point():
            continue
        if mine.shape != theirs.shape:
            return f"wrong: shape {tuple(mine.shape)}, not {tuple(theirs.shape)}"
        # To tell a kernel that is broken on this GPU, no more: tf32 and the order of sums may differ.
        mine, theirs = mine.detach(), theirs.detach()
        far = (mine - theirs).float()
        in_one = MOST_ERROR_IN_ONE if theirs.element_size() == 2 else MOST_ERROR
        for error, most, of in (
            (far.norm() / theirs.float().norm().clamp(min=1e-6), MOST_ERROR, "in norm"),
            (far.abs().max() / theirs.abs().max().clamp(min=1e-6), in_one, "of the largest value"),
        ):
            if not float(error) < most:
                return f"wrong: off by {float(error):.1e} {of}, at most {most:.0e} is right"
    return None


def _is_lost(tensor: torch.Tensor) -> bool:
    """Whether a GPU's context takes no call any more, as after an access out of bounds."""
    if not tensor.is_cuda:
        return False
    try:
        torch.cuda.synchronize(tensor.device)
    except Exception:
        return True
    return False


def _seconds(call: Callable) -> float:
    """Seconds of a call on the device, of several in a row where one is short."""
    calls = 5
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls / 1e3
