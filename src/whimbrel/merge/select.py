"""Which checkpoints of a run to average, said in tokens: a grid of points, the checkpoint nearest to each. No torch.

Interval and count by size of model are those that arXiv 2505.12082 found good in its experiments.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from whimbrel.checkpoint import dcp
from whimbrel.checkpoint.steps import META, read_meta
from whimbrel.config import require
from whimbrel.errors import CheckpointError, ConfigError

_STEP = re.compile(r"(?:step|checkpoint|ckpt|iter|global_step)[-_]?(\d+)$")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# Two learning rates that differ by less are the same one, printed with different digits.
_SAME_RATE = 1e-3


class Candidate(NamedTuple):
    """A checkpoint of a run."""

    path: Path
    step: int
    tokens: int
    """Training tokens seen."""


class Window(NamedTuple):
    """The checkpoints to average."""

    chosen: tuple[Candidate, ...]
    """Oldest first."""
    off: int
    """The largest distance of a checkpoint from its point of the grid, in tokens."""
    warnings: tuple[str, ...]
    """What may make this average worse than its newest checkpoint."""

    @property
    def paths(self) -> list[Path]:
        """Their folders."""
        return [candidate.path for candidate in self.chosen]


class Preset(NamedTuple):
    """Interval and count that the paper found good for a model of this size."""

    kind: Literal["dense", "moe"]
    parameters: float
    """All of them, not only those that are active for a token."""
    every: int
    count: int


PRESETS = (
    Preset("dense", 411e6, 2 * 10**9, 6),
    Preset("dense", 2e9, 5 * 10**9, 6),
    Preset("dense", 8e9, 15 * 10**9, 10),
    Preset("dense", 70e9, 40 * 10**9, 10),
    Preset("moe", 7e9, 4 * 10**9, 10),
    Preset("moe", 13e9, 8 * 10**9, 10),
    Preset("moe", 100e9, 80 * 10**9, 10),
)


def preset(kind: str, parameters: float) -> Preset:
    """The preset for the model size nearest to `parameters` (all of them, in proportion) of a dense or MoE model.

    Raises ConfigError for another `kind`, and where there are no parameters.
    """
    if kind not in ("dense", "moe"):
        raise ConfigError(f"merge.preset = '{kind}' is not known; use dense or moe")
    require(parameters > 0, "number of parameters", parameters, "a positive number")
    own = [row for row in PRESETS if row.kind == kind]
    return min(own, key=lambda row: abs(math.log(row.parameters / parameters)))


def parse_tokens(text: str, name: str) -> int:
    """A number of tokens as it is written: 8B, 1.6T, 500M, 4096. Raises ConfigError, naming `name`, for others."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([KMBT]?)", text.strip(), flags=re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{name} = '{text}' is no number of tokens; write 500M, 8B, 1.6T or 4096")
    tokens = round(float(match[1]) * _UNITS[match[2].upper()])
    require(tokens > 0, name, text, "a positive number of tokens")
    return tokens


def list_candidates(run: str | Path, *, tokens_per_step: int | None = None) -> list[Candidate]:
    """The checkpoints of a run folder with the tokens that each has seen, oldest first.

    A checkpoint is a folder whose name ends in its step (step-000200, checkpoint-500, iter_0001000, ...). Its tokens
    come from its meta.json or trainer_state.json, from the run's metrics.jsonl, or are step · `tokens_per_step`.
    """
    run = Path(run)
    if not run.is_dir():
        raise CheckpointError(f"{run} does not exist; name the folder of a run, which holds its checkpoints")
    record = _recorded_tokens(run)
    found = []
    for folder in run.iterdir():
        match = _STEP.search(folder.name)
        if match is None or folder.name.startswith(".") or not folder.is_dir() or not _holds_weights(folder):
            continue
        step = int(match[1])
        tokens = _tokens(folder, step, record, tokens_per_step)
        if tokens is None:
            raise ConfigError(
                f"{folder} does not say how many tokens it has seen; give tokens_per_step (--tokens-per-step), or put"
                f" lines with step and tokens into {run / 'metrics.jsonl'}"
            )
        found.append(Candidate(folder, step, tokens))
    if not found:
        raise CheckpointError(f"{run} holds no checkpoints; name the folder of a run, or checkpoints one by one")
    return sorted(found, key=lambda candidate: candidate.tokens)


