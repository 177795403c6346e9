"""Benchmark cases of sparse prefill: time, density, achieved recall and error, beside dense attention and rivals.

For each input and length: dense attention; and for each coverage the selectors with their attention, selection alone,
what they kept, and what a prompt in chunks takes. `benchmarks/README.md` says what the lines hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from whimbrel.attend.dense import dense_attention
from whimbrel.attend.op import attend
from whimbrel.attend.plan import Plan
from whimbrel.attend.rivals import DENSE
from whimbrel.attend.shapes import default_scale
from whimbrel.bench.case import Case, Figures, Rival
from whimbrel.sparse import rivals
from whimbrel.sparse.apply import Out, Selector, apply_selector
from whimbrel.sparse.blocks import heads_first, per_key_head
from whimbrel.sparse.coverage import coverage as achieved
from whimbrel.sparse.crossover import sparse_from
from whimbrel.sparse.flex_prefill.config import FlexPrefillConfig
from whimbrel.sparse.row_local.config import RowLocalConfig
from whimbrel.testing.budget import assert_close, rms_ratio
from whimbrel.testing.heads import Heads, fading, mixed, structured

COVERAGES = (0.9, 0.95)
CURVE = (0.7, 0.8, 0.9, 0.95, 0.98)
"""Coverages of a curve of recall against density."""
THRESHOLDS = (0.18, 0.05, 0.015, 0.005)
"""Of FlashPrefill V1; the first is its authors' for Llama."""
LEAST_THRESHOLD = 1e-5
"""Below which no threshold of equal error is looked for."""
LEAST_COVERAGE = 0.3
"""Below which no coverage of equal recall is looked for."""
AS_SERVED = "row_local, dense where short"
AT_THEIR_RECALL = "row_local, equal recall"
"""Asked for as little as keeps what the authors' FlexPrefill keeps at the coverage of the line."""
CHUNK = 8192
"""Tokens of a chunk, where a prompt comes in chunks."""
FADING = {"fading, 10 %": 0.1, "fading, 5 %": 0.05}
"""Input -> share of the causal pairs that holds 95 % of the attention: what is gained where little is needed."""
WIDE = "mixed, heads of 256"
"""`mixed` with 16 heads of 256 on 8 key heads."""
CUDA_LENGTHS = (8192, 16_384, 32_768, 65_536, 131_072)
CROSSOVER = {
    128: {
        (32, 8): (8192, 12_288, 16_384),
        (16, 4): (12_288, 16_384, 24_576),
        (8, 2): (16_384, 24_576, 32_768),
        (4, 1): (24_576, 32_768, 49_152),
        (2, 1): (32_768, 49_152, 65_536),
        (1, 1): (49_152, 65_536, 98_304),
    },
    64: {
        (32, 8): (12_288, 16_384, 24_576),
        (14, 2): (16_384, 24_576, 32_768),
        (8, 2): (24_576, 32_768, 49_152),
        (2, 1): (49_152, 65_536, 98_304),
    },
    80: {(32, 8): (16_384, 32_768, 65_536)},
    96: {(32, 8): (16_384, 24_576, 32_768, 65_536), (8, 2): (24_576, 32_768, 65_536)},
    256: {
        (16, 8): (8192, 12_288, 16_384),
        (8, 4): (12_288, 16_384, 24_576),
        (4, 1): (16_384, 24_576, 32_768),
        (1, 1): (32_768, 49_152, 65_536),
    },
}
"""Elements of a head -> query heads and key heads -> lengths about which selecting begins to pay."""
LATE_CROSSOVER = {128: {(32, 8): (32_768, 65_536)}}
"""The same for `flex_prefill`."""
SHORT_LENGTHS = (2048, 4096)
"""At which dense attention is the faster one everywhere, and what matters is what it takes to say so."""
CAPTURED = Path("runs/smollm2/heads.safetensors")
"""Where `benchmarks/smollm2.py capture` leaves queries, keys and values of a real model, below the working directory:
tensors "LENGTH.LAYER.q", "k" and "v". Where it is, its layers are the input `smollm2`."""
AUDITED_ROWS = 256
"""Queries on which recall and error are measured. They are drawn at random: evenly spaced ones could be those that a
selector samples too."""


