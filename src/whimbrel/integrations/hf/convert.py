"""Checkpoints between Whimbrel, its model type in transformers, and the Llama family; weights are copied as bytes."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from whimbrel.checkpoint.tensorfile import ITEM_BYTES, SINGLE, TensorFolder, make_header, read_exactly, read_folder
from whimbrel.config import Config, ModelConfig, OptimConfig, to_toml
from whimbrel.data.tokenizer import END_OF_TEXT
from whimbrel.errors import CheckpointError, ConfigError
from whimbrel.files import atomic_folder, disk_space
from whimbrel.infer.load import load_run_config, load_tokenizer, model_dir
from whimbrel.integrations.hf.config import WhimbrelConfig, selector_of
from whimbrel.integrations.hf.family import FAMILIES, family_config, family_name, model_of
from whimbrel.model.memory import parameter_shapes
from whimbrel.optim.adamw.config import AdamWConfig
from whimbrel.optim.fira.config import FiraConfig

TARGETS = ("whimbrel", *FAMILIES)
"""What a checkpoint can become."""

_PIECE = 16 * 2**20
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_EXTRA = ("eos_token_id", "bos_token_id", "pad_token_id", "max_position_embeddings")
_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    # A recurrent state cannot pass over padding behind the text.
    "padding_side": "left",
    # As in Whimbrel: a special token that is spelt out in a text is text.
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
}


class ConvertReport(NamedTuple):
    """What was written."""

    out: Path
    source_type: str
    """`run` for a checkpoint or merge of Whimbrel's own, else the model type of the source."""
    model_type: str
    parameters: int
    written_bytes: int


class _Source(NamedTuple):
    folder: Path
    kind: str
    run: Config
    """The configuration of the run; defaults around the model where there was none."""
    extra: dict[str, Any]
    """Fields that every configuration of transformers has."""

    @property
    def in_family(self) -> bool:
        """Whether the weights have the family's names."""
        return self.kind in FAMILIES


def convert_checkpoint(
    source: str | Path, out: str | Path, *, to: str = "whimbrel", overwrite: bool = False
) -> ConvertReport:
    """Write the model in the folder `source` to the folder `out` as the model type `to`, one of TARGETS.

    `source` is a checkpoint, merge or run of Whimbrel, a folder that `save_pretrained` wrote for the model type
    `whimbrel`, or a model of the Llama family. With `to="whimbrel"`, `out` serves `whimbrel.load_model` and the command
    as well as `AutoModelForCausalLM.from_pretrained`. Weights keep their dtype. `out` appears complete or not at all.

    Raises ConfigError for an unknown `to` or an existing `out` (without `overwrite`), UnsupportedError for a model with
    parts that the target lacks, CheckpointError for files that are missing or do not fit the configuration.
    """
    if to not in TARGETS:
        raise ConfigError(f"to = '{to}' is not allowed; use one of {', '.join(TARGETS)}")
    out = Path(out)
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; choose another folder, or overwrite")
    found = _open(Path(source))
    tensors = read_folder(found.folder)
    stored = _stored_names(tensors, found)
    config = _config(found, to)
    names = {name if to == "whimbrel" else family_name(name): place for name, place in stored.items()}
    entries = [tensors.entry(place) for place in stored.values()]
    size = sum(entry.stop - entry.start for entry in entries)
    room = disk_space(out, size, "the converted model", CheckpointError)
    with room, atomic_folder(out, overwrite=overwrite) as folder:
        _copy_weights(tensors, names, folder / SINGLE)
        config.save_pretrained(folder)
        _copy_tokenizer(found.folder, folder, config)
        if to == "whimbrel":
            (folder / "config.toml").write_text(to_toml(found.run), encoding="utf-8")
    return ConvertReport(out, found.kind, to, sum(math.prod(entry.shape) for entry in entries), size)


