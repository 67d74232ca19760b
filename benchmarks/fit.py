"""From samples to rules: decision trees by the sizes of calls that leave the least regret.

The regret of a sample under a rule is what the chosen algorithm took over what the fastest took. A tree is grown as CART grows its
trees (Breiman, Friedman, Olshen and Stone, 1984), by the sum of the logarithms of regrets in place of an impurity; a split has to gain
more than `PENALTY`. How well it does on networks that it has not seen is told by fits that leave out one network each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from benchmarks.algorithms import Sample
from fastnn.ops.core import rules
from fastnn.ops.core.rules import TORCH

#: What a split has to gain, in logarithms of regret: 10% on one sample.
PENALTY = 0.1
LEAST_SAMPLES, DEEPEST = 3, 7
#: Of a kind with fewer samples there is no rule: the library's own choice is better than a guess.
LEAST_OF_A_KIND = 12
# In place of the logarithm of an uncovered algorithm's regret.
_UNCOVERED = 3.0


class Fit(NamedTuple):
    """Rules as JSON has them, by op and kind, and what regret they leave.

    Attributes
    ----------
    rules : dict
    regrets : dict of (str, str) to list of float
        Of the samples that were fitted.
    held_out : dict of (str, str) to list of float
        Of each sample under rules that were fitted without its network.
    """

    rules: dict[str, dict[str, list | str]]
    regrets: dict[tuple[str, str], list[float]]
    held_out: dict[tuple[str, str], list[float]]


def mean(regrets: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(r) for r in regrets]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def regret(rule: rules.Rule, sample: Sample) -> float:
    """What the rule's algorithm took over what the fastest took."""
    times = {name: sample.median(name) for name in sample.seconds}
    chosen = next((name for name in rules.decide(rule, sample.sizes) if name in times), None)
    if chosen is None:  # the library's own choice, which was not measured apart
        return max(times.values()) / min(times.values())
    return times[chosen] / min(times.values())


def fit(samples: list[Sample], penalty: float = PENALTY) -> Fit:
    """Fit a rule for each op and kind of call.

    Parameters
    ----------
    samples : list of Sample
    penalty : float
        What a split has to gain.

    Returns
    -------
    Fit
    """
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples + derived(samples):
        groups[sample.op, sample.kind].append(sample)
    made: dict[str, dict[str, list | str]] = defaultdict(dict)
    regrets, held_out = {}, {}
    for (op, kind), group in sorted(groups.items()):
        if len(group) < LEAST_OF_A_KIND:
            continue
        rule = grow(group, penalty)
        made[op][kind] = as_json(rule)
        regrets[op, kind] = [regret(rule, s) for s in group]
        held_out[op, kind] = []
        for network in sorted({s.network for s in group}):
            others = [s for s in group if s.network != network]
            if others:
                unseen = grow(others, penalty)
                held_out[op, kind] += [regret(unseen, s) for s in group if s.network == network]
    for like, op in _ALIKE.items():
        if op in made:
            made[like] = dict(made[op]) | made.get(like, {})
    return Fit(dict(made), regrets, held_out)


# Ops that differ from one that is measured in what stands before or behind the products alone.
_ALIKE = {
    "conv2d_activation": "conv2d_relu",
    "conv2d_activation_backward": "conv2d_relu_backward",
    "conv2d_relu_max_pool2d_backward": "conv2d_relu_backward",
    "linear_activation": "linear_relu",
    "linear_activation_backward": "linear_relu_backward",
}


def derived(samples: list[Sample]) -> list[Sample]:
    """Calls with gradients, from their parts: each forward algorithm with the fastest of each gradient, and torch's op throughout."""
    parts: dict[tuple, dict[str, Sample]] = defaultdict(dict)

    def key(s, kind):
        return kind, s.network, s.threads, tuple(sorted(s.sizes.items()))

    for s in samples:
        for what in ("input", "weight"):
            if f" {what}" in s.kind:
                parts[key(s, s.kind.replace(f" {what}", " inference"))][s.op, what] = s
    made = []
    for s in samples:
        op = _BACKWARD.get(s.op)
        if " inference" not in s.kind or op is None:
            continue
        found = parts.get(key(s, s.kind), {})
        gradients = [found.get((op, what)) for what in ("input", "weight")]
        if gradients[1] is None:
            continue
        gradients = [g for g in gradients if g is not None]
        ours = sum(min(map(g.median, g.seconds)) for g in gradients)
        theirs = sum(g.median(TORCH) for g in gradients)
        seconds = {
            name: [t + (theirs if name == TORCH else ours) for t in times]
            for name, times in s.seconds.items()
        }
        made.append(s._replace(kind=s.kind.replace(" inference", " training"), seconds=seconds))
    return made


