"""From the results of the stages to the data of the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whimbrel.bench.results import RESULTS, read_lines
from whimbrel.config import Config, OptimConfig, kind_of, to_toml
from whimbrel.demo.stages import Result
from whimbrel.model.memory import parameter_shapes, state_bytes
from whimbrel.optim.adamw.config import AdamWConfig
from whimbrel.optim.fira.config import FiraConfig
from whimbrel.optim.galore.config import GaLoreConfig

LENGTHS = (256, 1024, 4096, 16_384, 65_536, 262_144)
CONFIDENCE = 0.95


def build(
    config: Config,
    *,
    header: dict[str, Any],
    constant: Sequence[dict[str, Any]],
    annealed: Sequence[dict[str, Any]],
    merges: Result,
    averaging: Result,
    recall: Result,
    diagnostics: Result,
    prefill: Result,
    sample: Result,
    commands: list[str],
) -> dict[str, Any]:
    """The report's data; its schema is `whimbrel.report.schema.Report`."""
    runs = [_run("constant rate", constant)]
    if annealed:
        runs.append(_run("annealed branch", annealed))
    sources = next(iter(merges.values()))["sources"]
    report: dict[str, Any] = {
        "header": header,
        "training": {
            "runs": runs,
            "merged_tokens": [int(Path(source).name.rpartition("-")[2]) * config.batch_tokens for source in sources],
            "note": _training_note(config),
        },
        "averaging": _averaging(averaging, merges),
        "memory": _memory(config),
        "recall": _recall(config, recall, sample["model"]),
        "diagnostics": diagnostics,
        "long_context": _long_context(config, prefill, sample),
        "configuration": {"toml": to_toml(config), "commands": commands},
    }
    compared = comparisons()
    if compared:
        report["comparisons"] = compared
    return report


