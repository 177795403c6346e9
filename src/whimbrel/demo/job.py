"""Train, anneal, average, judge, prefill, generate: each a stage with one figure, then a page."""

from __future__ import annotations

import datetime
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import whimbrel
from whimbrel.bench.results import commit, device_name
from whimbrel.checkpoint import list_checkpoints, read_meta
from whimbrel.config import Config, kind_of, to_toml
from whimbrel.data import TokenShards
from whimbrel.data.pipeline import shards_for
from whimbrel.data.shards import read_manifest
from whimbrel.demo import page
from whimbrel.demo.stages import Result, Stages, tell
from whimbrel.errors import ConfigError
from whimbrel.evals import BpbResult, compare_bpb, evaluate_bpb, run_evals
from whimbrel.evals.diagnostics import diagnose, plain
from whimbrel.infer import compare_prefill, generate, load_model, load_tokenizer
from whimbrel.infer.prefill import PrefillComparison, SparsePrefill
from whimbrel.merge import merge_checkpoints
from whimbrel.model import cache_bytes, set_prefill
from whimbrel.model.memory import parameter_counts
from whimbrel.report import write_report
from whimbrel.sparse.flex_prefill.config import FlexPrefillConfig
from whimbrel.training.loop import TrainResult, annealed, train
from whimbrel.training.metrics import read_metrics
from whimbrel.training.processes import pick_device

PREFILL_TOKENS = 4096
INSPECT_TOKENS = 512
PROMPT_TOKENS = 1024
NEW_TOKENS = 96


class Interrupted(Exception):
    """A signal ended a stage; what was done is saved."""


def run_demo(config: Config, run_dir: Path) -> Path | None:
    """Run every stage that has not been run with these settings, and write RUN_DIR/report.html.

    Returns the report's path, or None when a signal ended a stage early; the same call then goes on from there.
    Raises ConfigError for settings that leave nothing to compare, and what the stages raise.
    """
    _check(config)
    job = _Job(config, run_dir)
    try:
        return job.run()
    except Interrupted:
        return None


def _check(config: Config) -> None:
    averaging, every = config.averaging, config.checkpoint.every_steps
    if config.steps < averaging.last * every:
        raise ConfigError(
            f"averaging.last = {averaging.last} checkpoints every {every} steps reach back beyond steps = "
            f"{config.steps}; average fewer checkpoints or train longer"
        )
    if averaging.anneal_steps % every or averaging.anneal_steps >= config.steps:
        raise ConfigError(
            f"averaging.anneal_steps = {averaging.anneal_steps} must be below steps = {config.steps} and a "
            f"multiple of checkpoint.every_steps = {every}, since the branch starts from a checkpoint"
        )


