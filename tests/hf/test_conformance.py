"""What transformers and lm-eval may ask of a guest beyond the other tests here; docs/conformance.md lists all of it."""

from __future__ import annotations

import copy
import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

import whimbrel.integrations.hf
from whimbrel.errors import DataError
from whimbrel.integrations.hf import WhimbrelCache, prefill_report
from whimbrel.integrations.hf.attention import sparse_attention_forward, sparse_attention_mask
from whimbrel.integrations.hf.fixtures.models import HYBRID, pair, tokens
from whimbrel.testing.budget import assert_close

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_may_be_imported_again():
    importlib.reload(whimbrel.integrations.hf)
    assert type(transformers.AutoConfig.for_model("whimbrel")).__name__ == "WhimbrelConfig"


def test_an_attention_function_that_is_not_known_is_refused_early():
    _, model = pair()
    with pytest.raises(ValueError, match="whimbrel_sparce"):
        model.set_attn_implementation("whimbrel_sparce")


def test_a_padded_prompt_costs_no_square_of_its_length():
    """A mask of queries by keys would take 16 GiB for one prompt of 128k tokens."""
    padded = torch.ones(2, 131_072, dtype=torch.bool)
    padded[1, :5] = False
    mask = sparse_attention_mask(2, 131_072, 131_072, attention_mask=padded)
    assert mask.shape == (2, 131_072)
    assert sparse_attention_mask(2, 131_072, 131_072, attention_mask=padded | True) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": 0.1}, "training"),
        ({"is_causal": False}, "not causal"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 4, 9, 9)}, "position_bias"),
        ({"min_length": 10}, "fewer than 10 keys"),
        ({"min_length": 9}, "sparse"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_changes_scores_runs_dense_and_is_counted(options, reason, monkeypatch):
    """Where the dense function of the release at hand has no such option either, it is not called here."""
    from whimbrel.integrations.hf import attention

    called = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **given: called.append(given) or (None, None))
    module = pair(HYBRID)[1].blocks[1].mixer
    options = dict(options)
    module.config.prefill = {"kind": "window", "window_tokens": 8, "sink_tokens": 8, "block_size": 8}
    module.config.prefill_options = {"min_length": options.pop("min_length", 0)}
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    sparse_attention_forward(module, q, k, k, None, **options)
    assert prefill_report(module)[""].calls == {reason: 1}
    assert bool(called) == (reason != "sparse")
    for name, value in options.items():
        assert called[0][name] is value, "the dense function must hear of it"


def test_a_state_that_was_put_away_goes_on():
    _, model = pair()
    ids = tokens(2, 12)
    with torch.no_grad():
        expected = model(ids).logits[:, 8:]
        cache = WhimbrelCache(model.config)
        model(ids[:, :8], past_key_values=cache)
        kept = copy.deepcopy(cache)
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        assert_close("offloaded", expected, model(ids[:, 8:], past_key_values=cache).logits, 1e-5)
        assert kept.get_seq_length() == 8
        assert kept.get_mask_sizes(4, 0) == (12, 0)
        assert_close("copied", expected, model(ids[:, 8:], past_key_values=kept).logits, 1e-5)


def test_processes_of_trainer_train_as_one_does(tmp_path):
    """Rows of unequal length on two processes: a loss divided by one's own tokens would come out wrong or doubled."""
    pytest.importorskip("accelerate")
    from tests.hf.ddp import train

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"PYTHONPATH": os.pathsep.join([str(ROOT), common.get("PYTHONPATH", "")]), "WORLD_SIZE": "2"}
    call = [sys.executable, "-m", "tests.hf.ddp", str(tmp_path)]
    children = [
        subprocess.Popen(call, env={**common, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    one = train(tmp_path / "one", 4)
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors[-3000:]
    two = json.loads((tmp_path / "found.json").read_text())
    assert (one["world"], two["world"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, values in one["weights"].items():
        assert two["weights"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


def test_lm_eval_loads_the_type_by_itself(tmp_path):
    """`model="hf"` and a folder, once our package has been imported."""
    lm_eval = pytest.importorskip("lm_eval")
    from dataclasses import replace

    from tests.hf.test_lm_eval import _bytes_tokenizer
    from whimbrel.integrations.lm_eval import TASK_FOLDER
    from whimbrel.integrations.lm_eval.harness import evaluate_folder

    pair(replace(HYBRID, vocab_size=256))[1].save_pretrained(tmp_path)
    _bytes_tokenizer().save_pretrained(tmp_path)
    settings = {"tokenizer": str(tmp_path), "max_seq_lengths": [16], "num_samples": 2, "seed": 1, "words": "english"}
    manager = lm_eval.tasks.TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata=settings)
    arguments = {"pretrained": str(tmp_path), "max_length": 512}
    given = {"model_args": arguments, "device": "cpu", "task_manager": manager, "bootstrap_iters": 10}
    found = lm_eval.simple_evaluate(model="hf", tasks=["whimbrel_needle_single"], **given)["results"]
    ours = evaluate_folder(tmp_path, ["whimbrel_needle_single"], lengths=(16,), num_samples=2, seed=1)["results"]
    for name in ("accuracy,none", "accuracy_16,none"):
        assert found["whimbrel_needle_single"].get(name) == ours["whimbrel_needle_single"].get(name)


def test_what_a_task_of_lm_eval_lacks_is_named_in_one_line(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from whimbrel.integrations.lm_eval import harness

    def offline(**_):
        raise ConnectionError("Couldn't reach 'hazyresearch/based-fda' on the Hub\nand more")

    monkeypatch.setattr(lm_eval, "simple_evaluate", offline)
    message = (
        r"cannot load what one of the tasks fda needs: Couldn't reach 'hazyresearch/based-fda' on the Hub; leave that"
    )
    with pytest.raises(DataError, match=message) as raised:
        harness._evaluate(None, ["fda"], None, 0, None)
    assert "\n" not in str(raised.value)


def test_rulers_generated_tasks_need_no_network(tmp_path, monkeypatch):
    """With the settings that our bridge gives them; of the 500 documents of each length 3 are made here."""
    pytest.importorskip("lm_eval")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_args, **_kwargs: False)  # lm-eval tries as it is imported
    import datasets
    from lm_eval.tasks.ruler import fwe_utils, niah_utils

    from tests.hf.test_lm_eval import _bytes_tokenizer

    def refuse(*_args, **_kwargs):
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for module, name in ((niah_utils, "generate_samples"), (fwe_utils, "sys_kwext")):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, make=make, **given: make(*a, **given | {"num_samples": 3}))
    tokenizer = _bytes_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    sizes = {"tokenizer": str(tmp_path), "max_seq_lengths": [4096]}
    for make in (niah_utils.niah_single_1, niah_utils.niah_multikey_2, fwe_utils.fwe_download):
        docs = make(**sizes)["test"]
        assert len(docs) == 3
        for doc in docs:
            assert 2000 < len(tokenizer(doc["input"]).input_ids) <= 4096
            assert all(str(answer) in doc["input"] for answer in doc["outputs"])
