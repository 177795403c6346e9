"""What a report is made from: plain dictionaries, checked key by key before anything is drawn.

Every figure in the page comes from here; `write_report` computes sentences, axes and tables from it and adds
no number of its own. Optional sections that are left out leave no hole.
"""

# No `from __future__ import annotations` here: it would hide NotRequired from `__required_keys__`.
import math
import types
import typing
from typing import Any, NotRequired, TypedDict

from whimbrel.errors import DataError, nearest


class Header(TypedDict):
    """The first screen."""

    name: str
    """Title of the run."""
    summary: NotRequired[str]
    """One sentence; left out, it is computed from the sections."""
    date: str
    """ISO 8601 date or date and time."""
    hardware: str
    """Processor or GPU, threads, memory."""
    seconds: float
    """Wall time of everything reported, in seconds."""
    tokens: int
    """Tokens the main run was trained on."""
    parameters: int
    """Parameters of the model, tied ones once."""
    versions: dict[str, str]
    """Package name -> version."""
    commit: str
    """Short hash of the code, with "+" for uncommitted changes."""


class TrainPoint(TypedDict):
    """One logged optimizer step."""

    step: int
    tokens: int
    """Tokens seen since the start of the main run; a branch counts on from where it left that run."""
    loss: float
    """Training loss of the step, nats per token."""
    lr: float
    """Learning rate as handed to the optimizer."""
    grad_norm: NotRequired[float]
    """Norm of the gradient before clipping."""
    tokens_per_second: NotRequired[float]


class ValidationPoint(TypedDict):
    tokens: int
    loss: float
    """Validation loss, nats per token."""


class Run(TypedDict):
    name: str
    """For example "constant" or "annealed branch"."""
    points: list[TrainPoint]
    validation: NotRequired[list[ValidationPoint]]


class Training(TypedDict):
    runs: list[Run]
    """The main run first, then branches."""
    merged_tokens: NotRequired[list[int]]
    """Tokens at which the merged checkpoints were written."""
    note: NotRequired[str]
    """What else the training loss is of, as sentences."""


class Interval(TypedDict):
    value: float
    low: float
    high: float


class AveragingRow(TypedDict):
    name: str
    """"last checkpoint", "SMA", "WMA", "EMA", "annealed"."""
    kind: typing.Literal["last", "merge", "annealed"]
    loss: float
    """Validation loss, nats per token."""
    low: float
    high: float
    """Interval of the loss over validation blocks."""
    bits_per_byte: float
    weights: NotRequired[list[float]]
    """Weights of the merged checkpoints, oldest first; they sum to 1."""
    difference: NotRequired[Interval]
    """This loss minus the last checkpoint's over the same blocks (paired), nats per token; not for "last"."""


class Averaging(TypedDict):
    rows: list[AveragingRow]
    """Exactly one row is of kind "last"."""
    blocks: int
    """Validation blocks that were drawn from."""
    confidence: float
    """Of the intervals, for example 0.95."""


class GainPoint(TypedDict):
    """An averaged or annealed model at one place of a run."""

    tokens: int
    loss: float
    """Nats per token."""
    difference: Interval
    """This loss minus the raw checkpoint's over the same blocks (paired), nats per token."""


class ForecastWindow(TypedDict):
    count: int
    """Checkpoints in the average."""
    points: list[GainPoint]


class WindowSplit(TypedDict):
    count: int
    noise_left: float
    """Variance of the noise in the average, as a share of that in one checkpoint."""
    error: float
    """The same with the squared lag behind the drift."""


class DriftSplit(TypedDict):
    """What distances between neighbouring checkpoints say."""

    drift: float
    """Drift over one interval, relative to the length of the weights."""
    noise: float
    """Standard deviation of the noise, likewise."""
    correlation: float
    """Of the noise from one checkpoint to the next."""
    windows: list[WindowSplit]


class Forecast(TypedDict):
    """Averages along a run, as a forecast of annealing."""

    method: str
    """Of averaging, for example "SMA"."""
    interval_tokens: int
    """Between neighbouring checkpoints."""
    raw: list[ValidationPoint]
    windows: list[ForecastWindow]
    annealed: NotRequired[GainPoint]
    statistics: NotRequired[DriftSplit]
    advice: list[str]
    limits: str
    blocks: int
    confidence: float


class RecallPoint(TypedDict):
    x: int
    """Pairs (MQAR), or length of the context in tokens (needle)."""
    accuracy: float
    low: float
    high: float
    """Wilson interval."""
    n: int
    """Questions asked."""


