"""How long models take, measured side by side in one process.

1. Rounds: every model is opened anew, where that is cheap, so that where it happens to lie in
   memory averages out; it is warmed up, and then all are called in turns. The order is random,
   that of opening, too: what is opened first lies elsewhere than what is opened last.
2. A round gives one ratio of medians. Whatever slows the machine down for a while slows both
   models down, and whatever does so for one call does not move a median.
3. The ratio is the Hodges-Lehmann estimate over rounds, its interval that of Wilcoxon's signed-rank
   test (Hollander, Wolfe & Chicken, *Nonparametric Statistical Methods*, 2014, sections 3.2-3.3):
   for a model against itself, logarithms of ratios are symmetric about 0, and nothing else is
   assumed.
4. It goes on until the intervals are as narrow as asked for, or the time is up.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rnnprune_cli.model import Array, Feed, Latency, Ratio, Runner
from rnnprune_cli.ranks import signed_rank

Opener = Callable[[], Runner]
Progress = Callable[[str], None]

MIN_ROUNDS = 6
"""Fewer have no interval of 95 %."""
ENOUGH_ROUNDS = 12
"""From here on it may end because intervals are narrow: models should lie in several places."""
USUAL_ROUNDS = 16
"""Into so many the time is divided, if nothing else is said."""
MAX_ROUNDS = 400
MAX_TURNS = 25
"""Samples of each model in a round."""
WARM_UP_CALLS = 3
SHORTEST_SAMPLE = 2e-4
"""Seconds; calls that are faster are timed several at once."""
CACHE_MATTERS = 2e-2
"""Seconds; before a faster call the model is called once untimed, or it would be charged for what
the others have put out of the cache."""
CONFIDENCE = 0.97
"""Of an interval by itself: looking several times whether it is narrow enough takes up to 2 %."""
_LONGEST, _COARSE = 4, 0.1
"""How much longer than usual two models are timed if their interval is wider than this."""
_LONGER = 1.25
"""By so much the rounds grow between two looks."""


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        seconds: At most about so long, but never fewer than :data:`MIN_ROUNDS` rounds.
        precision: Enough is enough when every interval is narrower than this share of its ratio;
            0 to use all the time.
        rounds: Into so many the time is divided.
        least: Seconds before which narrow intervals are not enough.
    """

    seconds: float
    precision: float = 0.0
    rounds: int = USUAL_ROUNDS
    least: float = 0.0


@dataclass(frozen=True, eq=False)
class Samples:
    """What was measured.

    Attributes:
        rounds: For each model, for each round, milliseconds of a call: float64 ``[turns]``.
        opened: For each model, seconds that opening it took, each time.
        seconds: What all of it took.
    """

    rounds: tuple[tuple[Array, ...], ...]
    opened: tuple[tuple[float, ...], ...]
    seconds: float


def interleaved_latency(
    openers: tuple[Opener, Opener], feed: Feed, seconds: float, reopen: bool = True, seed: int = 0
) -> tuple[Latency, Latency, Ratio]:
    """Times two models.

    Args:
        openers: Return the reference, and the model held against it, ready to run.
        feed: Input of one call.
        seconds: About how long to measure; up to four times as long on a noisy machine.
        reopen: Whether to open both anew in each round, as far as time allows.
        seed: Seed of the order.

    Returns:
        Latency before and after, and after divided by before.
    """
    budget = Budget(_LONGEST * seconds, _COARSE, _LONGEST * ENOUGH_ROUNDS, seconds)
    before, after = interleaved(openers, (feed, feed), budget, reopen, seed).rounds
    return latency(before), latency(after), ratio(before, after)


