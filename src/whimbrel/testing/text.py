"""Small made-up texts and token shards for tests that need data but no real words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from whimbrel.data.corpus import Document
from whimbrel.data.draws import Draws
from whimbrel.data.shards import SHARD_TOKENS, TokenShards, write_shards
from whimbrel.data.tokenizer import MIN_VOCAB, Tokenizer

_SYLLABLES = ("wa", "lo", "ri", "ten", "sh", "ou", "me", "ka", "nd", "bel", "é", "7")


def make_documents(seed: int, *, count: int = 6, words: int = 300) -> list[Document]:
    """`count` documents of `words` made-up words each, different for each seed."""
    documents = []
    for index in range(count):
        picks = Draws(seed, index).below(len(_SYLLABLES), words, 3)
        text = " ".join("".join(_SYLLABLES[i] for i in word) for word in picks)
        documents.append(Document(f"doc-{index}", "made up", text + "\n"))
    return documents


def make_shards(
    folder: Path,
    *,
    seed: int = 0,
    vocab_size: int = MIN_VOCAB + 60,
    documents: Mapping[str, Sequence[Document]] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Path:
    """Token shards in the new folder `folder`, by default of made-up documents in both splits; returns `folder`."""
    if documents is None:
        made = make_documents(seed)
        documents = {"train": made[:-2], "validation": made[-2:]}
    tokenizer = Tokenizer.train((doc.text for doc in documents["train"]), vocab_size=vocab_size)
    write_shards(folder, documents, tokenizer, shard_tokens=shard_tokens, quiet=True)
    return folder


def open_shards(folder: Path, split: str = "train", *, shard_tokens: int = SHARD_TOKENS) -> TokenShards:
    """One split of made-up shards, which are made if they are not there."""
    if not folder.exists():
        make_shards(folder, shard_tokens=shard_tokens)
    return TokenShards(folder, split)
