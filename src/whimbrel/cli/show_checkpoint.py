"""`whimbrel show CHECKPOINT`: layers, memory by part at any length, and which code runs on which device, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from whimbrel.cli.args import parse, print_table

if TYPE_CHECKING:
    import torch

    from whimbrel.config import Config


@dataclass(frozen=True)
class Args:
    """What the model in a folder (the first argument) holds and how it will run."""

    tokens: tuple[int, ...] = ()
    """Context lengths to give the state's bytes for; default 1024, 8192, 65536 and 524288."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to tell the choice of code for."""
    json: bool = False
    """Print one JSON object instead of tables."""


def show_checkpoint(argv: Sequence[str]) -> int:
    """Print the report of the folder that the first argument names."""
    from whimbrel.cli.show import print_states

    args = parse(Args, argv[1:], verb="show")
    report = explain(Path(argv[0]), lengths=args.tokens, device=args.device)
    if args.json:
        print(json.dumps(report))
        return 0
    print(f"{report['path']}: {report['what']}\n{report['model']}\n")
    print_table("Parameters", ("part", "parameters"), [(k, f"{v:,}") for k, v in report["parameters"].items()])
    print_table("On disk, bytes", ("part", "bytes"), [(k, f"{v:,}") for k, v in report["disk"].items()])
    head = ("block", "mixer", "heads", "parameters", f"state at {report['inference'][0]['tokens']:,} tokens, bytes")
    rows = [
        (str(row["block"]), row["kind"], row["heads"], f"{row['parameters']:,}", f"{row['state_bytes']:,}")
        for row in report["layers"]
    ]
    print_table("Layers", head, rows)
    print_states(report["inference"])
    rows = [(row["what"], row["kind"], row["runs"], row["why"]) for row in report["code"]]
    print_table(f"Code that runs on {report['device']}", ("call", "kind", "runs", "because"), rows)
    return 0


def explain(path: Path, *, lengths: Sequence[int] = (), device: str = "auto") -> dict[str, Any]:
    """The report as plain data. Raises CheckpointError for a folder without a model, ConfigError for its lengths."""
    import dataclasses

    from whimbrel.checkpoint.steps import META, read_meta
    from whimbrel.checkpoint.tensorfile import read_folder
    from whimbrel.cli.show import blocks
    from whimbrel.config import kind_of, require
    from whimbrel.infer.load import load_run_config, model_dir
    from whimbrel.merge.outputs import MANIFEST
    from whimbrel.model.memory import LENGTHS, parameter_counts, state_bytes
    from whimbrel.training.processes import pick_device

    for tokens in lengths:
        require(tokens > 0, "--tokens", tokens, "positive numbers of tokens")
    folder = model_dir(path)
    config = load_run_config(folder)
    lengths = tuple(lengths) or LENGTHS
    tensors = read_folder(folder)
    entries = [tensors.entry(name) for name in tensors.places]
    disk = {"weights": sum(entry.stop - entry.start for entry in entries)}
    what = _average(folder / MANIFEST) or "a model"
    if (folder / META).exists():
        meta = read_meta(folder)
        disk["training state"] = sum(f["bytes"] for name, f in meta.files.items() if name.startswith("train/"))
        what = (
            f"checkpoint of '{config.name}' after step {meta.step}, {meta.tokens:,} tokens, saved by {meta.world_size} "
            f"process{'es' if meta.world_size > 1 else ''} with whimbrel {meta.whimbrel} and torch {meta.torch}"
        )
    element = 2 if config.dtype == "bfloat16" else 4
    width = config.model.hidden_size
    place = pick_device(device)
    return {
        "path": str(folder),
        "what": what,
        "model": f"{blocks(config.model)}; weights in {', '.join(sorted({entry.dtype for entry in entries}))}",
        "parameters": parameter_counts(config.model),
        "disk": disk,
        "layers": [
            {
                "block": block,
                "kind": kind_of(mixer),
                "heads": _heads(dataclasses.asdict(mixer)),
                "parameters": mixer.num_params(width),
                "state_bytes": mixer.state_bytes(width, lengths[0], bytes_per_element=element),
            }
            for block, mixer in enumerate(config.model.layers())
        ],
        "inference": [state_bytes(config.model, tokens, bytes_per_element=element)._asdict() for tokens in lengths],
        "device": str(place),
        "code": _code(config, place),
    }


