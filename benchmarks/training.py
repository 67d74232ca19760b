"""The example networks, trained with ``torch.nn`` and with ``fastnn.nn``: the same losses, and the time of both.

All runs of a network start from the same seed and take the same batches, step by step in turn, so that they meet the
same state of the machine. Two correct implementations still drift apart, since each step amplifies the rounding errors of
the one before. How far is measured, not guessed: one more run with ``torch.nn`` gets the images of each batch in
reverse order, which changes nothing but the order of its sums.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.samples import Ratio

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NETS = ("mnist_mlp", "cifar_cnn", "transformer_text", "vgg_start")

# Losses agree if they differ by no more than TIMES_DRIFT times the drift of the reversed run, or by SLACK if that is
# more: strictly over the EARLY steps, before anything is amplified, and loosely over all.
TIMES_DRIFT, SLACK, EARLY, EARLY_SLACK = 10, 0.1, 10, 1e-4


def load_task(name: str):
    """The `TASK` of an example."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name).TASK


@dataclass
class Run:
    """One network trained one way: the loss and the seconds of each step, and the test accuracy at the end."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = float("nan")


@dataclass
class Training:
    """What came of one network; runs are by name, ``torch.nn`` first. `status`: "ok", "failed" or "error"."""

    name: str
    source: str = ""
    status: str = "ok"
    note: str = ""
    epochs: float = 0.0
    runs: dict[str, Run] = field(default_factory=dict)
    reversed: Run = field(default_factory=Run)

    @property
    def subjects(self) -> dict[str, Run]:
        return {name: run for name, run in self.runs.items() if name != "torch.nn"}

    @property
    def drift(self) -> float:
        """The largest difference in loss that the order of the sums makes."""
        return _difference(self.runs["torch.nn"], self.reversed)

    @property
    def early_drift(self) -> float:
        """The same over the first steps."""
        return _difference(self.runs["torch.nn"], self.reversed, EARLY)

    def difference(self, name: str) -> float:
        """The largest difference in loss between a run and ``torch.nn``."""
        return _difference(self.runs["torch.nn"], self.runs[name])

    def early_difference(self, name: str) -> float:
        """The same over the first steps."""
        return _difference(self.runs["torch.nn"], self.runs[name], EARLY)

    def ratio(self, name: str) -> Ratio | None:
        """``torch.nn``'s time over a run's: the median, over steps, of the ratio within a step."""
        ours, stock = (np.array(self.runs[n].seconds[1:]) for n in (name, "torch.nn"))
        if self.status != "ok" or len(ours) == 0:
            return None
        q1, median, q3 = np.percentile(stock / ours, (25, 50, 75)).tolist()
        return Ratio(median, q1, q3)

    def disagreement(self, test_size: int) -> str | None:
        """What is wrong with the losses or accuracies of a run, or None."""
        stock = self.runs["torch.nn"]
        for name, run in self.subjects.items():
            for when, found, noise, slack in (
                (f" in the first {EARLY} steps", self.early_difference(name), self.early_drift, EARLY_SLACK),
                ("", self.difference(name), self.drift, SLACK),
            ):
                if not found <= max(TIMES_DRIFT * noise, slack):
                    return f"{name}: the loss differs by {found:.1e}{when}, float noise makes {noise:.1e}"
            # Two standard errors of a share, or the difference that the order of the sums makes.
            p = stock.accuracy
            allowed = max(
                2 * (p * (1 - p) / test_size) ** 0.5, abs(p - self.reversed.accuracy), 1 / test_size
            )
            if not abs(run.accuracy - p) <= allowed:
                return f"{name}: accuracy {run.accuracy:.2%}, torch.nn {p:.2%}"
        return None


def _difference(a: Run, b: Run, steps: int | None = None) -> float:
    n = min(len(a.losses), len(b.losses), steps or len(a.losses))
    return float(np.abs(np.subtract(a.losses[:n], b.losses[:n])).max()) if n else float("nan")


def variants(task) -> dict[str, tuple]:
    """The runs of a network: its name, whose ``nn``, and whether fused layers."""
    import fastnn.nn

    chosen = {"torch.nn": (torch.nn, False), "fastnn.nn": (fastnn.nn, False)}
    if task.has_fused:
        chosen["fastnn.nn, fused"] = (fastnn.nn, True)
    return chosen


def train(
    task,
    *,
    seconds: float,
    epochs: int | None = None,
    seed: int = 0,
    runs: dict[str, tuple] | None = None,
    on_step: Callable[[float], None] = lambda share: None,
) -> Training:
    """Train a network every way, for its epochs (or `epochs`) or until `seconds` have passed.

    ``on_step(share)`` is called after each step with the share of the work that is done.
    """
    import train as loop

    data = task.load(None)
    result = Training(task.name, data.source)
    deadline = time.perf_counter() + seconds
    begin = time.perf_counter()
    chosen = variants(task) if runs is None else runs
    nets = {name: loop.make(task, nn, seed, fused) for name, (nn, fused) in chosen.items()}
    mirror = loop.make(task, torch.nn, seed)
    result.runs = {name: Run() for name in nets}
    generator = torch.Generator().manual_seed(seed)
    order = list(nets)
    per_epoch = len(loop.batches(len(data.train), task.batch_size, torch.Generator()))
    total = (epochs or task.epochs) * per_epoch
    done, share = 0, 0.0
    while done < total and time.perf_counter() < deadline:
        for indices in loop.batches(len(data.train), task.batch_size, generator):
            inputs, targets = data.train.batch(indices)
            for _, optimizer in (*nets.values(), mirror):
                loop.anneal(optimizer, share)
            for name in order:
                start = time.perf_counter()
                loss = loop.step(*nets[name], inputs, targets)
                result.runs[name].seconds.append(time.perf_counter() - start)
                result.runs[name].losses.append(loss)
            result.reversed.losses.append(loop.step(*mirror, inputs.flip(0), targets.flip(0)))
            order.append(order.pop(0))
            done += 1
            now = time.perf_counter()
            # By the clock where the time ends first, so that such a run is annealed too.
            share = max(done / total, min(1.0, (now - begin) / seconds))
            on_step(share)
            if now > deadline:
                break
    result.epochs = done / per_epoch
    for run, (net, _) in zip((*result.runs.values(), result.reversed), (*nets.values(), mirror), strict=True):
        run.accuracy = loop.accuracy(net, data.test)
    if wrong := result.disagreement(len(data.test)):
        result.status, result.note = "failed", wrong
    return result
