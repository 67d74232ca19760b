"""The training loop and command line that the examples share."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from data import Data
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class Task:
    """A network, its data and how it is trained.

    ``build(nn, fused)`` makes the network from ``torch.nn`` or ``fastnn.nn``; with `fused`, from fastnn's fused layers.
    """

    name: str
    build: Callable[[ModuleType, bool], torch.nn.Module]
    load: Callable[[str | None], Data]
    optimizer: Callable[[Iterator], torch.optim.Optimizer]
    batch_size: int
    epochs: int
    has_fused: bool = True


def backend(name: str) -> ModuleType:
    """``torch.nn`` or ``fastnn.nn``: the one line that differs between the two."""
    return importlib.import_module(f"{name}.nn")


def make(
    task: Task, nn: ModuleType, seed: int, fused: bool = False
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The network, with the initial values that `seed` gives, and its optimizer."""
    torch.manual_seed(seed)
    net = task.build(nn, fused)
    return net, task.optimizer(net.parameters())


def batches(length: int, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """The indices of one epoch's batches, in random order; a smaller last batch is left out."""
    order = torch.randperm(length, generator=generator)
    return order.split(batch_size)[: max(1, length // batch_size)]


def anneal(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set the learning rate for the point where `share` of the training is done: it falls linearly to 0.

    With small steps at the end, the accuracy does not hang on which batch happens to be the last.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * max(0.0, 1 - share)


def step(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor
) -> float:
    """One training step; returns the loss before it."""
    optimizer.zero_grad()
    outputs = net(inputs)
    loss = torch.nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(net: torch.nn.Module, split, batch_size: int = 256) -> float:
    """The share of right answers."""
    net.eval()
    right = total = 0
    for indices in torch.arange(len(split)).split(batch_size):
        inputs, targets = split.batch(indices)
        right += (net(inputs).argmax(-1) == targets).sum().item()
        total += targets.numel()
    net.train()
    return right / total


def main(task: Task, argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{task.name}.py", description=sys.modules[task.build.__module__].__doc__
    )
    parser.add_argument(
        "--backend", choices=("fastnn", "torch"), default="fastnn", help="whose nn (default: fastnn)"
    )
    if task.has_fused:
        parser.add_argument(
            "--fused", action="store_true", help="use fastnn's fused layers (same parameters)"
        )
    parser.add_argument("--epochs", type=_positive, default=task.epochs, help=f"default: {task.epochs}")
    parser.add_argument("--steps", type=_positive, help="stop after this many steps")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--data", metavar="DIR", help="folder with the real data set, in its original files")
    args = parser.parse_args(argv)
    fused = getattr(args, "fused", False)
    if fused and args.backend == "torch":
        parser.error("--fused needs --backend fastnn")
    try:
        nn = backend(args.backend)
        data = task.load(args.data)
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1

    console = Console()
    console.print(f"{task.name} with {nn.__name__}{', fused layers' if fused else ''}, on {data.source}")
    net, optimizer = make(task, nn, args.seed, fused)
    generator = torch.Generator().manual_seed(args.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    per_epoch = len(batches(len(data.train), task.batch_size, torch.Generator()))
    total = min(args.steps or sys.maxsize, args.epochs * per_epoch)
    done, seconds = 0, 0.0
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(task.name, total=total)
        for epoch in range(args.epochs):
            losses = []
            start = time.perf_counter()
            for indices in batches(len(data.train), task.batch_size, generator)[: total - done]:
                anneal(optimizer, (done + len(losses)) / total)
                losses.append(step(net, optimizer, *data.train.batch(indices)))
                progress.update(bar, advance=1, description=f"epoch {epoch + 1}, loss {losses[-1]:.3f}")
            seconds += time.perf_counter() - start
            done += len(losses)
            test = accuracy(net, data.test)
            progress.console.print(
                f"epoch {epoch + 1:2}: loss {sum(losses) / len(losses):.4f}, test accuracy {test:.2%}, {seconds:.1f} s"
            )
            if done == total:
                break
    console.print(f"{done} steps in {seconds:.1f} s, {seconds / done * 1e3:.2f} ms a step")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value