class Problem(NamedTuple):
    """One input. On CUDA in bf16 and with kernels, elsewhere small, in fp32."""

    kind: str
    length: int
    device: str
    layer: int | None = None
    """Of the model whose heads were captured."""
    given: tuple[int, int, int] | None = None
    """Query heads, key heads and elements of a head of `mixed`, in place of the usual ones."""

    def inputs(self) -> Heads:
        """q, k and v, the same at each call."""
        return _made(self)

    @property
    def params(self) -> dict[str, str | int]:
        """As they stand in result lines; G counts key heads."""
        heads, kv_heads, dim = self.sizes()
        sizes = {"N": self.length, "input": self.kind, "H": heads, "G": kv_heads, "D": dim, "batch": 1}
        return sizes if self.layer is None else sizes | {"layer": self.layer}

    def selectors(self, share: float) -> dict[str, Selector]:
        """Implementation name -> selector that keeps `share` of the attention."""
        local = RowLocalConfig(coverage=share, impl="triton" if self.on_gpu else "torch")
        return {
            "row_local": local.build(),
            "row_local-16": replace(local, probe_rows=16).build(),
            "flex_prefill": FlexPrefillConfig(coverage=share).build(),
        }

    @property
    def on_gpu(self) -> bool:
        """Whether kernels are to run."""
        return self.device == "cuda"

    @property
    def impl(self) -> str:
        """What attends over a plan."""
        return "triton" if self.on_gpu else "blocks"

    def sizes(self) -> tuple[int, int, int]:
        """Query heads, key heads, elements of a head."""
        if self.given is not None:
            return self.given
        if self.layer is not None:
            (_, _, heads, dim), kv_heads = (self._captured("q").shape, self._captured("k").shape[2])
            return heads, kv_heads, dim
        if self.kind == "structured":
            return 4, 4, 128 if self.on_gpu else 64
        if self.kind == WIDE:
            return 16, 8, 256
        return (32, 8, 128) if self.on_gpu else (4, 2, 64)

    def _captured(self, name: str) -> Tensor:
        with safe_open(CAPTURED, "pt") as file:
            return file.get_tensor(f"{self.length}.{self.layer}.{name}")

    def make(self) -> Heads:
        """q, k and v, made anew."""
        heads, kv_heads, dim = self.sizes()
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        if self.layer is not None:
            made = [self._captured(name).to(dtype) for name in ("q", "k", "v")]
        elif self.kind == "structured":
            made = structured(self.length, tokens=self.length, dim=dim, dtype=dtype)
        else:
            sizes = {"tokens": self.length, "heads": heads, "kv_heads": kv_heads, "dim": dim}
            share = FADING.get(self.kind)
            maker = mixed if share is None else partial(fading, share=share)
            made = maker(self.length, **sizes, dtype=dtype, device=self.device)
        return Heads(*(x.to(self.device) for x in made))


@lru_cache(maxsize=1)
def _made(problem: Problem) -> Heads:
    return problem.make()


def captured(device: str) -> list[Problem]:
    """The layers in CAPTURED, shortest prompt first; none where there is no such file."""
    if not CAPTURED.exists():
        return []
    with safe_open(CAPTURED, "pt") as file:
        found = sorted({tuple(map(int, name.split(".")[:2])) for name in file.keys()})  # noqa: SIM118
    return [Problem("smollm2", length, device, layer) for length, layer in found]


class Kept(NamedTuple):
    """What a selector keeps of one head."""

    params: dict[str, str | int | float]
    """As in result lines, with the head."""
    selector: str
    density: float
    recall_min: float
    recall_p5: float
    recall_mean: float
    covered: float
    """Share of the audited queries that keep what was asked for."""


def coverage_rows(*, device: str, quick: bool = False, share: float = 0.95) -> Iterator[Kept]:
    """For every input, layer and head: what each selector keeps of the attention when asked for `share`."""
    length = 512 if quick else 16_384
    problems = [Problem(kind, length, device) for kind in ("mixed", "structured")] + captured(device)
    for problem in problems:
        q, k, _ = problem.inputs()
        official = FlexPrefillConfig(coverage=share, mode="official").build()
        for name, selector in (problem.selectors(share) | {"flex_prefill-official": official}).items():
            plan = selector(q, k)
            recall = achieved(q, k, plan, rows=_audited(problem))[0].double()
            for head, (density, found) in enumerate(zip(plan.density()[0].tolist(), recall)):
                params = problem.params | {"coverage": share, "head": head}
                low, mean = float(found.min()), float(found.mean())
                covered = float((found >= share - 1e-5).double().mean())
                yield Kept(params, name, density, low, float(found.quantile(0.05)), mean, covered)