def _open(source: Path) -> _Source:
    """What `source` is; config.toml of a run goes before config.json where a conversion has left both."""
    theirs = _read_config(source) if (source / "config.json").is_file() else None
    if theirs is None or (source / "config.toml").is_file():
        folder = model_dir(source)
        run = load_run_config(folder)
        extra = _extra_of_run(folder, run) if theirs is None else _extra_of(theirs)
        return _Source(folder, "run", run, extra)
    run = Config(name=source.resolve().name or "model")
    if isinstance(theirs, WhimbrelConfig):
        run = replace(run, model=theirs.model_config, prefill=selector_of(theirs.prefill))
    else:
        run = replace(run, model=model_of(theirs))
    return _Source(source, theirs.model_type, replace(run, optim=_optim(run.model)), _extra_of(theirs))


def _optim(model: ModelConfig) -> OptimConfig:
    """To train on with where no run says what with: the default, at a rank that the narrowest of its matrices has."""
    optim = FiraConfig()
    blocks = (shape for name, shape in parameter_shapes(model).items() if name.startswith("blocks.") and len(shape) > 1)
    sides = [side for side in (min(shape[-2:]) for shape in blocks) if side >= optim.min_dim]
    return replace(optim, rank=min(optim.rank, *sides)) if sides else AdamWConfig()


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error


def _extra_of(config: PreTrainedConfig) -> dict[str, Any]:
    values = {name: getattr(config, name, None) for name in _EXTRA}
    return {name: value for name, value in values.items() if value is not None}


def _extra_of_run(folder: Path, run: Config) -> dict[str, Any]:
    extra: dict[str, Any] = {"max_position_embeddings": run.data.seq_len}
    if (folder / "tokenizer.json").is_file():
        end = load_tokenizer(folder).end_of_text
        extra |= {"eos_token_id": end, "pad_token_id": end}
    return extra


def _config(found: _Source, to: str) -> PreTrainedConfig:
    if to == "whimbrel":
        config = WhimbrelConfig.from_model(found.run.model, prefill=found.run.prefill, **found.extra)
    else:
        config = family_config(found.run.model, to, **found.extra)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return config


def _stored_names(tensors: TensorFolder, found: _Source) -> dict[str, str]:
    """Name in a Decoder -> name in the files, for every weight; raises CheckpointError for what does not fit."""
    model = found.run.model
    names = {}
    for name, shape in parameter_shapes(model).items():
        place = family_name(name) if found.in_family else name
        if place not in tensors.places:
            raise CheckpointError(f"tensor '{place}' is missing from {tensors.path}")
        if tensors.entry(place).shape != shape:
            raise CheckpointError(
                f"tensor '{place}' in {tensors.file(place).path} has shape {list(tensors.entry(place).shape)}, "
                f"but {list(shape)} by the configuration"
            )
        names[name] = place
    for place in sorted(set(tensors.places) - set(names.values())):
        tied_head = model.tie_embeddings and place in ("head.weight", family_name("head.weight"))
        if not tied_head and not place.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"tensor '{place}' of {tensors.file(place).path} is not in the model")
    return names


def _copy_weights(tensors: TensorFolder, names: dict[str, str], path: Path) -> None:
    """Write the tensors under their new names, a piece at a time."""
    # Wide types first keeps every tensor aligned to its own width.
    order = sorted(names, key=lambda name: -ITEM_BYTES[tensors.entry(names[name]).dtype])
    header, _ = make_header({name: tensors.entry(names[name])[:2] for name in order}, {"format": "pt"})
    with open(path, "wb") as file:
        file.write(header)
        for name in order:
            for piece in _pieces(tensors, names[name]):
                file.write(piece)


def _pieces(tensors: TensorFolder, name: str) -> Iterator[memoryview]:
    entry, path = tensors.entry(name), tensors.file(name).path
    buffer = memoryview(bytearray(min(_PIECE, entry.stop - entry.start)))
    handle = os.open(path, os.O_RDONLY)
    try:
        for start in range(entry.start, entry.stop, _PIECE):
            piece = buffer[: entry.stop - start]
            read_exactly(handle, piece, start, path)
            yield piece
    finally:
        os.close(handle)


def _copy_tokenizer(source: Path, out: Path, config: PreTrainedConfig) -> None:
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if (out / "tokenizer.json").is_file() and not (out / "tokenizer_config.json").is_file():
        (out / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER, indent=2) + "\n", encoding="utf-8")
    if not (out / "generation_config.json").is_file():
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ids).save_pretrained(out)