def _holds_weights(folder: Path) -> bool:
    return (folder / dcp.METADATA).is_file() or any(
        any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin*")
    )


def position(path: str | Path, *, tokens_per_step: int | None = None) -> tuple[int | None, int | None]:
    """Steps done and tokens seen by a checkpoint, as far as it, its name, or the record of its run says so."""
    folder = Path(path).resolve()
    folder = folder if folder.is_dir() else folder.parent
    match = _STEP.search(folder.name)
    if (folder / META).is_file():
        step = read_meta(folder).step
    else:
        step = _trainer_state(folder).get("global_step", None if match is None else int(match[1]))
    if step is None:
        return None, None
    return step, _tokens(folder, step, _recorded_tokens(folder.parent), tokens_per_step)


def _tokens(folder: Path, step: int, record: dict[int, int], tokens_per_step: int | None) -> int | None:
    if tokens_per_step is not None:
        return step * tokens_per_step
    if (folder / META).is_file():
        return read_meta(folder).tokens
    state = _trainer_state(folder)
    return int(state.get("num_input_tokens_seen") or 0) or record.get(step)


def _trainer_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise CheckpointError(f"{folder / 'trainer_state.json'} is damaged: it is no JSON") from None


def _recorded_tokens(run: Path) -> dict[int, int]:
    """Tokens by step, from the run's metrics.jsonl."""
    return {int(line["step"]): int(line["tokens"]) for line in _record(run) if "tokens" in line}


def _record(run: Path) -> list[dict[str, Any]]:
    """The lines of the run's metrics.jsonl that have a step; what cannot be read is passed over."""
    file = run / "metrics.jsonl"
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def select_window(
    run: str | Path,
    *,
    every: int,
    count: int,
    end: int | None = None,
    tolerance: float = 0.1,
    tokens_per_step: int | None = None,
) -> Window:
    """The checkpoints of a run nearest to the tokens end, end - every, ..., end - (count - 1)·every.

    run: a run folder. every, end: tokens; `end` is the newest checkpoint's if left out. tolerance: how far a
    checkpoint may lie from its point, as a share of `every`.

    Raises ConfigError where a point has no checkpoint near it, or two points have the same.
    """
    candidates = list_candidates(run, tokens_per_step=tokens_per_step)
    return pick(candidates, every=every, count=count, end=end, tolerance=tolerance, rates=learning_rates(run))


def pick(
    candidates: Sequence[Candidate],
    *,
    every: int,
    count: int,
    end: int | None,
    tolerance: float,
    rates: Sequence[tuple[int, float]],
) -> Window:
    """As `select_window`, from a list of checkpoints and the rates that the run has used."""
    require(every >= 1, "merge.every", every, "a positive number of tokens")
    require(count >= 1, "merge.count", count, "a positive number of checkpoints")
    end = candidates[-1].tokens if end is None else end
    chosen: list[Candidate] = []
    off = 0
    for i in range(count):
        point = end - (count - 1 - i) * every
        if point < 0:
            raise ConfigError(
                f"{count} checkpoints {say_tokens(every)} tokens apart up to {say_tokens(end)} begin before the run "
                "did; choose a shorter interval, fewer of them or a later end"
            )
        best = min(candidates, key=lambda candidate: abs(candidate.tokens - point))
        distance = abs(best.tokens - point)
        if distance > tolerance * every:
            raise ConfigError(
                f"no checkpoint lies near {say_tokens(point)} tokens, point {i + 1} of {count}: the nearest,"
                f" {best.path}, has {say_tokens(best.tokens)}; choose another interval, count or end, or a"
                f" tolerance of more than {distance / every:.2g}"
            )
        if chosen and chosen[-1].path == best.path:
            raise ConfigError(
                f"two points of the grid fall on {best.path}; the interval of {say_tokens(every)} tokens is shorter"
                " than the distance between checkpoints, choose a longer one"
            )
        chosen.append(best)
        off = max(off, distance)
    return Window(tuple(chosen), off, tuple(_warnings(chosen, rates)))