class _Job:
    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.constant, self.branch = run_dir / "constant", run_dir / "annealed"
        self.device = pick_device(config.device)
        self.stages = Stages(run_dir / "stages", to_toml(config))

    def run(self) -> Path:
        config, stages = self.config, self.stages
        tell("demo", self._plan())
        stages.run("data", self._data, _say_data)
        training = stages.run("train", self._train, _say_train)
        if config.averaging.anneal_steps:
            stages.run("anneal", self._anneal, _say_train)
        merges = stages.run("merge", self._merge, _say_merge)
        averaging = stages.run("judge", lambda: self._judge(merges), _say_judge)
        tell("forecast", _say_forecast(averaging))
        recall = stages.run("recall", lambda: self._recall(merges), _say_recall)
        diagnostics = stages.run("inspect", lambda: self._inspect(merges), _say_inspect)
        prefill = stages.run("prefill", lambda: self._prefill(merges), _say_prefill)
        sample = stages.run("generate", lambda: self._generate(merges), _say_sample)
        report = page.build(
            config,
            header=self._header(training, sum(stages.seconds.values())),
            constant=read_metrics(self.constant),
            annealed=read_metrics(self.branch),
            merges=merges,
            averaging=averaging,
            recall=recall,
            diagnostics=diagnostics,
            prefill=prefill,
            sample=sample,
            commands=self._commands(),
        )
        tell("time", _say_time(stages.seconds))
        return write_report(report, self.run_dir / "report.html")

    def _plan(self) -> str:
        config, layers = self.config, [kind_of(layer) for layer in self.config.model.layers()]
        mixers = " and ".join(f"{layers.count(kind)} {kind}" for kind in dict.fromkeys(layers))
        return (
            f"trains a model of {mixers} blocks with {kind_of(config.optim).capitalize()} for {config.steps} steps "
            f"({self.device.type}, {torch.get_num_threads()} threads), averages its checkpoints, judges them and "
            "prefills sparsely; training takes most of the time"
        )

    def _data(self) -> Result:
        manifest = read_manifest(shards_for(self.config))
        splits = manifest["splits"]
        return {
            "sources": [f"{s['name']} {s['version']}" for s in manifest["sources"]],
            **{name: {k: splits[name][k] for k in ("documents", "tokens", "bytes")} for name in splits},
        }

    def _train(self) -> Result:
        return self._checked(train(self.config, run_dir=self.constant))

    def _anneal(self) -> Result:
        steps = self.config.steps - self.config.averaging.anneal_steps
        source = self.constant / f"step-{steps:06d}"
        return self._checked(train(annealed(self.config, from_step=steps), run_dir=self.branch, branch_from=source))

    def _checked(self, result: TrainResult) -> Result:
        if result.interrupted:
            print(f"stopped at step {result.step}; saved {result.checkpoint}; run the same command again to go on")
            raise Interrupted
        return {
            "step": result.step,
            "tokens": result.tokens,
            "loss": result.loss,
            "checkpoint": str(result.checkpoint),
            "parameters": parameter_counts(self.config.model)["total"],
        }

    def _merge(self) -> Result:
        # A run that a signal stopped has a checkpoint between the others.
        every, last = self.config.checkpoint.every_steps, self.config.steps
        steps = {path: read_meta(path).step for path in list_checkpoints(self.constant)}
        regular = [path for path, step in steps.items() if step % every == 0 or step == last]
        sources = regular[-self.config.averaging.last :]
        merges = {}
        for method in self.config.averaging.methods:
            out = self.run_dir / f"merged-{method}"
            made = merge_checkpoints(sources, out, method=method, overwrite=True)
            merges[method] = {
                "path": str(out),
                "sources": [str(source) for source in sources],
                "weights": list(made.weights.floats()),
            }
        return merges

    def _judge(self, merges: Result) -> Result:
        shards = TokenShards(shards_for(self.config, quiet=True), "validation")
        models = {"last checkpoint": str(list_checkpoints(self.constant)[-1])}
        models |= {method.upper(): merge["path"] for method, merge in merges.items()}
        if self.branch.exists():
            models["annealed"] = str(list_checkpoints(self.branch)[-1])
        scores: dict[str, BpbResult] = {}
        for name, path in models.items():
            scores[name] = evaluate_bpb(
                load_model(path, device=self.device),
                shards,
                seq_len=self.config.data.seq_len,
                max_tokens=self.config.eval.validation_tokens,
                seed=self.config.eval.seed,
            )
        last = scores["last checkpoint"]
        return {
            "blocks": len(last.block_nats),
            "rows": {
                name: score.summary() | {"difference": list(compare_bpb(score, last, seed=self.config.eval.seed))}
                for name, score in scores.items()
            },
        }

    def _recall(self, merges: Result) -> Result:
        merged = _first(merges)
        shards = TokenShards(shards_for(self.config, quiet=True), "validation")
        return run_evals(
            load_model(merged["path"], device=self.device),
            load_tokenizer(merged["path"]),
            shards,
            self.config.eval,
            seq_len=self.config.data.seq_len,
            tasks=("mqar", "needle"),
        )

    def _inspect(self, merges: Result) -> Result:
        path = _first(merges)["path"]
        text = self._held_out(INSPECT_TOKENS)
        symbols = load_tokenizer(path).symbols
        return plain(diagnose(load_model(path, device=self.device), text, symbols, seed=self.config.eval.seed))

    def _prefill(self, merges: Result) -> Result:
        model = load_model(_first(merges)["path"])
        tokens = self._held_out(PREFILL_TOKENS)
        block = getattr(self.config.prefill, "block_size", 128)
        selectors = {kind_of(self.config.prefill): self.config.prefill}
        for mode in ("corrected", "official"):
            selectors[f"flex_prefill ({mode})"] = FlexPrefillConfig(
                coverage=getattr(self.config.prefill, "coverage", 0.95),
                mode=mode,
                min_budget=4 * block,
                block_size=block,
            )
        return {
            name: _prefill_result(compare_prefill(model, tokens, selector, repeats=2), selector)
            for name, selector in selectors.items()
        }

    def _generate(self, merges: Result) -> Result:
        merged = _first(merges)
        model, tokenizer = load_model(merged["path"]), load_tokenizer(merged["path"])
        prompt = self._held_out(PROMPT_TOKENS)
        set_prefill(model, SparsePrefill(self.config.prefill))
        start = time.perf_counter()
        first = generate(model, prompt, max_new_tokens=1, temperature=0.8, seed=self.config.eval.seed)
        middle = time.perf_counter()
        out = generate(model, prompt, max_new_tokens=NEW_TOKENS, temperature=0.8, top_k=50, seed=self.config.eval.seed)
        decode_seconds = (time.perf_counter() - middle) - (middle - start)
        return {
            "prompt": tokenizer.decode(prompt[0, -64:].tolist()),
            "text": tokenizer.decode(out.tokens[0].tolist()),
            "prompt_tokens": PROMPT_TOKENS,
            "tokens": out.tokens.shape[1],
            "tokens_per_second": (out.tokens.shape[1] - 1) / max(decode_seconds, 1e-9),
            "state_bytes_start": _recurrent_bytes(first.cache),
            "state_bytes_end": _recurrent_bytes(out.cache),
            "cache_bytes_end": cache_bytes(out.cache),
            "model": f"{next(iter(merges)).upper()} of {len(merged['sources'])} checkpoints",
        }

    def _held_out(self, tokens: int) -> torch.Tensor:
        shards = TokenShards(shards_for(self.config, quiet=True), "validation")
        return torch.from_numpy(shards.read(0, min(tokens, shards.num_tokens)).astype("int64"))[None]

    def _header(self, training: Result, seconds: float) -> dict[str, Any]:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return {
            "name": f"Whimbrel {self.config.name}",
            "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
            "hardware": f"{device_name(self.device.type)}, {memory:.0f} GiB",
            "seconds": seconds,
            "tokens": training["tokens"],
            "parameters": training["parameters"],
            "versions": {
                "whimbrel": whimbrel.__version__,
                **{name: metadata.version(name) for name in ("torch", "tokenizers", "safetensors")},
            },
            "commit": commit(),
        }

    def _commands(self) -> list[str]:
        run, first = self.run_dir, next(iter(self.config.averaging.methods))
        last = self.config.averaging.last
        return [
            f"whimbrel demo --run-dir {run}",
            f"whimbrel train {run}/constant/config.toml --run-dir {run}/constant",
            f"whimbrel merge $(ls -d {run}/constant/step-* | tail -{last}) --method {first} --out {run}/again",
            f"whimbrel eval {run}/merged-{first}",
            f"whimbrel generate {run}/merged-{first} --prompt 'In the beginning'",
        ]


