"""When a run leaves its range: robust bounds of log loss and gradient norm, and what to do about it. No torch.

The median and the median absolute deviation of the last normal steps set the bounds (1.4826 times that deviation is
the standard deviation of a normal distribution); logarithms make ratios of them. What to do rises with what is seen:
a line in the log, an update left out, and for a loss that stays up a return to an average of checkpoints
(arXiv 2505.12082, figure 7, which gives no rule for the detection). A collapse that creeps takes these bounds along
with it, so the lowest median of the run is a bound as well.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, Literal, NamedTuple

from whimbrel.config import SpikesConfig

Action = Literal["none", "log", "skip", "restart"]
_RUNGS: tuple[Action, ...] = ("none", "log", "skip", "restart")
# Least deviations that are believed: 1 % of the loss and 10 % of the gradient norm. A quiet stretch is no reason to
# call the next small wave a spike.
_FLOORS = {"loss": 0.01, "norm": 0.1}
# Normal steps in a row that end an episode.
_CALM = 5


class Verdict(NamedTuple):
    """What is to be done about one step, before its update."""

    action: Action
    """`none`: the step is normal. `log`: it is not, update all the same. `skip`: leave the update out. `restart`: go
    back to before `onset`."""
    onset: int
    """First abnormal step of the episode, or for a loss that crept up the step after its lowest median; -1 outside of
    one."""
    loss_score: float
    """Deviations of log loss above its median; 0 while there is nothing to compare with."""
    norm_score: float
    """The same for the gradient norm."""
    is_first: bool
    """Whether an episode begins with this step."""


class SpikeDetector:
    """Judges one optimizer step after another by its loss and gradient norm.

    Every process must be given the same two numbers, such as their maximum over processes; then all come to the same
    verdict.
    """

    def __init__(self, config: SpikesConfig | None = None) -> None:
        self.config = SpikesConfig() if config is None else config
        self._losses: deque[float] = deque(maxlen=self.config.window)
        self._norms: deque[float] = deque(maxlen=self.config.window)
        self._lowest, self._lowest_step = math.inf, -1
        self.begin_anew()

    def begin_anew(self) -> None:
        """End the episode, as after going back; what is normal is remembered."""
        self._onset = -1
        self._collapsed = self._skipped = self._calm = 0

    def check(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """The verdict on optimizer step `step` (from 1): mean loss in nats, norm of the gradient before clipping."""
        config = self.config
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        loss_score = _score(loss, self._losses, "loss")
        norm_score = _score(grad_norm, self._norms, "norm")
        bad_norm = not finite or norm_score > config.norm_threshold
        crept = finite and _log(loss) > self._lowest + math.log(config.creep)
        bad_loss = not finite or crept or loss_score > config.loss_threshold
        if not (bad_norm or bad_loss):
            self._see_normal(step, loss, grad_norm)
            return Verdict("none", self._onset, loss_score, norm_score, is_first=False)
        is_first = self._onset < 0
        if is_first:
            slowly = crept and loss_score <= config.loss_threshold
            self._onset = self._lowest_step + 1 if slowly else step
        self._calm = 0
        if not finite or crept or (bad_loss and _log(loss) > self._median(self._losses) + math.log(config.collapse)):
            self._collapsed += 1
        rung = self._rung(finite=finite, bad_norm=bad_norm)
        if rung == "skip":
            self._skipped += 1
        return Verdict(rung, self._onset, loss_score, norm_score, is_first)

    def _rung(self, *, finite: bool, bad_norm: bool) -> Action:
        allowed = _RUNGS.index(self.config.action) if self.config.action in _RUNGS else 0
        may_skip = self._skipped < self.config.max_skips
        # A batch that is not finite cannot be updated with: once no more may be left out, nothing heals it.
        if self._collapsed >= self.config.patience or (not finite and not may_skip):
            wanted = "restart"
        else:
            wanted = "skip" if bad_norm and may_skip else "log"
        if wanted == "restart" and allowed < _RUNGS.index("restart"):
            wanted = "log"
        return _RUNGS[min(_RUNGS.index(wanted), allowed)]

    def _see_normal(self, step: int, loss: float, grad_norm: float) -> None:
        self._losses.append(_log(loss))
        self._norms.append(_log(grad_norm))
        if 2 * len(self._losses) >= self.config.window and self._median(self._losses) <= self._lowest:
            self._lowest, self._lowest_step = self._median(self._losses), step
        self._calm += 1
        if self._onset >= 0 and self._calm >= _CALM:
            self.begin_anew()

    def _median(self, history: deque[float]) -> float:
        return statistics.median(history) if history else math.inf

    def state_dict(self) -> dict[str, Any]:
        """The state as plain data for JSON."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "episode": [self._onset, self._collapsed, self._skipped, self._calm],
            "lowest": [self._lowest if math.isfinite(self._lowest) else None, self._lowest_step],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; of a longer window only the newest steps are kept."""
        self._losses.clear()
        self._norms.clear()
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self._onset, self._collapsed, self._skipped, self._calm = state["episode"]
        lowest, self._lowest_step = state.get("lowest", (None, -1))  # not in states of older runs
        self._lowest = math.inf if lowest is None else lowest


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))


def _score(value: float, history: deque[float], kind: str) -> float:
    """Deviations above the median; infinite for a value that is not finite, 0 before half a window has been seen."""
    if not math.isfinite(value):
        return math.inf
    if 2 * len(history) < (history.maxlen or 0):
        return 0.0
    median = statistics.median(history)
    deviation = 1.4826 * statistics.median(abs(h - median) for h in history)
    return (_log(value) - median) / max(deviation, _FLOORS[kind])
