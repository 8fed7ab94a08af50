"""A benchmark as a value: what is measured side by side, and what is asked of it; and the rounds that measure it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked of one series: a figure, or a ratio to another series that is measured in the same rounds."""

    series: str
    bound: Literal["at least", "at most"]
    figure: float
    against: str | None = None

    def __str__(self) -> str:
        what = f"{self.bound} {self.figure:g}"
        return what if self.against is None else f"{what} x {self.against}"

    def met(self, value: float) -> bool:
        """Whether this figure or ratio is good enough."""
        return value >= self.figure if self.bound == "at least" else value <= self.figure


@dataclass(frozen=True, slots=True)
class Benchmark:
    """variants: what is measured in turn, each giving one figure, or several by the names of their series."""

    name: str
    title: str
    unit: str
    variants: Mapping[str, Callable[[], float | Mapping[str, float]]]
    goals: tuple[Goal, ...] = ()


@dataclass(slots=True)
class Result:
    """The figures of a benchmark: one for each round, by series."""

    benchmark: Benchmark
    series: dict[str, list[float]] = field(default_factory=dict)

    def ratios(self, goal: Goal) -> list[float]:
        """What a goal is about, round by round; empty where a series was not measured."""
        own = self.series.get(goal.series, [])
        if goal.against is None:
            return own
        other = self.series.get(goal.against, [])
        return [mine / theirs for mine, theirs in zip(own, other, strict=True) if theirs] if other else []

    def reached(self, goal: Goal) -> float | None:
        """The median of that."""
        ratios = self.ratios(goal)
        return median(ratios) if ratios else None


def measure(benchmark: Benchmark, rounds: int, say: Callable[[str], None]) -> Result:
    """Measure every variant once in each round, in turn. What a variant raises is an error of the benchmark."""
    result = Result(benchmark)
    for number in range(1, rounds + 1):
        for name, variant in benchmark.variants.items():
            found = variant()
            for series, value in ({name: found} if isinstance(found, float | int) else found).items():
                result.series.setdefault(series, []).append(float(value))
                say(f"{benchmark.name}, round {number}: {series}: {value:.4g} {benchmark.unit}")
    return result
