"""The tokenizer: lossless, deterministic, single digits, reserved symbols, bytes accounted for."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.data.tokenizer import END_OF_TEXT, KEY_TOKENS, MIN_VOCAB, SPECIAL_TOKENS, VALUE_TOKENS, Tokenizer
from whimbrel.errors import ConfigError, DataError, UnsupportedError
from whimbrel.testing.text import make_documents

TEXTS = [doc.text for doc in make_documents(3)]
TOKENIZER = Tokenizer.train(TEXTS, vocab_size=MIN_VOCAB + 80)


@given(st.text(max_size=60))
def test_text_comes_back_and_its_bytes_are_counted(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.token_bytes[ids].sum() == len(text.encode("utf-8"))
    assert not np.isin(ids, np.arange(len(SPECIAL_TOKENS))).any()


def test_a_batch_equals_its_texts_one_by_one():
    for one, together in zip(map(TOKENIZER.encode, TEXTS), TOKENIZER.encode_batch(TEXTS), strict=True):
        assert np.array_equal(one, together)


def test_special_tokens_that_are_spelt_out_stay_text():
    text = f"a{END_OF_TEXT}b {KEY_TOKENS[0]}"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.end_of_text not in ids
    assert TOKENIZER.decode(ids) == text


def test_digits_stand_alone():
    tokens = [TOKENIZER.decode([i]) for i in Tokenizer.train(["1234 " * 99], vocab_size=MIN_VOCAB + 9).encode("1234")]
    assert tokens == ["1", "2", "3", "4"]


def test_merges_are_learnt():
    assert len(TOKENIZER.encode(TEXTS[0])) < 0.7 * len(TEXTS[0].encode("utf-8"))
    assert TOKENIZER.vocab_size == MIN_VOCAB + 80


def test_training_depends_on_the_text_alone(tmp_path):
    """Also in another process without parallel counting."""
    code = (
        "from whimbrel.data.tokenizer import *; from whimbrel.testing.text import make_documents;"
        "print(Tokenizer.train([d.text for d in make_documents(3)], vocab_size=MIN_VOCAB + 80).sha256)"
    )
    env = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == TOKENIZER.sha256


def test_saved_and_loaded_is_the_same(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.sha256 == TOKENIZER.sha256
    assert np.array_equal(loaded.encode(TEXTS[1] + END_OF_TEXT), TOKENIZER.encode(TEXTS[1] + END_OF_TEXT))
    assert np.array_equal(loaded.token_bytes, TOKENIZER.token_bytes)


def test_symbols_are_reserved_ids_and_fillers_are_all_text():
    symbols = TOKENIZER.symbols
    assert [TOKENIZER.decode([i]) for i in symbols.keys] == list(KEY_TOKENS)
    assert [TOKENIZER.decode([i]) for i in symbols.values] == list(VALUE_TOKENS)
    together = np.concatenate([symbols.keys, symbols.values, symbols.fillers, [TOKENIZER.end_of_text]])
    assert sorted(together) == list(range(TOKENIZER.vocab_size))


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ConfigError) as caught:
        Tokenizer.train(TEXTS, vocab_size=384)
    assert str(caught.value) == (
        f"vocab_size = 384 is not allowed; use at least {MIN_VOCAB} "
        f"({len(SPECIAL_TOKENS)} special tokens and 256 bytes)"
    )


def test_missing_and_damaged_files_are_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer .*tokenizer.json cannot be read: No such file"):
        Tokenizer.load(path)
    path.write_text(TOKENIZER.to_json()[:500])
    with pytest.raises(DataError, match=r"tokenizer .*tokenizer.json is damaged: "):
        Tokenizer.load(path)


def test_a_foreign_tokenizer_needs_a_separator_and_may_lack_symbols():
    from tokenizers import Tokenizer as Core
    from tokenizers import models

    core = Core(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(DataError, match=r"the tokenizer has no token <\|endoftext\|>, which separates documents"):
        Tokenizer(core)
    core.add_special_tokens([END_OF_TEXT])
    with pytest.raises(UnsupportedError) as caught:
        _ = Tokenizer(core).symbols
    assert str(caught.value) == (
        "the tokenizer reserves no tokens <|key-00|> .. <|value-63|> for recall tasks; train one with "
        "`whimbrel data`, or set data.recall_fraction = 0 and leave the recall tasks out"
    )