def cases(*, device: str, quick: bool = False) -> list[Case]:
    """Dense attention, selectors and rivals on the inputs `mixed`, `structured` and, where there is one, `smollm2`."""
    lengths = (512,) if quick and device != "cuda" else CUDA_LENGTHS[:1] if quick else CUDA_LENGTHS
    if device != "cuda" and not quick:
        lengths = (2048, 4096)
    found = []
    for kind in ("mixed", "structured"):
        for length in lengths:
            problem = Problem(kind, length, device)
            found.append(_dense(problem))
            if problem.on_gpu:
                found += [case for threshold in THRESHOLDS for case in _thresholded(problem, threshold)]
            for share in COVERAGES:
                found += _sparse(problem, share)
                found += _equal_error(problem, share) if problem.on_gpu else []
                found += [_in_chunks(problem, share)] if length > CHUNK else []
    if device == "cuda" and not quick:
        for problem in (Problem("mixed", length, device) for length in SHORT_LENGTHS):
            case = Case(name="prefill", params=problem.params | {"coverage": 0.95}, check=lambda: None, metric="time")
            found += [_dense(problem), replace(case, impls={AS_SERVED: partial(_as_served, problem, 0.95)})]
        further = [Problem(kind, length, device) for kind in FADING for length in (32_768, 131_072)]
        further += [Problem(WIDE, length, device) for length in (16_384, 32_768)]
        for problem in further:
            found += [_dense(problem), *_sparse(problem, 0.95)]
    for problem in captured(device):
        found.append(_dense(problem))
        for share in COVERAGES:
            found += _sparse(problem, share)
    return found


def crossover(*, device: str, quick: bool = False) -> list[Case]:
    """Sparse prefill beside dense attention about the lengths in `whimbrel.sparse.crossover`, by heads."""
    if device != "cuda":
        return [_beside_dense("row_local", Problem("mixed", 512, device, given=(2, 1, 64)))]
    found = [
        _beside_dense(name, Problem("mixed", length, device, given=(*heads, dim)))
        for name, dims in (("row_local", CROSSOVER), ("flex_prefill", LATE_CROSSOVER))
        for dim, shapes in dims.items()
        for heads, lengths in shapes.items()
        for length in lengths
    ]
    return found[: 1 if quick else None]


def _beside_dense(name: str, problem: Problem) -> Case:
    """One selector and the fastest dense attention, alternating."""
    selector = problem.selectors(0.95)[name]
    run = partial(apply_selector, selector=selector, impl=problem.impl)
    dense = DENSE["sdpa-cudnn"] if problem.on_gpu else dense_attention
    return Case(
        name="prefill_crossover",
        params=problem.params | {"coverage": 0.95},
        impls={name: partial(_call, problem, run)},
        check=partial(_check_one, problem, selector),
        rivals={"sdpa-cudnn" if problem.on_gpu else "sdpa": Rival(partial(_call, problem, dense), str)},
        metric="time",
    )


def curve(*, device: str, quick: bool = False) -> list[Case]:
    """What selectors keep by coverage, without times: `whimbrel bench whimbrel.sparse.prefill.bench:curve`."""
    problem = Problem("mixed", 512 if quick else 32_768 if device == "cuda" else 8192, device)
    found = [case for share in CURVE for case in _sparse(problem, share) if case.figures]
    for share in CURVE:
        official = FlexPrefillConfig(coverage=share, mode="official", tau=0.1, min_budget=1024).build()
        figures = {"flex_prefill, official mode": partial(_kept, problem, official)}
        params = problem.params | {"coverage": share}
        found.append(Case(name="prefill", params=params, figures=figures, check=lambda: None, rounds=1))
    if problem.on_gpu:
        found += [case for t in THRESHOLDS for case in _thresholded(problem, t) if case.figures]
    return found


