"""The callback for Trainer: equal to the merge of Trainer's checkpoints, resumed with them, loaded as a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from whimbrel.errors import CheckpointError
from whimbrel.integrations.hf.averaging import AveragingCallback
from whimbrel.merge import merge_checkpoints


def trainer(folder: Path, callback: AveragingCallback, *, steps: int, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": (ids := torch.randint(61, (12,), generator=draw)), "labels": ids} for _ in range(32)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    model = transformers.LlamaForCausalLM(config)
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])


def test_average_in_trainer(tmp_path: Path) -> None:
    whole = AveragingCallback(every=2, count=3, method="wma")
    with pytest.raises(CheckpointError, match="there is no average before training has begun"):
        _ = whole.average
    job = trainer(tmp_path / "whole", whole, steps=6)
    job.train()
    sources = [tmp_path / "whole" / f"checkpoint-{step}" for step in (2, 4, 6)]
    merge_checkpoints(sources, tmp_path / "merged", method="wma")
    expected, found = (load_file(p / "model.safetensors") for p in (tmp_path / "merged", tmp_path / "whole/average"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "average")
    ids = torch.arange(10)[None]
    with whole.average.swapped(), torch.no_grad():
        assert torch.equal(job.model.eval()(ids).logits, loaded.eval()(ids).logits)
    assert not torch.equal(job.model(ids).logits, loaded(ids).logits)
    # Cut off after four steps and resumed, the average is the same.
    first = trainer(tmp_path / "parts", AveragingCallback(every=2, count=3, method="wma"), steps=4)
    first.train()
    resumed = AveragingCallback(every=2, count=3, method="wma")
    trainer(tmp_path / "parts", resumed, steps=6).train(resume_from_checkpoint=True)
    assert resumed.average.steps == (2, 4, 6)
    parts = load_file(tmp_path / "parts" / "average" / "model.safetensors")
    assert all(torch.equal(expected[name], parts[name]) for name in expected)


def test_training_goes_on_from_a_merge(tmp_path: Path) -> None:
    trainer(tmp_path / "run", AveragingCallback(every=2), steps=4).train()
    sources = [tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4)]
    merge_checkpoints(sources, tmp_path / "on", optimizer="average")
    callback = AveragingCallback(every=2)
    job = trainer(tmp_path / "next", callback, steps=6)
    with pytest.warns(UserWarning, match=r"the average begins anew: .*checkpoint-4 holds none; where training resumes"):
        job.train(resume_from_checkpoint=str(tmp_path / "on"))
    assert job.state.global_step == 6
    assert callback.average.steps == (6,)
    assert {float(state["step"]) for state in job.optimizer.optimizer.state.values()} == {6.0}


def test_a_checkpoint_without_an_average(tmp_path: Path) -> None:
    trainer(tmp_path, AveragingCallback(every=2, count=3), steps=2).train()
    other = AveragingCallback(every=2, count=5)
    with pytest.warns(UserWarning, match=r"the average begins anew: .*checkpoint-2/whimbrel_average does not fit"):
        trainer(tmp_path, other, steps=4).train(resume_from_checkpoint=True)
    assert other.average.steps == (4,)
