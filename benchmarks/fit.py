"""From samples to rules: decision trees by the sizes of calls that leave the least regret.

The regret of a sample under a rule is what the chosen algorithm took over what the fastest took. A tree is grown as CART grows its
trees (Breiman, Friedman, Olshen and Stone, 1984), by the sum of the logarithms of regrets in place of an impurity; a split has to gain
more than `PENALTY`.

Samples are few for the sizes that there are, and a tree that is grown of them alone keeps their noise. So a forest (Geurts, Ernst and
Wehenkel, "Extremely randomized trees", 2006) guesses the regrets of many calls that were not measured, and the tree is grown of both:
a model that nobody can read teaches one that anybody can (Breiman and Shang, "Born again trees", 1996). How well rules do on networks that
they have not seen is told by fits that leave out a fifth of the networks each.
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

#: What a split has to gain, in logarithms of regret: 15% on one sample.
PENALTY = 0.15
LEAST_SAMPLES, DEEPEST = 5, 9
#: Trees of the forest, and the logarithm of regret from which one is as hopeless as another.
TREES, HOPELESS = 100, 1.5
FOLDS = 5
#: Comparisons of one size that are tried for a split.
MOST_SPLITS = 32
#: Of a kind with fewer samples there is no rule: the library's own choice is better than a guess.
LEAST_OF_A_KIND = 12
# In place of the logarithm of an uncovered algorithm's regret.
_UNCOVERED = 3.0


class Call(NamedTuple):
    """A call that was not measured.

    Attributes
    ----------
    op, kind : str
    sizes : dict of str to float
    names : tuple of str
        The algorithms that cover it, and torch's op.
    """

    op: str
    kind: str
    sizes: dict[str, float]
    names: tuple[str, ...]


class Fit(NamedTuple):
    """Rules as JSON has them, by op and kind, and what regret they leave.

    Attributes
    ----------
    rules : dict
        The name of another op in place of the kinds of an op that has the same.
    regrets : dict of (str, str) to list of float
        Of the samples that were fitted.
    held_out : dict of (str, str) to list of float
        Of each sample under rules that were fitted without its network.
    """

    rules: dict[str, dict[str, list | str] | str]
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


def fit(samples: list[Sample], calls: Iterable[Call] = (), penalty: float = PENALTY) -> Fit:
    """Fit a rule for each op and kind of call.

    Parameters
    ----------
    samples : list of Sample
    calls : iterable of Call
        Calls that were not measured, for the forest to guess.
    penalty : float
        What a split has to gain.

    Returns
    -------
    Fit
    """
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples + derived(samples):
        groups[sample.op, sample.kind].append(sample)
    unmeasured: dict[tuple[str, str], list[Call]] = defaultdict(list)
    for call in calls:
        unmeasured[call.op, call.kind].append(call)
        if " inference" in call.kind and call.op in _BACKWARD:
            kind = call.kind.replace(" inference", " training")
            unmeasured[call.op, kind].append(call._replace(kind=kind))
    made: dict[str, dict[str, list | str]] = defaultdict(dict)
    regrets, held_out = {}, {}
    for (op, kind), group in sorted(groups.items()):
        if len(group) < LEAST_OF_A_KIND:
            continue
        rule = _taught(group, unmeasured[op, kind], penalty)
        made[op][kind] = as_json(rule)
        regrets[op, kind] = [regret(rule, s) for s in group]
        held_out[op, kind] = []
        networks = sorted({s.network for s in group})
        for fold in range(min(FOLDS, len(networks))):
            left_out = set(networks[fold::FOLDS])
            others = [s for s in group if s.network not in left_out]
            if others:
                unseen = _taught(others, unmeasured[op, kind], penalty)
                held_out[op, kind] += [regret(unseen, s) for s in group if s.network in left_out]
    # Where an op was measured by itself for some kinds alone, it takes the others' rules.
    alike: dict[str, dict[str, list | str] | str] = dict(made)
    for like, op in _ALIKE.items():
        if op in made:
            alike[like] = {**made[op], **made[like]} if like in made else op
    return Fit(alike, regrets, held_out)


# Ops that differ from one that is measured in what stands before or behind the products alone.
_ALIKE = {
    "conv2d_activation": "conv2d_relu",
    "conv2d_activation_backward": "conv2d_relu_backward",
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
        if any(TORCH not in g.seconds for g in gradients):
            continue
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
    "linear": "linear_backward",
    "linear_relu": "linear_relu_backward",
}


# ---- what a forest guesses ----


def _taught(group: list[Sample], calls: list[Call], penalty: float) -> rules.Rule:
    """A tree for samples and for what a forest of them says of other calls."""
    guessed = guess(group, calls)
    # Each gain counts once for a sample and once for each of the calls that stand for it.
    return grow(group + guessed, penalty * (1 + len(guessed) / len(group)))


def guess(group: list[Sample], calls: list[Call]) -> list[Sample]:
    """Calls of sizes among those of some samples of one op and kind, with the regrets that a forest expects in place of seconds."""
    if not calls:
        return []
    from sklearn.ensemble import ExtraTreesRegressor

    names = sorted({name for s in group for name in s.seconds})
    order = list(group[0].sizes)

    def features(sizes):
        return [math.log(max(sizes[size], 0.5)) for size in order]

    known = np.array([features(s.sizes) for s in group])
    regrets = np.full((len(group), len(names)), HOPELESS)
    for i, s in enumerate(group):
        least = min(map(s.median, s.seconds))
        for name in s.seconds:
            regrets[i, names.index(name)] = min(math.log(s.median(name) / least), HOPELESS)
    asked = np.array([features(call.sizes) for call in calls])
    near = ((asked >= known.min(0) - 0.3) & (asked <= known.max(0) + 0.3)).all(1)
    calls = [call for call, within in zip(calls, near, strict=True) if within]
    if not calls:
        return []
    forest = ExtraTreesRegressor(TREES, min_samples_leaf=2, random_state=0).fit(known, regrets)
    found = forest.predict(asked[near]).reshape(len(calls), len(names))
    made = []
    for call, expected in zip(calls, found, strict=True):
        seconds = {name: [math.exp(expected[names.index(name)])] for name in call.names if name in names}
        if len(seconds) > 1:
            made.append(Sample(call.op, call.kind, "", call.sizes, 0, "", seconds))
    return made


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
    """The split that leaves the least behind one more split on either side, where that pays.

    A split by one size often gains nothing until the next by another: `image > 500` and `stride <= 1` together tell what neither tells.
    """
    total = data.logs.sum(0).min()
    if depth >= DEEPEST or len(data.logs) < 2 * LEAST_SAMPLES or total <= penalty:
        return _leaf(data)
    splits = _splits(data.features)
    if not splits:
        return _leaf(data)
    low = np.array([data.features[:, j] <= most for j, most in splits], float)  # splits x samples
    counts = low.sum(1)
    usable = (counts >= LEAST_SAMPLES) & (len(data.logs) - counts >= LEAST_SAMPLES)
    splits, low, counts = (
        [s for s, use in zip(splits, usable, strict=True) if use],
        low[usable],
        counts[usable],
    )
    if not splits:
        return _leaf(data)
    sums = low @ data.logs  # splits x names
    rest = data.logs.sum(0) - sums
    both = low @ low.T  # samples that are low by either of two splits
    # By a first split and a second, of each side of the first: the least regret of the four parts.
    of_low = _next(np.stack([(low * of) @ low.T for of in data.logs.T], -1), sums, both, counts)
    high = 1 - low
    of_high = _next(
        np.stack([(high * of) @ low.T for of in data.logs.T], -1),
        rest,
        high @ low.T,
        len(data.logs) - counts,
    )
    cost = np.minimum(sums.min(1), of_low + penalty) + np.minimum(rest.min(1), of_high + penalty)
    i = int(cost.argmin())
    if total - cost[i] <= penalty:
        return _leaf(data)
    j, most = splits[i]
    side = data.features[:, j] <= most
    sides = [_grow(data.take(part), penalty, depth + 1) for part in (side, ~side)]
    return sides[0] if sides[0] == sides[1] else rules.Node(data.sizes[j], most, *sides)


def _next(sums: np.ndarray, of_side: np.ndarray, counts: np.ndarray, of_all: np.ndarray) -> np.ndarray:
    """The least regret of a side when it is split once more; infinite where no split leaves enough samples.

    `sums` of names by first and second split, of what is low by the second; `of_side` the same of all the side; `counts`, `of_all` of
    samples.
    """
    cost = sums.min(2) + (of_side[:, None] - sums).min(2)
    fits = (counts >= LEAST_SAMPLES) & (of_all[:, None] - counts >= LEAST_SAMPLES)
    return np.where(fits, cost, np.inf).min(1)


def _splits(features: np.ndarray) -> list[tuple[int, float]]:
    """Comparisons that tell samples apart: of each size at most `MOST_SPLITS`, evenly by the samples' order."""
    made = []
    for j in range(features.shape[1]):
        values = np.unique(features[:, j])
        if len(values) > MOST_SPLITS + 1:
            places = np.linspace(0, len(features) - 1, MOST_SPLITS + 2)[1:-1].astype(int)
            below = np.unique(np.sort(features[:, j])[places])
            at = np.searchsorted(values, below)
            at = np.unique(at[at + 1 < len(values)])
        else:
            at = np.arange(len(values) - 1)
        made += [(j, _between(values[k], values[k + 1])) for k in at]
    return made


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