def _dense(problem: Problem) -> Case:
    functions = DENSE if problem.on_gpu else {"sdpa": dense_attention}
    calls = {name: partial(_call, problem, function) for name, function in functions.items()}
    return Case(
        name="prefill",
        params=problem.params,
        impls={} if problem.on_gpu else calls,
        check=lambda: None,
        rivals={name: Rival(call, str) for name, call in calls.items()} if problem.on_gpu else {},
        metric="time",
    )


def _sparse(problem: Problem, share: float) -> list[Case]:
    params = problem.params | {"coverage": share}
    whole, chosen = {}, {}
    for name, selector in problem.selectors(share).items():
        whole[name] = partial(_call, problem, partial(apply_selector, selector=selector, impl=problem.impl))
        chosen[name] = partial(_select, problem, selector)
    if problem.on_gpu:
        whole[AS_SERVED] = partial(_as_served, problem, share)
    official = partial(rivals.flexprefill_official, coverage=share)
    on_plan = partial(_on_plan, problem, share)
    extra = {
        "flexprefill-official": _rival(problem, official),
        AT_THEIR_RECALL: Rival(partial(_at_their_recall, problem, share), partial(_say_coverage, problem, share)),
        "xattention": _rival(problem, partial(rivals.xattention, coverage=share)),
        "flex-attention": Rival(on_plan, partial(_check_plan, on_plan)),
    }
    figures = {name: partial(_kept, problem, selector) for name, selector in problem.selectors(share).items()}
    if problem.on_gpu:
        figures["flexprefill-official"] = partial(_kept_by_theirs, problem, official, _plan_of_flexprefill(share))
        figures[AT_THEIR_RECALL] = partial(_kept_at_their_recall, problem, share)
        theirs = partial(rivals.xattention, coverage=share), _plan_of_xattention(share)
        figures["xattention"] = partial(_kept_by_theirs, problem, *theirs)
    else:
        extra = {}
    case = partial(Case, name="prefill", params=params)
    return [
        case(impls=whole, check=partial(_check, problem, share), rivals=extra, metric="time"),
        case(impls=chosen, check=lambda: None, metric="time_select"),
        case(figures=figures, check=lambda: None, rounds=1),
    ]


def _as_served(problem: Problem, share: float) -> Callable[[], object]:
    """`row_local` as it is to be used: dense below the length from which selecting pays on this device."""
    selector = problem.selectors(share)["row_local"]
    heads, _, head_dim = problem.sizes()
    least = sparse_from(torch.device(problem.device), heads=heads, head_dim=head_dim)
    return _call(problem, partial(apply_selector, selector=selector, dense_below=least))


def _at_their_recall(problem: Problem, share: float) -> Callable[[], object]:
    selector = problem.selectors(equal_coverage(problem, share))["row_local"]
    return _call(problem, partial(apply_selector, selector=selector, impl=problem.impl))


def _say_coverage(problem: Problem, share: float) -> str:
    return f"asked for a coverage of {equal_coverage(problem, share):.3f}"


def _kept_at_their_recall(problem: Problem, share: float) -> Figures:
    asked = equal_coverage(problem, share)
    return {**_kept(problem, problem.selectors(asked)["row_local"]), "coverage_asked": (asked, "share")}


@cache
def equal_coverage(problem: Problem, share: float) -> float:
    """What `row_local` is to be asked for, to three digits, so that the 5th percentile of its queries keeps no less
    than that of the authors' FlexPrefill at `share`: by bisection."""
    wanted = _least_kept(problem, rivals.flexprefill_plan(*problem.inputs(), coverage=share))
    q, k, _ = problem.inputs()
    low, high = round(1000 * LEAST_COVERAGE), 1000
    while high - low > 1:
        middle = (low + high) // 2
        found = _least_kept(problem, problem.selectors(middle / 1000)["row_local"](q, k))
        low, high = (low, middle) if found >= wanted else (middle, high)
    return high / 1000


def _least_kept(problem: Problem, plan: Plan) -> float:
    """`recall_p5`."""
    q, k, _ = problem.inputs()
    return float(achieved(q, k, plan, rows=_audited(problem)).double().quantile(0.05))