def _average(manifest: Path) -> str:
    """What a merge wrote about itself, in words; nothing where none did."""
    if not manifest.is_file():
        return ""
    made = json.loads(manifest.read_text(encoding="utf-8"))
    steps = [source["step"] for source in made["sources"] if source.get("step") is not None]
    of = f", of steps {min(steps)} to {max(steps)}" if steps else ""
    return f"average ({made['method']['kind']}) of {len(made['sources'])} checkpoints{of}"


def _heads(options: dict[str, Any]) -> str:
    heads, dim = options.get("num_heads"), options.get("head_dim")
    if heads is None:
        return ""
    keys = options.get("num_kv_heads")
    return f"{heads} x {dim}" + (f", {keys} of keys" if keys and keys != heads else "")


def _code(config: Config, device: torch.device) -> list[dict[str, str]]:
    """Which code each kind of mixer and the sparse prefill will run on `device`, and why."""
    from whimbrel.config import kind_of

    dtype = "bfloat16" if config.dtype == "bfloat16" else "float32"
    found = []
    for kind, mixer in {kind_of(mixer): mixer for mixer in config.model.layers()}.items():
        if getattr(mixer, "impl", None) is None:
            found.append(_row("any", kind, "scaled_dot_product_attention", "PyTorch chooses its kernel by device"))
            continue
        found += _recurrence(kind, mixer, device, dtype)
    found.append(_prefill(config, device, dtype))
    return found


def _recurrence(kind: str, mixer: Any, device: torch.device, dtype: str) -> list[dict[str, str]]:
    import torch

    from whimbrel.errors import UnsupportedError
    from whimbrel.scan.common import choose, kernel_refusal, kernel_unproven

    dims = mixer.head_dim, getattr(mixer, "value_head_dim", None) or mixer.head_dim
    q, v = (torch.empty(1, 2, 1, dim, device=device, dtype=getattr(torch, dtype)) for dim in dims)
    try:
        runs = choose(kind, mixer.impl, q, v)
    except UnsupportedError as error:
        return [_row("sequence", kind, "nothing", str(error))]
    if mixer.impl != "auto":
        why = f"impl = '{mixer.impl}' is named in the configuration"
    elif runs == "triton":
        why = f"kernels for this device take {dtype}, K = {dims[0]} and V = {dims[1]}"
    else:
        why = kernel_unproven(q, v) or kernel_refusal(q, v) or "plain PyTorch runs on any device"
    step = "one kernel" if device.type == "cuda" and kernel_refusal(q, v) is None else "plain PyTorch"
    reason = "the state is read and written once" if step == "one kernel" else kernel_refusal(q, v) or "no GPU"
    return [_row("sequence", kind, runs, why), _row("one token", kind, step, reason)]


def _prefill(config: Config, device: torch.device, dtype: str) -> dict[str, str]:
    import torch

    from whimbrel.attend import choice
    from whimbrel.config import kind_of

    selector = config.prefill
    dim, block = getattr(config.model.softmax, "head_dim", 64), getattr(selector, "block_size", 128)
    q = torch.empty(1, 2, 1, dim, device=device, dtype=getattr(torch, dtype))
    why = choice.no_triton(q, q, q, block, dim**-0.5)
    runs = choice.auto(q, q, q, block, dim**-0.5)
    if why is None:
        why = "the fastest on this device" if runs == "triton" else "its kernel has not been proven on this device"
    return _row("sparse prefill", kind_of(selector), runs, why)


def _row(what: str, kind: str, runs: str, why: str) -> dict[str, str]:
    return {"what": what, "kind": kind, "runs": runs, "why": why}