def interleaved(
    openers: Sequence[Opener],
    feeds: Sequence[Feed],
    budget: Budget,
    reopen: bool = True,
    seed: int = 0,
    progress: Progress = lambda step: None,
) -> Samples:
    """Times any number of models, in turns; the first is what the others are held against.

    Args:
        openers: Return the models, ready to run.
        feeds: Input of one call of each.
        budget: How long.
        reopen: Whether to open all anew in each round, if opening takes no more than about half of
            the time.
        seed: Seed of the order.
        progress: Told how far it is.
    """
    generator = np.random.default_rng(seed)
    found: list[list[Array]] = [[] for _ in openers]
    opened: list[list[float]] = [[] for _ in openers]
    begin, look, turns = time.perf_counter(), ENOUGH_ROUNDS, 0
    running: list[_Running] = []
    with _no_collection():
        while len(found[0]) < MAX_ROUNDS:
            if reopen or not running:
                running = []  # before others are opened
                runners: dict[int, Runner] = {}
                for number in generator.permutation(len(openers)):
                    start = time.perf_counter()
                    runners[number] = openers[number]()
                    opened[number].append(time.perf_counter() - start)
                own = budget.seconds / budget.rounds
                warm = {
                    number: _Running(runners[number], feeds[number], own)
                    for number in generator.permutation(len(openers))
                }
                running = [warm[number] for number in range(len(openers))]
                if not turns:
                    opening = sum(times[0] for times in opened)
                    # Rounds of the same sessions are not independent, and an interval would be
                    # too narrow: it is each round or none.
                    reopen = reopen and MIN_ROUNDS * opening <= budget.seconds
                    own = max(own, opening) if reopen else own
                    turn = sum(model.seconds for model in running)
                    turns = int(np.clip(own / max(turn, 1e-9), 1, MAX_TURNS))
            samples = np.empty((turns, len(running)))
            for row in samples:
                for number in generator.permutation(len(running)):
                    row[number] = 1e3 * running[number].sample()
            for number, column in enumerate(samples.T):
                found[number].append(column)
            rounds, spent = len(found[0]), time.perf_counter() - begin
            if rounds < MIN_ROUNDS:
                continue
            if spent > budget.seconds:
                break
            if budget.precision and rounds >= look and spent > budget.least:
                look = int(rounds * _LONGER) + 1
                ratios = [ratio(found[0], other) for other in found[1:]]
                width = max(((r.high - r.low) / r.median for r in ratios), default=0.0)
                progress(f"round {rounds}, intervals of ±{50 * width:.1f} %")
                if width < budget.precision:
                    break
    return Samples(tuple(map(tuple, found)), tuple(map(tuple, opened)), time.perf_counter() - begin)


class _Running:
    """An open model that was warmed up, and what a sample of it costs."""

    def __init__(self, runner: Runner, feed: Feed, longest: float) -> None:
        self._runner, self._run = runner, runner.call(feed)
        runner.reset()
        once = np.inf
        for _ in range(WARM_UP_CALLS):
            once = min(once, self._call(1))
            if once > longest:
                break
        self._calls = max(1, round(SHORTEST_SAMPLE / max(once, 1e-9)))
        self._untimed = once < CACHE_MATTERS
        self.seconds = once * (self._calls + self._untimed)

    def sample(self) -> float:
        """Returns the seconds of a call."""
        self._runner.reset()
        if self._untimed:
            self._call(1)
            self._runner.reset()
        return self._call(self._calls) / self._calls

    def _call(self, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            self._run()
        return time.perf_counter() - begin


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python's garbage collector from running in the middle of a call."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# Statistics


def latency(rounds: Sequence[Array]) -> Latency:
    """Returns what the samples of one model say.

    Args:
        rounds: Milliseconds of a call, for each round.
    """
    samples = np.concatenate(rounds)
    p5, median, p95, p99 = (float(p) for p in np.percentile(samples, [5, 50, 95, 99]))
    rounded = tuple(round(float(s), 6) for s in samples)
    return Latency(median, p5, p95, rounded, p99, tuple(len(r) for r in rounds))


def ratio(before: Sequence[Array], after: Sequence[Array]) -> Ratio:
    """Returns the ratio of two models' latencies, after ÷ before, with its 95 % interval.

    Args:
        before: Samples of one model for each round.
        after: The same of the other.
    """
    medians = [np.array([np.median(one) for one in rounds]) for rounds in (before, after)]
    middle, low, high = signed_rank(np.log(medians[1] / medians[0]), CONFIDENCE)
    return Ratio(float(np.exp(middle)), float(np.exp(low)), float(np.exp(high)))


# The machine


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...]]:
    """Keeps this thread, and those that it starts, on the cores that others use least.

    Args:
        threads: As many cores.

    Yields:
        The cores; none where the system knows no affinity, or has not more cores.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set[int]()
    if threads >= len(allowed):
        yield ()
        return
    idle = _idle_ticks()
    time.sleep(_LOOK_SECONDS)
    gained = {core: ticks - idle.get(core, 0) for core, ticks in _idle_ticks().items()}
    cores = sorted(allowed, key=lambda core: (-gained.get(core, 0), core))[:threads]
    os.sched_setaffinity(0, cores)
    try:
        yield tuple(sorted(cores))
    finally:
        os.sched_setaffinity(0, allowed)


_LOOK_SECONDS = 0.2
_IDLE = 4
"""Field of a core's line in /proc/stat (proc(5))."""


def _idle_ticks() -> dict[int, int]:
    """Returns how long each core has had nothing to do."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return {}
    lines = (line.split() for line in stat.read_text().splitlines())
    return {
        int(words[0][3:]): int(words[_IDLE])
        for words in lines
        if words[0].startswith("cpu") and words[0] != "cpu"
    }