class RecallSeries(TypedDict):
    name: str
    points: list[RecallPoint]


class DepthGrid(TypedDict):
    """Needle accuracy by length and depth for one model."""

    name: str
    lengths: list[int]
    """Tokens, one column each."""
    depths: list[float]
    """0 is the start of the context and 1 its end; one row each."""
    accuracy: list[list[float]]
    """One row per depth, one column per length."""
    n: int
    """Questions per cell."""


class RecallTask(TypedDict):
    chance: float
    """Accuracy of guessing."""
    series: list[RecallSeries]
    grids: NotRequired[list[DepthGrid]]


class Recall(TypedDict):
    mqar: NotRequired[RecallTask]
    needle: NotRequired[RecallTask]
    confidence: float
    """Of the Wilson intervals, for example 0.95."""
    trained_length: NotRequired[int]
    """Tokens per training sequence, marked in the needle figure."""


class LayerPrefill(TypedDict):
    layer: int
    density: float
    """Causal blocks read, as a share of all causal blocks; mean over heads."""
    coverage_asked: float
    coverage_achieved: float
    """Smallest attention mass of the selected blocks on the rows that were measured, as a share of 1."""


class Timing(TypedDict):
    seconds: float
    """Median."""
    q25: float
    q75: float
    n: int


class Prefill(TypedDict):
    """One selector on one prompt."""

    selector: str
    tokens: int
    """Length of the prompt."""
    layers: list[LayerPrefill]
    max_logit_difference: float
    """Largest absolute difference to dense prefill over all positions and tokens of the vocabulary."""
    top1_agreement: float
    """Share of positions with the same most likely next token as dense."""
    positions: int
    """Positions that were compared."""
    dense: NotRequired[Timing]
    sparse: NotRequired[Timing]
    """Prefill of the whole model."""


class PlanPicture(TypedDict):
    """The block plan of one head."""

    selector: str
    layer: int
    head: int
    block_size: int
    """Tokens per block side."""
    mask: list[list[int]]
    """1 where the query block (row) reads the key block (column), else 0."""


class Sample(TypedDict):
    prompt: str
    """End of the prompt."""
    text: str
    """What the model wrote."""
    prompt_tokens: int
    tokens: int
    """Tokens generated."""
    tokens_per_second: NotRequired[float]
    model: str
    """For example "SMA of 4 checkpoints"."""


class LongContext(TypedDict):
    prefill: NotRequired[list[Prefill]]
    plans: NotRequired[list[PlanPicture]]
    sample: NotRequired[Sample]


class MethodMemory(TypedDict):
    """Bytes held during a training step, activations apart."""

    method: str
    """"AdamW", "GaLore", "Fira"."""
    weights: int
    gradients: int
    optimizer_state: int


class LengthSeries(TypedDict):
    name: str
    """For example "hybrid (3 RDN : 1 softmax)"."""
    bytes: list[int]
    """Inference state of one sequence at each length."""


class StateByLength(TypedDict):
    lengths: list[int]
    """Tokens."""
    series: list[LengthSeries]
    """The model of this report first, then what it is compared with."""


class Memory(TypedDict):
    methods: NotRequired[list[MethodMemory]]
    """"AdamW" first: it is what the others are compared with."""
    used: NotRequired[str]
    """The method this run trained with."""
    by_length: NotRequired[StateByLength]


class Metric(TypedDict):
    name: str
    """"validation loss"."""
    unit: str
    """"bits per byte"; "share" is shown in per cent."""
    lower_is_better: bool
    chance: NotRequired[float]


class ComparisonRow(TypedDict):
    name: str
    values: dict[str, list[float | None]]
    """Metric name -> one value per seed; None where training diverged."""
    facts: NotRequired[dict[str, str | int | float]]
    """Column -> what was held equal or tuned: {"parameters": 3145728, "learning rate": 0.01}."""


class Comparison(TypedDict):
    title: str
    setting: str
    """What was equal and what was tuned, one sentence."""
    metrics: list[Metric]
    """The first decides the finding."""
    rows: list[ComparisonRow]
    """The method of this report first."""


class Configuration(TypedDict):
    toml: str
    """The resolved configuration."""
    commands: list[str]
    """Shell commands that repeat the run."""


class HeadRise(TypedDict):
    block: int
    head: int
    kind: str
    rise: float
    """Of the loss at the answers of key-value prompts without this head, nats."""