def _first(merges: Result) -> Any:
    return next(iter(merges.values()))


def _recurrent_bytes(cache: Any) -> int:
    """Bytes of the states that do not grow: those of the linear mixers."""
    from whimbrel.mixers.base import LayerState

    return cache_bytes(tuple(state for state in cache if isinstance(state, LayerState)))


def _prefill_result(found: PrefillComparison, selector: Any) -> Result:
    plan = found.layers[0].plan
    mask = plan.to_mask()[0, 0].int().tolist()
    return {
        "tokens": found.tokens,
        "coverage_asked": selector.coverage,
        "layers": [
            {"density": la.density, "coverage_mean": la.coverage_mean, "coverage_low": la.coverage_low}
            for la in found.layers
        ],
        "max_logit_difference": found.max_logit_difference,
        "top1_agreement": found.top1_agreement,
        "loss_dense": found.loss_dense,
        "loss_sparse": found.loss_sparse,
        "seconds_dense": list(found.seconds_dense),
        "seconds_sparse": list(found.seconds_sparse),
        "block_size": plan.block_size,
        "mask": mask,
    }


def _say_data(r: Result) -> str:
    train_split, held_out = r["train"], r["validation"]
    return (
        f"{train_split['tokens']:,} tokens of {train_split['documents']} documents to train on, "
        f"{held_out['tokens']:,} of {held_out['documents']} held out: {', '.join(r['sources'])}"
    )


