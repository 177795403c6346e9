"""From a corpus to token shards, once: documents, split, tokenizer, shards."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from whimbrel.config import Config, DataConfig
from whimbrel.data.corpus import (
    DEMO_ARCHIVES,
    Corpus,
    Source,
    default_cache,
    demo_corpus,
    read_documents,
    split_documents,
)
from whimbrel.data.shards import MANIFEST, SHARD_TOKENS, read_manifest, write_shards
from whimbrel.data.tokenizer import Tokenizer
from whimbrel.errors import ConfigError, DataError

DEMO = "demo"
CLEANING = 1
"""Version of the rules that turn a source into documents; a change of the rules makes old shards stale."""


def prepare(
    data: DataConfig,
    out: str | Path,
    *,
    vocab_size: int,
    split_seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    cache: Path | None = None,
    quiet: bool = False,
) -> Path:
    """Make the token shards that `data` asks for and return their manifest; a second call does no work.

    data.corpus: "demo", a folder of shards (used where it lies), or text that `read_documents` takes.
    out: folder for the shards. vocab_size: most token ids. split_seed: seed of the choice of validation
    documents, apart from a run's seed so that runs share their validation text. cache: folder of the demo's
    archives.
    Raises DataError for a corpus that cannot be had or an `out` that was made with other settings,
    ConfigError for shards whose ids do not fit `vocab_size`.
    """
    if data.corpus != DEMO and (Path(data.corpus) / MANIFEST).exists():
        manifest = Path(data.corpus) / MANIFEST
        used = read_manifest(manifest.parent)["vocab_size"]
        if used > vocab_size:
            raise ConfigError(
                f"model.vocab_size = {vocab_size} is smaller than the {used} token ids of {data.corpus}; "
                f"use at least {used}"
            )
        return manifest
    out = Path(out)
    settings = {
        "corpus": data.corpus,
        "cleaning": CLEANING,
        "validation_fraction": data.validation_fraction,
        "split_seed": split_seed,
        "vocab_size": vocab_size,
        "shard_tokens": shard_tokens,
    }
    if data.corpus == DEMO:
        sources = [Source(a.name, a.version, a.licence, a.sha256) for a in DEMO_ARCHIVES]
        if _is_made(out, settings, sources):
            return out / MANIFEST
        corpus = demo_corpus(cache)
    else:
        corpus = read_documents(Path(data.corpus))
        if _is_made(out, settings, corpus.sources):
            return out / MANIFEST
    return _build(corpus, out, settings, quiet=quiet)


def shards_for(config: Config, *, quiet: bool = False) -> Path:
    """The folder of token shards for `config`, made at the first call and kept in the cache folder."""
    corpus = Path(config.data.corpus)
    # A relative path names another text in another working directory.
    place = config.data.corpus if config.data.corpus == DEMO else corpus.resolve()
    settings = f"{place} {config.data.validation_fraction} {config.model.vocab_size}"
    digest = hashlib.sha256(settings.encode()).hexdigest()[:10]
    out = default_cache() / "shards" / f"{corpus.name}-{config.model.vocab_size}-{digest}"
    return prepare(config.data, out, vocab_size=config.model.vocab_size, quiet=quiet).parent


def _is_made(out: Path, settings: dict[str, Any], sources: list[Source]) -> bool:
    """Whether `out` holds these shards; raises DataError if it holds others."""
    if not (out / MANIFEST).exists():
        return False
    manifest = read_manifest(out)
    found = manifest["settings"] | {"sources": manifest["sources"]}
    wanted = settings | {"sources": [source._asdict() for source in sources]}
    for name, want in wanted.items():
        if found.get(name) != want:
            raise DataError(
                f"{out} holds shards made with {name} = {found.get(name)!r}, wanted {want!r}; "
                "choose another folder or remove it"
            )
    return True


def _build(corpus: Corpus, out: Path, settings: dict[str, Any], *, quiet: bool) -> Path:
    split = split_documents(
        corpus.documents, validation_fraction=settings["validation_fraction"], seed=settings["split_seed"]
    )
    tokenizer = Tokenizer.train((doc.text for doc in split.documents["train"]), vocab_size=settings["vocab_size"])
    return write_shards(
        out,
        split.documents,
        tokenizer,
        sources=corpus.sources,
        settings=settings | {"dropped_copies": split.dropped},
        shard_tokens=settings["shard_tokens"],
        quiet=quiet,
    )
