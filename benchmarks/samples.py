"""Times of calls that took turns, and what is said of them: medians, ratios, spread."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# A ratio is marked unstable if its rounds or its passes spread wider than the first, or if another run may well differ by more than
# the second.
SPREAD, REPEAT = 0.10, 0.05


@dataclass
class Timing:
    """Seconds per call of one implementation, over `n` blocks."""

    median: float
    q1: float
    q3: float
    least: float
    n: int


@dataclass
class Ratio:
    """A peer's time over fastnn's: the median, over rounds, of the ratio within a round; `passes` are the medians of each pass."""

    median: float
    q1: float
    q3: float
    passes: tuple[float, ...] = ()

    @property
    def spread(self) -> float:
        """The interquartile range of the rounds, or the range of the passes if that is more, over the median."""
        between = max(self.passes) - min(self.passes) if self.passes else 0.0
        return max(self.q3 - self.q1, between) / self.median

    @property
    def repeat(self) -> float:
        """How far another run of as many passes may lie, relative: two standard errors of the difference; 0 of a single pass."""
        n = len(self.passes)
        return 2 * float(np.std(self.passes, ddof=1)) * (2 / n) ** 0.5 / self.median if n > 1 else 0.0

    @property
    def unsteadiness(self) -> float:
        """The spread or the repeat, whichever is further, as a share of what is allowed."""
        return max(self.spread / SPREAD, self.repeat / REPEAT)

    @property
    def unstable(self) -> bool:
        return self.unsteadiness > 1


@dataclass
class Samples:
    """Seconds per call. `by_peer`: of each peer, the subject first; `rounds`: in each pass, of each rival beside the subject's."""

    by_peer: dict[str, list[float]] = field(default_factory=dict)
    rounds: dict[str, list[list[tuple[float, float]]]] = field(default_factory=dict)

    def add(self, times: dict[str, list[float]]) -> None:
        """Take another measurement in, of the same subject and of the same or fewer rivals."""
        if not times:
            return
        ours, *rivals = times
        for name, seconds in times.items():
            self.by_peer.setdefault(name, []).extend(seconds)
        for name in rivals:
            self.rounds.setdefault(name, []).append(list(zip(times[name], times[ours], strict=True)))

    @property
    def timings(self) -> dict[str, Timing]:
        made = {}
        for name, times in self.by_peer.items():
            q1, median, q3 = np.percentile(times, (25, 50, 75)).tolist()
            made[name] = Timing(median, q1, q3, min(times), len(times))
        return made

    @property
    def ours(self) -> Timing | None:
        """The subject's timing."""
        return next(iter(self.timings.values()), None)

    @property
    def ratios(self) -> dict[str, Ratio]:
        made = {}
        for name, passes in self.rounds.items():
            quotients = [np.divide(*np.array(pairs).T) for pairs in passes]
            q1, median, q3 = np.percentile(np.concatenate(quotients), (25, 50, 75)).tolist()
            made[name] = Ratio(median, q1, q3, tuple(float(np.median(q)) for q in quotients))
        return made