def _say_train(r: Result) -> str:
    return f"{r['parameters']:,} parameters, {r['tokens']:,} tokens, loss {r['loss']:.3f} nats a token"


def _say_merge(r: Result) -> str:
    return f"{', '.join(method.upper() for method in r)} of the last {len(_first(r)['sources'])} checkpoints"


def _say_judge(r: Result) -> str:
    rows = ", ".join(f"{name} {row['bits_per_byte']:.3f}" for name, row in r["rows"].items())
    name, row = _average(r)
    return f"bits per byte of held-out text: {rows}; {name} {_beside_last(row['difference'])}"


def _beside_last(difference: list[float]) -> str:
    value, low, high = difference
    if low <= 0 <= high:
        return "cannot be told apart from the last checkpoint"
    where, ends = ("below", (-high, -low)) if value < 0 else ("above", (low, high))
    return f"is {abs(value):.3f} nats a token {where} the last checkpoint (95% interval {ends[0]:.3f} to {ends[1]:.3f})"


def _say_forecast(r: Result) -> str:
    """What an average says that annealing would give, beside what it gave."""
    name, row = _average(r)
    if row["difference"][2] >= 0:
        return "none: an average that is not below the last checkpoint says nothing about annealing"
    text = f"{name} forecasts {row['nats_per_token']:.3f} nats a token for a short annealing"
    found = r["rows"].get("annealed")
    return f"{text}, which gave {found['nats_per_token']:.3f}" if found else text


def _average(r: Result) -> tuple[str, Any]:
    """Name and row of the first average."""
    return next((name, row) for name, row in r["rows"].items() if name not in ("last checkpoint", "annealed"))


def _say_recall(r: Result) -> str:
    cells = ", ".join(f"{c['num_pairs']} pairs {c['accuracy']:.0%}" for c in r["mqar"])
    needle = sum(c["accuracy"] for c in r["needle"]) / len(r["needle"])
    return f"MQAR {cells}; needle in text {needle:.0%}; chance {r['mqar'][0]['chance']:.1%}"


def _say_inspect(r: Result) -> str:
    first = r["heads"][0]
    return f"without head {first['head']} of block {first['block']} answers lose {first['rise']:.2f} nats"


def _say_prefill(r: Result) -> str:
    name, own = next(iter(r.items()))
    layer = own["layers"][0]
    return (
        f"{name} read {layer['density']:.0%} of the causal blocks of {own['tokens']:,} tokens, which hold "
        f"{layer['coverage_mean']:.1%} of the attention (least row {layer['coverage_low']:.1%}, asked "
        f"{own['coverage_asked']:.0%}); same next token as dense at {own['top1_agreement']:.1%}; "
        f"dense {min(own['seconds_dense']):.2f} s, sparse {min(own['seconds_sparse']):.2f} s"
    )


def _say_time(seconds: dict[str, float]) -> str:
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    return f"{sum(seconds.values()):.0f} s: " + ", ".join(f"{name} {value:.0f}" for name, value in parts)


def _say_sample(r: Result) -> str:
    return (
        f"{r['tokens']} tokens after {r['prompt_tokens']}, {r['tokens_per_second']:.0f} tokens/s, recurrent state "
        f"{r['state_bytes_end']:,} bytes before and after"
        if r["state_bytes_start"] == r["state_bytes_end"]
        else f"{r['tokens']} tokens; the recurrent state grew from {r['state_bytes_start']:,} bytes"
    )
