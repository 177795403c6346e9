"""What can be timed: a case holds inputs, rival implementations and the check that comes before any time.

Each folder with an operation offers `bench.py` with a function `(*, device, quick) -> list[Case]`, and one line in
`whimbrel.bench.CASES` names it. This module imports nothing heavy, so any folder may import it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Param = str | int | float | bool
Figures = Mapping[str, tuple[float | Sequence[float], str]]
"""Metric -> (value or values, unit) of one run of an implementation that measures itself."""
SetUp = Callable[[], Callable[[], object]]
"""Makes inputs and returns the call to time."""


class Rival(NamedTuple):
    """Somebody else's implementation, which may be missing or broken where this one runs."""

    set_up: SetUp
    check: Callable[[], str]
    """Runs before it is timed; an error leaves it out, and what it returns, if not "", is said beside its time."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one operation, with the implementations that are timed against each other."""

    name: str
    """Name of the results file, for example "rdn"; all shapes of one operation share it."""

    params: Mapping[str, Param]
    """Shape and options, as they stand in the result line: {"T": 4096, "H": 4, "dtype": "float32"}."""

    impls: Mapping[str, SetUp] = field(default_factory=dict)
    """Implementation name -> set-up. The first is the one that ratios are taken against unless the caller names
    another."""

    check: Callable[[], None]
    """Raises AssertionError unless all implementations agree; runs before anything is timed."""

    rivals: Mapping[str, Rival] = field(default_factory=dict)
    """Further implementations by name. One that is not installed, fails or is wrong is named aloud and left out."""

    metric: Literal["forward", "forward+backward", "step", "time", "time_select", "throughput"] = "forward"
    """What one call does; "time" or "throughput" where the case's name says it, "time_select" for a part of it."""

    unit: Literal["s", "ms", "us"] = "ms"
    """Unit of the recorded times."""

    tokens: int | None = None
    """Tokens that one call handles: lines then hold tokens a second in place of times."""

    flops: float | None = None
    """Floating-point operations of one call (useful ones only), to state the rate reached."""

    bytes: float | None = None
    """Bytes that one call must read and write at least, to state the rate reached."""

    figures: Mapping[str, Callable[[], Figures]] = field(default_factory=dict)
    """Implementations that measure themselves, such as programs in processes of their own, by name: each call is one
    run. They take the place of `impls`, alternate like these, and are left out when they raise UnsupportedError."""

    rounds: int = 3
    """Runs of each of `figures`."""

    apart: Mapping[str, Mapping[str, Param]] = field(default_factory=dict)
    """Implementation name -> params that stand in its lines alone, such as what its figures were scaled from."""

    sizes: Mapping[str, Callable[[], int]] = field(default_factory=dict)
    """Implementation name -> bytes it holds between two calls, for example optimizer state."""