_BACKWARD = {
    "conv2d": "conv2d_backward",
    "conv2d_relu": "conv2d_relu_backward",
    "conv2d_relu_max_pool2d": "conv2d_relu_backward",
    "linear": "linear_backward",
    "linear_relu": "linear_relu_backward",
}


# ---- trees ----


class _Data(NamedTuple):
    names: list[str]
    sizes: list[str]
    features: np.ndarray  # samples x sizes
    logs: np.ndarray  # samples x names: the logarithm of each one's regret

    def take(self, which: np.ndarray) -> _Data:
        return self._replace(features=self.features[which], logs=self.logs[which])


def grow(samples: list[Sample], penalty: float = PENALTY) -> rules.Rule:
    """A tree for samples of one op and kind."""
    names = sorted({name for s in samples for name in s.seconds})
    sizes = list(samples[0].sizes)
    features = np.array([[s.sizes[size] for size in sizes] for s in samples], float)
    logs = np.full((len(samples), len(names)), _UNCOVERED)
    for i, s in enumerate(samples):
        least = min(map(s.median, s.seconds))
        for name in s.seconds:
            logs[i, names.index(name)] = min(math.log(s.median(name) / least), _UNCOVERED)
    return _grow(_Data(names, sizes, features, logs), penalty, 0)


def _grow(data: _Data, penalty: float, depth: int) -> rules.Rule:
    total = data.logs.sum(0).min()
    best = None
    if depth < DEEPEST and len(data.logs) >= 2 * LEAST_SAMPLES and total > penalty:
        for j in range(len(data.sizes)):
            order = np.argsort(data.features[:, j], kind="stable")
            values, sums = data.features[order, j], data.logs[order].cumsum(0)
            below = sums[:-1].min(1)
            above = (sums[-1] - sums[:-1]).min(1)
            cost = np.where(values[1:] > values[:-1], below + above, np.inf)
            cost[: LEAST_SAMPLES - 1] = np.inf
            cost[len(cost) - LEAST_SAMPLES + 1 :] = np.inf
            i = int(cost.argmin())
            if np.isfinite(cost[i]) and (best is None or cost[i] < best[0]):
                best = cost[i], j, _between(values[i], values[i + 1])
    if best is None or total - best[0] <= penalty:
        return _leaf(data)
    _, j, most = best
    low = data.features[:, j] <= most
    sides = [_grow(data.take(side), penalty, depth + 1) for side in (low, ~low)]
    return sides[0] if sides[0] == sides[1] else rules.Node(data.sizes[j], most, *sides)


def _between(low: float, high: float) -> float:
    """A number of few digits from `low` on and below `high`."""
    middle = math.sqrt(max(low, 1.0) * high) if low >= 1 else (low + high) / 2
    for digits in range(1, 12):
        rounded = float(f"{middle:.{digits - 1}e}")
        if low <= rounded < high:
            return rounded
    return low


def _leaf(data: _Data) -> tuple[str, ...]:
    """The best algorithm, then the best of the calls that it does not cover, and so on; torch's op at the end."""
    order, left = [], data.logs
    while len(left):
        covered = left < _UNCOVERED
        usual = covered.mean(0) >= 0.5
        means = np.where(usual, np.where(covered, left, 0).sum(0) / np.maximum(covered.sum(0), 1), np.inf)
        i = int(means.argmin())
        if not np.isfinite(means[i]):
            break
        order.append(data.names[i])
        if data.names[i] == TORCH:
            break
        left = left[left[:, i] >= _UNCOVERED]
    return (*order,) if order and order[-1] == TORCH else (*order, TORCH)


def as_json(rule: rules.Rule) -> list | str:
    if isinstance(rule, rules.Node):
        most = int(rule.most) if rule.most == int(rule.most) else rule.most
        return [f"{rule.size} <= {most}", as_json(rule.low), as_json(rule.high)]
    return ", ".join(rule)
