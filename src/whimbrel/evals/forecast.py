"""What annealing would give, from a run at a constant rate: raw and averaged losses along it, and what they say.

Averages of checkpoints come close to a short anneal from the same point (arXiv 2505.12082, figure 3; 2507.17634).
Where their gain over the raw checkpoints shrinks the rate is already low; where it is negative the window reaches back
into weights that the run has left behind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from whimbrel.checkpoint import load_weights, read_meta
from whimbrel.config import MergeConfig, require
from whimbrel.errors import CheckpointError
from whimbrel.evals.bpb import BpbResult, compare_bpb
from whimbrel.merge.config import merge_config
from whimbrel.merge.drift import LEAST, Drift, fit_drift, gram
from whimbrel.merge.online import OnlineAverage

Evaluate = Callable[[nn.Module], BpbResult]
LIMITS = (
    "The forecast stands for a short anneal from the same point: a run at 120 B parameters found averages close to "
    "decays over up to about 500 B tokens, and no gain over decays of 1 T tokens and more (arXiv 2604.12374). "
    "It holds for checkpoints of one run at a constant rate. All windows are shown, since the best of several is "
    "better than it will prove to be. Distances between weights take all directions for alike, the loss does not."
)
# Correlation of the noise from which a neighbour adds little to an average.
_ALIKE = 0.5


def forecast(
    model: nn.Module,
    checkpoints: Sequence[str | Path],
    evaluate: Evaluate,
    *,
    counts: Sequence[int] = (3, 6, 10),
    points: int = 6,
    method: str | MergeConfig = "sma",
    share: float = 0.01,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Raw and averaged losses at up to `points` places of a run, and the drift and noise between its checkpoints.

    model: of the checkpoints' shapes; its weights are overwritten. checkpoints: step folders at equal distances, oldest
    first, from the constant stretch of the rate. evaluate: gives the held-out loss of a model, on the same text at
    each call. counts: sizes of the windows that are compared; one that reaches beyond the first checkpoint is left
    out at that place. share: of the weights' elements that distances are taken over. progress: called with the name of
    each model before it is evaluated.

    Returns plain data as `whimbrel.report.schema.Forecast` describes it. Raises ConfigError for fewer than two
    checkpoints or none that fits a window, CheckpointError for distances that are not equal.
    """
    paths = [Path(path) for path in checkpoints]
    counts = sorted({count for count in counts if 2 <= count <= len(paths)})
    allowed = f"sizes from 2 to {len(paths)}, the number of checkpoints"
    require(bool(counts), "counts", [], allowed)
    require(points >= 1, "points", points, "at least 1")
    config = merge_config(method)
    tokens = [read_meta(path).tokens for path in paths]
    interval = _interval(paths, tokens)
    blocks = 0
    raw: list[dict[str, Any]] = []
    gains: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for end in _places(len(paths), counts[0], points):
        progress(paths[end].name)
        load_weights(paths[end], model)
        last = evaluate(model)
        blocks = len(last.block_nats)
        require(blocks > 1, "blocks of held-out text", blocks, "more text, at least two windows of the trained length")
        raw.append({"tokens": tokens[end], "loss": last.nats_per_token})
        for count in counts:
            if count > end + 1:
                continue
            progress(f"{count} up to {paths[end].name}")
            merged = evaluate_average(model, paths[end + 1 - count : end + 1], config, evaluate)
            difference = compare_bpb(merged, last)._asdict()
            gains[count].append({"tokens": tokens[end], "loss": merged.nats_per_token, "difference": difference})
    result: dict[str, Any] = {
        "method": type(config).__name__.removesuffix("Config"),
        "interval_tokens": interval,
        "raw": raw,
        "windows": [{"count": count, "points": gains[count]} for count in counts],
        "blocks": blocks,
        "confidence": 0.95,
        "limits": LIMITS,
    }
    drift = fit_drift(gram(paths[-max(2 * counts[-1], LEAST) :], share=share)) if len(paths) >= LEAST else None
    if drift is not None:
        result["statistics"] = _statistics(drift, config, counts)
    return result | {"advice": _advice(result, drift, config, most=len(paths))}


def _interval(paths: Sequence[Path], tokens: Sequence[int]) -> int:
    """Tokens between neighbours, which must be the same all along."""
    gaps = [after - before for before, after in itertools.pairwise(tokens)]
    for path, gap in zip(paths[1:], gaps, strict=True):
        if gap != gaps[0]:
            raise CheckpointError(
                f"{path} lies {gap:,} tokens after the checkpoint before it, others {gaps[0]:,}; "
                "forecast over checkpoints at equal distances"
            )
    return gaps[0]


