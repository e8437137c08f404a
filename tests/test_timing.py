"""Timing side by side: what is called how often, and whether the statistics keep their word."""

from __future__ import annotations

import os

import numpy as np
import pytest

from rnnprune_cli import ranks, timing
from rnnprune_cli.model import Runner
from rnnprune_cli.timing import Budget


class Clocked(Runner):
    """Advances a made-up clock by what each call costs."""

    inputs = outputs = ()

    def __init__(self, clock, cost=0.0):
        self.clock, self.cost, self.calls = clock, cost, 0

    def run(self, feed):
        self.calls += 1
        self.clock[0] += self.cost() if callable(self.cost) else self.cost
        return []


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def interleaved(costs, clock, budget, **more):
    openers = [lambda cost=cost: Clocked(clock, cost) for cost in costs]
    return timing.interleaved(openers, [{}] * len(costs), budget, **more)


def test_models_are_timed_equally_often(clock):
    samples = interleaved([1e-3, 2e-3, 5e-3], clock, Budget(1.0))
    sizes = [[len(one) for one in rounds] for rounds in samples.rounds]
    assert sizes[0] == sizes[1] == sizes[2]
    assert len(sizes[0]) >= timing.MIN_ROUNDS


def test_ratio_is_after_divided_by_before(clock):
    openers = (lambda: Clocked(clock, 0.002), lambda: Clocked(clock, 0.006))
    before, after, ratio = timing.interleaved_latency(openers, {}, 1.0)
    assert before.median == pytest.approx(2.0)
    assert after.median == pytest.approx(6.0)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((3, 3, 3))


def test_percentiles_are_of_the_samples_and_rounds_divide_them(clock):
    costs = iter(np.random.default_rng(0).uniform(1e-3, 5e-3, 100_000))
    samples = interleaved([lambda: next(costs)], clock, Budget(2.0))
    latency = timing.latency(samples.rounds[0])
    assert sum(latency.rounds) == len(latency.samples)
    expected = np.percentile(latency.samples, [5, 50, 95, 99])
    found = (latency.p5, latency.median, latency.p95, latency.p99)
    assert found == pytest.approx(tuple(expected), rel=1e-5)


def test_models_are_opened_anew_in_every_round_where_that_is_cheap(clock):
    samples = interleaved([1e-3, 1e-3], clock, Budget(1.0))
    assert [len(times) for times in samples.opened] == [len(samples.rounds[0])] * 2


@pytest.mark.parametrize(("cost", "reopen"), [(0.25, True), (0.25, False), (0.5, True)])
def test_what_is_slow_to_open_is_opened_in_each_round_or_once(clock, cost, reopen):
    """Rounds of the same sessions are not independent of one another."""

    def opener():
        clock[0] += cost
        return Clocked(clock, 1e-3)

    samples = timing.interleaved([opener, opener], [{}, {}], Budget(4.0), reopen)
    opened, rounds = [len(times) for times in samples.opened], len(samples.rounds[0])
    assert rounds >= timing.MIN_ROUNDS
    assert opened == ([rounds, rounds] if cost == 0.25 and reopen else [1, 1])
    assert samples.opened[0][0] == pytest.approx(cost)
    assert samples.seconds < 8


def test_the_luck_of_an_opening_is_no_evidence(clock):
    """Where a model lies in memory makes it faster or slower as long as it lies there."""
    generator = np.random.default_rng(0)

    def opener():
        clock[0] += 0.1
        luck = 1e-3 * np.exp(generator.normal(0, 0.02))
        return Clocked(clock, lambda: luck * float(np.exp(generator.normal(0, 2e-3))))

    held = 0
    for seed in range(100):
        samples = timing.interleaved([opener] * 2, [{}] * 2, Budget(2.0, 0.02), seed=seed)
        ratio = timing.ratio(*samples.rounds)
        held += ratio.low <= 1 <= ratio.high
    assert held >= 93


def test_no_model_is_always_the_first_to_be_warmed_up(clock):
    first: list[int] = []

    class Numbered(Clocked):
        def __init__(self, number):
            super().__init__(clock, 1e-3)
            self.number = number

        def prepared(self, feed):
            first.append(self.number)
            return feed

    openers = [lambda number=number: Numbered(number) for number in range(3)]
    timing.interleaved(openers, [{}] * 3, Budget(1.0))
    assert set(first[::3]) == {0, 1, 2}


def test_slow_models_get_few_calls_and_still_an_interval(clock):
    samples = interleaved([10.0, 11.0], clock, Budget(1.0))
    assert [len(one) for one in samples.rounds[0]] == [1] * timing.MIN_ROUNDS
    ratio = timing.ratio(*samples.rounds)
    assert (ratio.low, ratio.high) == pytest.approx((1.1, 1.1))


def test_fast_models_are_called_several_times_for_one_sample(clock):
    model = Clocked(clock, 1e-6)
    samples = timing.interleaved([lambda: model], [{}], Budget(0.1), reopen=False)
    assert model.calls > 100 * sum(len(one) for one in samples.rounds[0])
    assert samples.rounds[0][0] == pytest.approx(1e-3)  # milliseconds of one call