class HeadSink(TypedDict):
    block: int
    head: int
    share: float
    """Of its attention that goes to the first token."""


class LayerDynamics(TypedDict):
    block: int
    kind: str
    norms: list[float]
    """Root mean square of each head's states."""
    half_lives: list[float]
    """Tokens, by head."""
    clip_rate: NotRequired[float]


class Diagnostics(TypedDict):
    answer_loss: float
    """With all heads, nats."""
    heads: list[HeadRise]
    """Those that cost most first."""
    sinks: list[HeadSink]
    sink_rate: NotRequired[float]
    layers: list[LayerDynamics]


class Report(TypedDict):
    header: Header
    training: NotRequired[Training]
    averaging: NotRequired[Averaging]
    forecast: NotRequired[Forecast]
    memory: NotRequired[Memory]
    recall: NotRequired[Recall]
    diagnostics: NotRequired[Diagnostics]
    long_context: NotRequired[LongContext]
    comparisons: NotRequired[list[Comparison]]
    configuration: NotRequired[Configuration]


def check(data: object) -> Report:
    """`data` as a Report; raises DataError naming the first key that is missing, unknown or wrong."""
    _check(data, Report, "report")
    report = typing.cast(Report, data)
    _check_sizes(report)
    return report


def _check_sizes(report: Report) -> None:
    """What types cannot say: lists that must be as long as one another."""
    if "averaging" in report:
        last = sum(row["kind"] == "last" for row in report["averaging"]["rows"])
        if last != 1:
            raise DataError(f"report.averaging.rows must hold exactly one row of kind 'last', not {last}")
    by_length = report.get("memory", {}).get("by_length")
    if by_length:
        for i, series in enumerate(by_length["series"]):
            where = f"report.memory.by_length.series[{i}].bytes"
            _check_length(series["bytes"], len(by_length["lengths"]), where)
    recall = report.get("recall", {})
    for name, task in (("mqar", recall.get("mqar", {})), ("needle", recall.get("needle", {}))):
        for i, grid in enumerate(task.get("grids", [])):
            where = f"report.recall.{name}.grids[{i}].accuracy"
            _check_length(grid["accuracy"], len(grid["depths"]), where)
            for j, row in enumerate(grid["accuracy"]):
                _check_length(row, len(grid["lengths"]), f"{where}[{j}]")
    for i, plan in enumerate(report.get("long_context", {}).get("plans", [])):
        for j, row in enumerate(plan["mask"]):
            _check_length(row, len(plan["mask"][0]), f"report.long_context.plans[{i}].mask[{j}]")


def _check_length(found: list[Any], wanted: int, where: str) -> None:
    if len(found) != wanted:
        raise DataError(f"{where} has {len(found)} entries, want {wanted}")


def _check(value: object, wanted: Any, where: str) -> None:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (NotRequired, typing.Required):
        _check(value, arguments[0], where)
    elif typing.is_typeddict(wanted):
        _check_keys(value, wanted, where)
    elif origin is list:
        if not isinstance(value, list):
            raise DataError(f"{where} = {_short(value)} must be a list")
        for index, item in enumerate(value):
            _check(item, arguments[0], f"{where}[{index}]")
    elif origin is dict:
        if not isinstance(value, dict):
            raise DataError(f"{where} = {_short(value)} must be a dictionary")
        for key, item in value.items():
            _check(item, arguments[1], f"{where}[{key!r}]")
    elif origin is typing.Literal:
        if value not in arguments:
            raise DataError(f"{where} = {_short(value)} must be one of {', '.join(map(repr, arguments))}")
    elif origin is types.UnionType:
        if not any(_is(value, option) for option in arguments):
            names = " or ".join(getattr(option, "__name__", "None") for option in arguments)
            raise DataError(f"{where} = {_short(value)} must be {names}")
    elif not _is(value, wanted):
        raise DataError(f"{where} = {_short(value)} must be {_NAMES[wanted]}")


def _check_keys(value: object, wanted: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise DataError(f"{where} = {_short(value)} must be a dictionary")
    hints = typing.get_type_hints(wanted, include_extras=True)
    for key in value:
        if key not in hints:
            raise DataError(f"{where}.{key} is unknown: allowed are {', '.join(hints)}{nearest(str(key), hints)}")
    for key in hints:
        if key in value:
            _check(value[key], hints[key], f"{where}.{key}")
        elif key in wanted.__required_keys__:
            raise DataError(f"{where}.{key} is missing")


_NAMES = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}


def _is(value: object, wanted: type) -> bool:
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