def _thresholded(problem: Problem, threshold: float) -> list[Case]:
    """FlashPrefill promises no coverage: what it costs, keeps and errs by threshold."""
    function = partial(rivals.flashprefill_v1, threshold=threshold)
    plan = partial(rivals.flashprefill_plan, threshold=threshold)
    case = partial(Case, name="prefill", params=problem.params | {"threshold": threshold}, check=lambda: None)
    return [
        case(rivals={"flashprefill-v1": _rival(problem, function)}, metric="time"),
        case(figures={"flashprefill-v1": partial(_kept_by_theirs, problem, function, plan)}, rounds=1),
    ]


def _equal_error(problem: Problem, share: float) -> list[Case]:
    """FlashPrefill with the threshold at which its output errs as much as that of `row_local` at `share`."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rivals.flashprefill_v1(q, k, v, threshold=equal_threshold(problem, share))

    def kept() -> Figures:
        threshold = equal_threshold(problem, share)
        found = _kept_by_theirs(problem, run, partial(rivals.flashprefill_plan, threshold=threshold))
        return {**found, "threshold": (threshold, "share")}

    case = partial(Case, name="prefill", params=problem.params | {"coverage": share}, check=lambda: None)
    return [
        case(rivals={"flashprefill-v1, equal error": _rival(problem, run)}, metric="time"),
        case(figures={"flashprefill-v1, equal error": kept}, rounds=1),
    ]


@cache
def equal_threshold(problem: Problem, share: float) -> float:
    """FlashPrefill's threshold, to three digits, at which it errs no more than `row_local` at `share`: by bisection of
    its logarithm, without what it compiles."""
    q, k, v = problem.inputs()
    out = apply_selector(q, k, v, problem.selectors(share)["row_local"], impl=problem.impl)
    wanted = rms_ratio(_truth(problem), out.y[:, _audited(problem)])
    low, high = math.log(LEAST_THRESHOLD), math.log(THRESHOLDS[0])
    with torch.compiler.set_stance("force_eager"):
        for _ in range(8):
            middle = (low + high) / 2
            function = partial(rivals.flashprefill_v1, threshold=float(f"{math.exp(middle):.3g}"))
            low, high = (low, middle) if _error(problem, function) > wanted else (middle, high)
    return float(f"{math.exp(low):.3g}")


def _in_chunks(problem: Problem, share: float) -> Case:
    """A prompt in chunks, one after the other, beside the whole of it in one piece."""
    selector = problem.selectors(share)["row_local"]
    whole = partial(apply_selector, selector=selector, impl=problem.impl)
    return Case(
        name="prefill",
        params=problem.params | {"coverage": share},
        impls={
            "row_local, one piece": partial(_call, problem, whole),
            f"row_local, chunks of {CHUNK}": partial(_call, problem, partial(_chunk_by_chunk, problem, selector)),
        },
        check=partial(_check_chunks, problem, selector),
        metric="time",
    )


def _chunk_by_chunk(problem: Problem, selector: Selector, q: Tensor, k: Tensor, v: Tensor) -> list[Out]:
    """Every chunk's queries over all keys so far."""
    outs = []
    for start in range(0, problem.length, CHUNK):
        stop = min(start + CHUNK, problem.length)
        outs.append(apply_selector(q[:, start:stop], k[:, :stop], v[:, :stop], selector, impl=problem.impl))
    return outs