def _run(name: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second")
    return {
        "name": name,
        "points": [{key: line[key] for key in keys} for line in lines if "loss" in line],
        "validation": [
            {"tokens": line["tokens"], "loss": line["validation_loss"]} for line in lines if "validation_loss" in line
        ],
    }


def _training_note(config: Config) -> str:
    data = config.data
    if not data.recall_fraction:
        return ""
    return (
        f"Generated recall tasks are {data.recall_fraction:.0%} of the sequences and part of the training loss, easy "
        f"ones up to {data.recall_warmup_steps * config.batch_tokens:,} tokens; the validation loss is that of text."
    )


def _averaging(judged: Result, merges: Result) -> dict[str, Any]:
    rows = []
    for name, row in judged["rows"].items():
        kind = {"last checkpoint": "last", "annealed": "annealed"}.get(name, "merge")
        entry = {
            "name": name,
            "kind": kind,
            "loss": row["nats_per_token"],
            "low": row["nats_low"],
            "high": row["nats_high"],
            "bits_per_byte": row["bits_per_byte"],
        }
        if kind == "merge":
            entry["weights"] = merges[name.lower()]["weights"]
        if kind != "last":
            entry["difference"] = dict(zip(("value", "low", "high"), row["difference"], strict=True))
        rows.append(entry)
    return {"rows": rows, "blocks": judged["blocks"], "confidence": CONFIDENCE}


def _memory(config: Config) -> dict[str, Any]:
    shapes = parameter_shapes(config.model)
    weights = 4 * sum(math.prod(shape) for shape in shapes.values())
    methods = _optimizers(config)
    hybrid = [state_bytes(config.model, length) for length in LENGTHS]
    softmax = sum(kind_of(layer) == "softmax" for layer in config.model.layers())
    linear = config.model.num_layers - softmax
    return {
        "methods": [
            {
                "method": name,
                "weights": weights,
                "gradients": weights,
                "optimizer_state": optim.state_bytes(shapes),
            }
            for name, optim in methods.items()
        ],
        "used": next((name for name, optim in methods.items() if optim == config.optim), ""),
        "by_length": {
            "lengths": list(LENGTHS),
            "series": [
                {
                    "name": f"hybrid, {linear} {kind_of(config.model.mixer).upper()} : {softmax} softmax",
                    "bytes": [row.recurrent + row.kv_cache for row in hybrid],
                },
                {"name": "its recurrent state alone", "bytes": [row.recurrent for row in hybrid]},
                {"name": "softmax in every layer", "bytes": [row.all_softmax for row in hybrid]},
            ],
        },
    }


def _optimizers(config: Config) -> dict[str, OptimConfig]:
    rank = getattr(config.optim, "rank", 48)
    methods: dict[str, OptimConfig] = {
        "AdamW": AdamWConfig(),
        "GaLore": GaLoreConfig(rank=rank),
        "Fira": FiraConfig(rank=rank),
    }
    own = {"adamw": "AdamW", "galore": "GaLore", "fira": "Fira"}.get(kind_of(config.optim))
    return methods | ({own: config.optim} if own else {})


def _recall(config: Config, recall: Result, model: str) -> dict[str, Any]:
    needles = recall["needle"]
    lengths = sorted({cell["length"] for cell in needles})
    depths = sorted({cell["depth"] for cell in needles})
    by_cell = {(cell["depth"], cell["length"]): cell for cell in needles}
    middle = depths[len(depths) // 2]
    return {
        "mqar": {
            "chance": recall["mqar"][0]["chance"],
            "series": [{"name": model, "points": [_point(cell, "num_pairs") for cell in recall["mqar"]]}],
        },
        "needle": {
            "chance": needles[0]["chance"],
            "series": [
                {
                    "name": f"{model}, needle at {middle:.0%} of the text",
                    "points": [_point(by_cell[middle, length], "length") for length in lengths],
                }
            ],
            "grids": [
                {
                    "name": model,
                    "lengths": lengths,
                    "depths": depths,
                    "accuracy": [[by_cell[depth, length]["accuracy"] for length in lengths] for depth in depths],
                    "n": needles[0]["num_queries"],
                }
            ],
        },
        "confidence": CONFIDENCE,
        "trained_length": config.data.seq_len,
    }


def _point(cell: dict[str, Any], x: str) -> dict[str, Any]:
    return {
        "x": cell[x],
        "accuracy": cell["accuracy"],
        "low": cell["low"],
        "high": cell["high"],
        "n": cell["num_queries"],
    }


def _long_context(config: Config, prefill: Result, sample: Result) -> dict[str, Any]:
    layers = [i for i, layer in enumerate(config.model.layers()) if kind_of(layer) == "softmax"]
    return {
        "prefill": [
            {
                "selector": name,
                "tokens": found["tokens"],
                "layers": [
                    {
                        "layer": index,
                        "density": layer["density"],
                        "coverage_asked": found["coverage_asked"],
                        "coverage_achieved": layer["coverage_low"],
                    }
                    for index, layer in zip(layers, found["layers"], strict=True)
                ],
                "max_logit_difference": found["max_logit_difference"],
                "top1_agreement": found["top1_agreement"],
                "positions": found["tokens"],
                "dense": _timing(found["seconds_dense"]),
                "sparse": _timing(found["seconds_sparse"]),
            }
            for name, found in prefill.items()
        ],
        "plans": [
            {
                "selector": name,
                "layer": layers[0],
                "head": 0,
                "block_size": found["block_size"],
                "mask": found["mask"],
            }
            for name, found in prefill.items()
        ],
        "sample": {
            key: sample[key] for key in ("prompt", "text", "prompt_tokens", "tokens", "tokens_per_second", "model")
        },
    }


def _timing(seconds: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"seconds": middle, "q25": low, "q75": high, "n": len(seconds)}


def comparisons(results: Path = RESULTS) -> list[dict[str, Any]]:
    """The recorded comparisons of mixers and of optimizers, where their result lines are at hand."""
    found = []
    for case, title in (("quality-mixers", "Mixers"), ("quality-optimizers", "Optimizers")):
        path = results / f"{case}.jsonl"
        if path.exists():
            found.append(_comparison(title, read_lines(path)))
    return found


def _comparison(title: str, lines: Sequence[Any]) -> dict[str, Any]:
    names = list(dict.fromkeys(line["impl"] for line in lines))
    metrics = list(dict.fromkeys((line["metric"], line["unit"]) for line in lines))
    rows = []
    for name in names:
        own = [line for line in lines if line["impl"] == name]
        facts = {key: value for key, value in own[0]["params"].items() if key in ("parameters", "lr", "state_bytes")}
        values = {metric: [line["value"] for line in own if line["metric"] == metric] for metric, _ in metrics}
        rows.append({"name": name, "values": values, "facts": facts})
    first = lines[0]
    return {
        "title": title,
        "setting": (
            f"{first['params']['tokens']:,} tokens each, {first['params']['setting']}; recorded at commit "
            f"{first['commit']} on {first['device']}."
        ),
        "metrics": [
            {"name": metric, "unit": unit, "lower_is_better": unit != "share"}
            | ({"chance": first["params"]["chance"]} if unit == "share" else {})
            for metric, unit in metrics
        ],
        "rows": rows,
    }
