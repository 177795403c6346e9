"""Token shards: memory-mapped files of 16- or 32-bit ids, and a manifest that accounts for every token.

A folder holds manifest.json, tokenizer.json, and for each split its shards SPLIT-00000.bin, ...
(little-endian ids, each document followed by <|endoftext|>) and SPLIT-documents.tsv (name, tokens with the
separator, bytes of text).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whimbrel.data.corpus import Document, Source
from whimbrel.data.tokenizer import Tokenizer
from whimbrel.errors import DataError
from whimbrel.files import atomic_folder, disk_space, sha256_file
from whimbrel.progress import track

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SHARD_TOKENS = 2**20
"""Most tokens of one shard file."""

_CHUNK_BYTES = 2**22


def write_shards(
    out: Path,
    documents: Mapping[str, Sequence[Document]],
    tokenizer: Tokenizer,
    *,
    sources: Sequence[Source] = (),
    settings: Mapping[str, Any] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    quiet: bool = False,
) -> Path:
    """Tokenise `documents` (by split) into the new folder `out`, which appears complete or not at all.

    sources, settings: go into the manifest. shard_tokens: most tokens of one file. Returns the manifest's
    path.
    Raises DataError if `out` exists and is not an empty folder, or if the disk fills up.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty folder; choose another folder for the shards or remove it")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    size = {split: sum(len(doc.text.encode("utf-8")) for doc in docs) for split, docs in documents.items()}
    # No token stands for less than one byte, save the separators.
    most = (sum(size.values()) + sum(map(len, documents.values()))) * dtype.itemsize
    with (
        disk_space(out, most, f"token shards {out}", DataError),
        track("tokenise", sum(size.values()), "B", quiet=quiet) as bar,
        atomic_folder(out, overwrite=True) as folder,
    ):
        tokenizer.save(folder / TOKENIZER)
        splits = {}
        for split, docs in documents.items():
            writer = _ShardWriter(folder, split, dtype, shard_tokens)
            for chunk in _chunks(docs):
                for doc, ids in zip(chunk, tokenizer.encode_batch([doc.text for doc in chunk]), strict=True):
                    writer.add(doc, np.append(ids, tokenizer.end_of_text))
                    bar.advance(len(doc.text.encode("utf-8")))
            splits[split] = writer.close()
        manifest = {
            "format": FORMAT,
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "tokenizer": {"file": TOKENIZER, "sha256": sha256_file(folder / TOKENIZER)},
            "sources": [source._asdict() for source in sources],
            "settings": dict(settings or {}),
            "splits": splits,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return out / MANIFEST


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of documents of a few megabytes, which the tokenizer reads in parallel."""
    chunk: list[Document] = []
    size = 0
    for doc in documents:
        chunk.append(doc)
        size += len(doc.text)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _ShardWriter:
    """Appends documents to the shards of one split and counts them."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, limit: int) -> None:
        self._folder, self._split, self._dtype, self._limit = folder, split, dtype, limit
        self._held: list[np.ndarray] = []
        self._num_held = 0
        self._shards: list[dict[str, Any]] = []
        self._documents: list[str] = []
        self._bytes = 0

    def add(self, doc: Document, ids: np.ndarray) -> None:
        size = len(doc.text.encode("utf-8"))
        name = doc.name.replace("\t", " ").replace("\n", " ")
        self._documents.append(f"{name}\t{len(ids)}\t{size}\n")
        self._bytes += size
        self._held.append(ids)
        self._num_held += len(ids)
        while self._num_held >= self._limit:
            held = np.concatenate(self._held)
            self._write(held[: self._limit])
            self._held, self._num_held = [held[self._limit :]], len(held) - self._limit

    def _write(self, ids: np.ndarray) -> None:
        name = f"{self._split}-{len(self._shards):05d}.bin"
        data = ids.astype(self._dtype).tobytes()
        (self._folder / name).write_bytes(data)
        self._shards.append({"file": name, "tokens": len(ids), "sha256": hashlib.sha256(data).hexdigest()})

    def close(self) -> dict[str, Any]:
        if self._num_held:
            self._write(np.concatenate(self._held))
        (self._folder / f"{self._split}-documents.tsv").write_text("".join(self._documents), encoding="utf-8")
        return {
            "documents": len(self._documents),
            "bytes": self._bytes,
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "shards": self._shards,
        }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shard folder; raises DataError if it is missing, damaged, or of another format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no {MANIFEST}; make token shards there with `whimbrel data`") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); make the shards again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise DataError(f"{path} has format {found}, this version reads {FORMAT}; make the shards again")
    return manifest


class TokenShards:
    """The tokens of one split as one long sequence, read from memory-mapped shards."""

    def __init__(self, folder: str | Path, split: str, *, verify: bool = True) -> None:
        """folder: made by `write_shards`. verify: also compare each shard's SHA-256, which reads it once.

        Raises DataError for a missing split, a missing, truncated or changed shard.
        """
        self.folder = Path(folder)
        self.split = split
        self.manifest = read_manifest(self.folder)
        try:
            splits = self.manifest["splits"]
            if split not in splits:
                raise DataError(f"{self.folder} has no split '{split}'; use one of {', '.join(splits)}")
            info = splits[split]
            self._dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
            self.vocab_size: int = self.manifest["vocab_size"]
            self.end_of_text: int = self.manifest["end_of_text"]
            self.num_bytes: int = info["bytes"]
            self.num_documents: int = info["documents"]
            self._maps = [
                self._open(shard["file"], shard["tokens"], shard["sha256"], verify) for shard in info["shards"]
            ]
            self.num_tokens: int = info["tokens"]
        except KeyError as error:
            raise DataError(
                f"{self.folder / MANIFEST} has no entry {error} for split '{split}'; make the shards again"
            ) from error
        self._ends = np.cumsum([len(m) for m in self._maps])
        found = int(self._ends[-1]) if self._maps else 0
        if found != self.num_tokens:
            raise DataError(
                f"{self.folder / MANIFEST} states {self.num_tokens} tokens for split '{split}', "
                f"its shards hold {found}; make the shards again"
            )

    def _open(self, name: str, tokens: int, sha256: str, verify: bool) -> np.ndarray:
        path = self.folder / name
        want = tokens * self._dtype.itemsize
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"token shard {path} cannot be read: {error.strerror}") from error
        if size != want:
            raise DataError(
                f"token shard {path} has {size} bytes, expected {want} for {tokens} tokens; make the shards again"
            )
        if verify and (found := sha256_file(path)) != sha256:
            raise DataError(f"token shard {path} has SHA-256 {found}, expected {sha256}; make the shards again")
        return np.memmap(path, dtype=self._dtype, mode="r")

    def __len__(self) -> int:
        return self.num_tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` - 1, int64 [stop - start]; raises IndexError outside 0 to `num_tokens`."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of split '{self.split}' with {self.num_tokens} tokens")
        out = np.empty(stop - start, dtype=np.int64)
        at = start
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while at < stop:
            first = int(self._ends[shard]) - len(self._maps[shard])
            part = self._maps[shard][at - first : stop - first]
            out[at - start : at - start + len(part)] = part
            at += len(part)
            shard += 1
        return out

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards; raises DataError if its file is not the one in the manifest."""
        return load_tokenizer(self.folder)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a shard folder; raises DataError if its file is missing or not the manifest's."""
    expected = read_manifest(Path(folder))["tokenizer"]
    path = Path(folder) / expected["file"]
    tokenizer = Tokenizer.load(path)
    found = sha256_file(path)
    if found != expected["sha256"]:
        raise DataError(f"tokenizer {path} has SHA-256 {found}, expected {expected['sha256']}; make the shards again")
    return tokenizer