def _check_chunks(problem: Problem, selector: Selector) -> None:
    """Chunks select what the whole selects, block for block, and give what it gives."""
    q, k, v = problem.inputs()
    whole, at = apply_selector(q, k, v, selector, impl=problem.impl), 0
    mask = whole.plan.to_mask()
    for out in _chunk_by_chunk(problem, selector, q, k, v):
        part = out.plan.to_mask()
        rows = mask[:, :, at // 128 : at // 128 + part.shape[2]]
        other = (rows[..., : part.shape[3]] != part).sum() + rows[..., part.shape[3] :].sum()
        assert not other, f"{int(other)} blocks selected otherwise in the chunk of query {at}"
        want = whole.y[:, at : at + out.y.shape[1]]
        assert_close(f"chunk of query {at}", want, out.y, 6e-3 if problem.on_gpu else 1e-5)
        at += out.y.shape[1]


def _rival(problem: Problem, function: Callable[..., Tensor]) -> Rival:
    return Rival(partial(_call, problem, function), partial(_remark, problem, function))


def _call(problem: Problem, function: Callable[..., object]) -> Callable[[], object]:
    return partial(function, *problem.inputs())


def _select(problem: Problem, selector: Selector) -> Callable[[], object]:
    q, k, _ = problem.inputs()
    return partial(selector, q, k)


def _on_plan(problem: Problem, share: float) -> Callable[[], object]:
    """FlexAttention over the plan of `row_local`, which is given."""
    q, k, v = problem.inputs()
    return partial(attend, q, k, v, problem.selectors(share)["row_local"](q, k), impl="flex")


def _check_plan(set_up: Callable[[], Callable[[], object]]) -> str:
    set_up()()
    return "attention alone, over the plan of row_local"


def _check(problem: Problem, share: float) -> None:
    for selector in problem.selectors(share).values():
        _check_one(problem, selector)


def _check_one(problem: Problem, selector: Selector) -> None:
    """On the last queries, since the masked softmax of the reference needs memory for every pair."""
    q, k, v = problem.inputs()
    out = apply_selector(q[:, -64:], k, v, selector, impl=problem.impl)
    want = attend(q[:, -64:], k, v, out.plan, impl="reference").y.double()
    assert_close(f"prefill by {type(selector).__name__}", want, out.y, 6e-3 if problem.on_gpu else 1e-5)


def _kept(problem: Problem, selector: Selector) -> Figures:
    """What a selector keeps, over all heads and audited queries, and the error that this makes."""
    q, k, v = problem.inputs()
    out = apply_selector(q, k, v, selector, impl=problem.impl)
    return _recall(problem, out.plan, out.y)


def _kept_by_theirs(problem: Problem, attend_to: Callable[..., Tensor], plan: Callable[..., Plan]) -> Figures:
    """The same of somebody else's code, which is asked for its plan in a second call."""
    tensors = problem.inputs()
    return _recall(problem, plan(*tensors), attend_to(*tensors))


def _plan_of_flexprefill(share: float) -> Callable[..., Plan]:
    return partial(rivals.flexprefill_plan, coverage=share)


def _plan_of_xattention(share: float) -> Callable[..., Plan]:
    return lambda q, k, v: rivals.xattention_plan(q, k, coverage=share)


def _recall(problem: Problem, plan: Plan, y: Tensor) -> Figures:
    q, k, _ = problem.inputs()
    rows = _audited(problem)
    recall = achieved(q, k, plan, rows=rows).double()
    return {
        "density": (plan.mean_density(), "share"),
        "recall_mean": (float(recall.mean()), "share"),
        "recall_p5": (float(recall.quantile(0.05)), "share"),
        "recall_min": (float(recall.min()), "share"),
        "output_error": (rms_ratio(_truth(problem), y[:, rows]), "ratio"),
    }


def _error(problem: Problem, function: Callable[..., Tensor]) -> float:
    y = function(*problem.inputs())
    return rms_ratio(_truth(problem), y[:, _audited(problem)])


def _remark(problem: Problem, function: Callable[..., Tensor]) -> str:
    error = _error(problem, function)
    assert error < 0.5, f"output error {error:.3f} against dense attention"
    return f"output error {error:.3f} against dense attention"


def _audited(problem: Problem) -> Tensor:
    random = torch.Generator().manual_seed(problem.length)
    return torch.randperm(problem.length, generator=random)[:AUDITED_ROWS].sort().values.to(problem.device)


@cache
def _truth(problem: Problem) -> Tensor:
    """Dense attention of the audited queries in fp32, [1, R, H, D]."""
    q, k, v = problem.inputs()
    rows = _audited(problem)
    query, key, value = heads_first(q[:, rows]) * default_scale(q.shape[-1], None), heads_first(k), heads_first(v)
    parts = []
    for some, at in zip(query.split(16, 2), rows.split(16)):
        logits = per_key_head(some, key)
        logits.masked_fill_(torch.arange(problem.length, device=at.device) > at[:, None], -torch.inf)
        weights = logits.softmax(-1).flatten(1, 2).unflatten(1, (key.shape[1], -1))  # [B, Hkv, group * R, T]
        parts.append((weights @ value).unflatten(2, (-1, len(at))).flatten(1, 2))
    return torch.cat(parts, 2).transpose(1, 2)