def test_it_ends_when_intervals_are_narrow_and_not_before(clock):
    generator = np.random.default_rng(0)

    def noisy():
        return 1e-3 * float(np.exp(generator.normal(0, 0.2)))

    coarse = interleaved([noisy, noisy], clock, Budget(60.0, 0.1))
    fine = interleaved([noisy, noisy], clock, Budget(60.0, 0.03))
    assert len(coarse.rounds[0]) < len(fine.rounds[0]) < timing.MAX_ROUNDS
    for samples, precision in ((coarse, 0.1), (fine, 0.03)):
        ratio = timing.ratio(*samples.rounds)
        assert (ratio.high - ratio.low) / ratio.median < precision
    constant = interleaved([1e-3, 1e-3], clock, Budget(60.0, 0.02))
    assert len(constant.rounds[0]) == timing.ENOUGH_ROUNDS


def test_two_models_are_timed_for_as_long_as_asked_and_longer_if_it_is_noisy(clock):
    generator = np.random.default_rng(0)

    def noisy():
        return 1e-3 * float(np.exp(generator.normal(0, 0.9)))

    def seconds(cost):
        begin = clock[0]
        openers = (lambda: Clocked(clock, cost), lambda: Clocked(clock, cost))
        timing.interleaved_latency(openers, {}, 2.0)
        return clock[0] - begin

    assert 2.0 < seconds(1e-3) < 2.5
    assert 8.0 < seconds(noisy) < 10.0


def test_what_slows_the_machine_down_for_a_while_does_not_count(clock):
    """One round in four is three times as slow, for both."""
    state = {"calls": 0}

    def cost(base):
        state["calls"] += 1
        return base * (3 if state["calls"] // 100 % 4 == 0 else 1)

    samples = interleaved([lambda: cost(1e-3), lambda: cost(1.5e-3)], clock, Budget(5.0))
    ratio = timing.ratio(*samples.rounds)
    assert ratio.median == pytest.approx(1.5, rel=1e-3)


def test_a_feed_is_prepared_before_the_clock_runs():
    class Cutting(Runner):
        inputs = outputs = ()

        def __init__(self) -> None:
            self.seen: set[int] = set()

        def prepared(self, feed):
            return {"x": feed["x"][:2]}

        def run(self, feed):
            self.seen.add(len(feed["x"]))
            return []

    sides = Cutting(), Cutting()
    feed = {"x": np.zeros(5)}
    timing.interleaved_latency((lambda: sides[0], lambda: sides[1]), feed, 0.0, False)
    assert sides[0].seen == sides[1].seen == {2}


def test_state_is_reset_before_every_sample(clock):
    class Stateful(Clocked):
        fresh = False

        def reset(self):
            self.fresh = True

        def run(self, feed):
            assert self.fresh
            self.fresh = False
            return super().run(feed)

    model = Stateful(clock, 1e-3)
    timing.WARM_UP_CALLS, warm = 1, timing.WARM_UP_CALLS
    try:
        timing.interleaved([lambda: model], [{}], Budget(0.1), reopen=False)
    finally:
        timing.WARM_UP_CALLS = warm


# Statistics


@pytest.mark.parametrize("n", [6, 7, 10])
def test_the_distribution_is_that_of_all_signs(n):
    signs = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    sums = signs @ np.arange(1, n + 1)
    chances = np.bincount(sums, minlength=n * (n + 1) // 2 + 1) / 2**n
    np.testing.assert_allclose(ranks._signed_ranks(n), np.cumsum(chances), atol=1e-12)


def test_the_interval_is_what_the_test_does_not_reject():
    """Its ends are the last centres that Wilcoxon's signed-rank test leaves standing."""
    values = np.random.default_rng(1).normal(0.3, 1, 12)

    def rejected(centre):
        places = np.argsort(np.argsort(np.abs(values - centre))) + 1
        positive = int(places[values > centre].sum())
        least = min(positive, 78 - positive)
        return ranks._signed_ranks(12)[least] <= (1 - timing.CONFIDENCE) / 2

    _, low, high = ranks.signed_rank(values, timing.CONFIDENCE)
    assert rejected(low - 1e-9) and rejected(high + 1e-9)
    assert not rejected(low + 1e-9) and not rejected(high - 1e-9)


NOISES = {
    "normal": lambda g, n: g.normal(0, 0.01, n),
    "wide": lambda g, n: g.normal(0, 0.05, n),
    "heavy tails": lambda g, n: 0.005 * g.standard_cauchy(n),
    "now and then a busy core": lambda g, n: (
        g.choice([-0.3, 0, 0, 0, 0.3], n) + g.normal(0, 3e-3, n)
    ),
    "rounds that are not alike": lambda g, n: g.normal(0, 1, n) * g.choice([2e-3, 5e-2], n),
}


@pytest.mark.parametrize("noise", NOISES)
def test_the_interval_holds_the_ratio_though_it_stops_when_narrow(noise):
    """Of 1,000 measurements at least 940 intervals hold the truth; 950 are promised."""
    generator, held = np.random.default_rng(7), 0
    for _ in range(1000):
        values, rounds = NOISES[noise](generator, 60), timing.ENOUGH_ROUNDS
        while True:
            _, low, high = ranks.signed_rank(values[:rounds], timing.CONFIDENCE)
            if np.exp(high) - np.exp(low) < 0.02 or rounds == 60:
                break
            rounds = min(int(rounds * timing._LONGER) + 1, 60)
        held += low <= 0 <= high
    assert held >= 940


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system knows no affinity")
def test_threads_are_kept_on_as_many_cores_and_set_free_again():
    before = os.sched_getaffinity(0)
    with timing.pinned(1) as cores:
        during = os.sched_getaffinity(0)
    assert os.sched_getaffinity(0) == before
    assert during == (set(cores) if len(before) > 1 else before)
    assert len(during) == 1
    with timing.pinned(len(before)) as cores:
        assert os.sched_getaffinity(0) == before and cores == ()