def _places(checkpoints: int, smallest: int, points: int) -> list[int]:
    """Indices of checkpoints at equal distances, the last among them, from the first that has a window behind it."""
    first, last = smallest - 1, checkpoints - 1
    points = min(points, last - first + 1)
    return sorted({last - round(i * (last - first) / max(points - 1, 1)) for i in range(points)})


def evaluate_average(model: nn.Module, paths: Sequence[Path], config: MergeConfig, evaluate: Evaluate) -> BpbResult:
    """The evaluation of the average of checkpoints, oldest first; `model` is left with its weights."""
    average = OnlineAverage(model, count=len(paths), method=config)
    for number, path in enumerate(paths):
        load_weights(path, model)
        average.update(number)
    average.swap_in()
    return evaluate(model)


def _statistics(drift: Drift, config: MergeConfig, counts: Sequence[int]) -> dict[str, Any]:
    return {
        "drift": drift.step,
        "noise": drift.noise,
        "correlation": drift.correlation,
        "windows": [
            {
                "count": count,
                "noise_left": drift.noise_left(config.weights(count)),
                # Without noise there is nothing that an average could mend.
                "error": min(drift.error(config.weights(count)), 1e9),
            }
            for count in counts
        ],
    }


def _advice(result: dict[str, Any], drift: Drift | None, config: MergeConfig, *, most: int) -> list[str]:
    """Sentences on what the losses and the distances say about window and interval."""
    return [*_advice_of_losses(result), *(_advice_of_distances(drift, config, most) if drift is not None else [])]


def _advice_of_losses(result: dict[str, Any]) -> list[str]:
    windows = [window for window in result["windows"] if window["points"]]
    ends = {window["count"]: window["points"][-1]["difference"] for window in windows}
    best = min(ends, key=lambda count: ends[count]["value"])
    gain = ends[best]
    found = []
    points = next(window["points"] for window in windows if window["count"] == best)
    if gain["high"] < 0:
        found.append(
            f"At the last checkpoint the window of {best} is lowest, {-gain['value']:.4f} nats per token below it: "
            f"forecast of a short anneal {points[-1]['loss']:.4f}."
        )
    elif gain["low"] > 0:
        found.append(
            "At the last checkpoint every window is above it: average fewer checkpoints or closer ones, or wait until "
            "the run moves more slowly."
        )
    else:
        found.append("At the last checkpoint no window can be told apart from it: nothing is forecast.")
    for window in windows:
        harmed = [point["tokens"] for point in window["points"] if point["difference"]["low"] > 0]
        if harmed:
            found.append(
                f"The window of {window['count']} is above the raw checkpoint up to {max(harmed):,} tokens: it reaches "
                "back into weights that the run had left behind."
            )
    gains = [point["difference"]["value"] for point in points]
    if len(gains) >= 3 and gains[-1] > 0.5 * min(gains) and min(gains) < 0:
        found.append("The gain is shrinking: the learning rate may have begun to fall, or the noise with it.")
    return found


def _advice_of_distances(drift: Drift, config: MergeConfig, most: int) -> list[str]:
    if not drift.noise:
        return [
            "The checkpoints drift without noise that an average could remove: they are too close, or the rate low."
        ]
    if drift.is_walk:
        return [
            "Over these checkpoints the weights move as in a random walk, whose distances do not tell noise that an "
            "average removes from progress that it holds back: go by the losses."
        ]
    found = []
    if drift.correlation > _ALIKE:
        times = math.ceil(math.log(_ALIKE) / math.log(drift.correlation))
        found.append(
            f"Neighbouring checkpoints share {drift.correlation:.0%} of their noise: an interval {times} times as long "
            "would leave half of it, and as few checkpoints would average as well."
        )
    errors = {count: drift.error(config.weights(count)) for count in range(1, max(most, 10) + 1)}
    best = min(errors, key=lambda count: errors[count])
    if best == 1:
        found.append(
            f"Drift over one interval is {drift.step / drift.noise:.1f} times the noise: the run moves too fast for an "
            "average at this interval; take closer checkpoints, or weigh the newer ones more (wma)."
        )
    else:
        found.append(
            f"By distances alone a window of {best} balances drift and noise best, leaving {errors[best]:.0%} of one "
            "checkpoint's squared noise."
        )
    return found