def say_tokens(tokens: float) -> str:
    """A number of tokens in few digits: 8B, 1.6T."""
    for unit in ("T", "B", "M", "K"):
        if abs(tokens) >= _UNITS[unit]:
            return f"{tokens / _UNITS[unit]:.4g}{unit}"
    return f"{tokens:.0f}"


def learning_rates(run: str | Path) -> list[tuple[int, float]]:
    """The learning rates that a run has used: (step, rate), as far as it has recorded them, oldest first.

    They come from its metrics.jsonl, from the newest trainer_state.json, or from the schedule in its config.toml.
    """
    run = Path(run)
    rates = [(int(line["step"]), float(line["lr"])) for line in _record(run) if line.get("lr") is not None]
    if not rates:
        states = [_trainer_state(folder) for folder in run.iterdir() if _STEP.search(folder.name)]
        newest = max(states, key=lambda state: state.get("global_step", 0), default={})
        history = newest.get("log_history", [])
        rates = [(int(line["step"]), float(line["learning_rate"])) for line in history if "learning_rate" in line]
    return sorted(rates) or _planned_rates(run)


def _planned_rates(run: Path) -> list[tuple[int, float]]:
    """Corners of the schedule in config.toml: the ends of warm-up, of the constant rate, and of the decay."""
    try:
        config = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
        steps, schedule = int(config["steps"]), config["schedule"]
        warmup = int(schedule["warmup_steps"])
        decay = steps - warmup if schedule["kind"] == "cosine" else int(schedule["decay_steps"])
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError):
        return []
    corners = [(warmup, 1.0), (steps - decay, 1.0)]
    if warmup:
        corners.insert(0, (0, 0.0))
    return [*corners, (steps, 0.0)] if decay else corners


def _warnings(chosen: Sequence[Candidate], rates: Sequence[tuple[int, float]]) -> list[str]:
    if not rates:
        return []
    top = max(rate for _, rate in rates)
    full = [step for step, rate in rates if rate >= top * (1 - _SAME_RATE)]
    warm = [candidate for candidate in chosen if candidate.step < full[0] and rates[0][1] < top]
    fell = [step for step, rate in rates if step > full[-1] and rate < top * (1 - _SAME_RATE)]
    cold = [candidate for candidate in chosen if fell and candidate.step > full[-1]]
    found = []
    if warm:
        found.append(
            f"{len(warm)} of {len(chosen)} checkpoints lie in the warm-up, which ends at step {full[0]}; weights move"
            " fast there, and their average can be worse than the newest checkpoint: choose a shorter window"
        )
    if cold:
        found.append(
            f"{len(cold)} of {len(chosen)} checkpoints lie in the decay of the learning rate, which begins at step"
            f" {full[-1]}; an average adds little there and is not the forecast of annealing: end the window before it"
        )
    between = [rate for step, rate in rates if chosen[0].step <= step <= chosen[-1].step]
    if not warm and not cold and between and min(between) < max(between) * (1 - _SAME_RATE):
        found.append(
            f"the learning rate changes within the window, from {max(between):.3g} to {min(between):.3g}; averages are"
            " meant for a constant rate"
        )
    return found


def count_parameters(path: str | Path) -> int:
    """Elements of all weights of a checkpoint, from its headers."""
    from whimbrel.merge.sources import open_source

    return sum(math.prod(stored.shape) for stored in open_source(path).tensors.values())
