"""Trainer with our optimizers, and LoRA of peft on the projections."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from whimbrel.errors import ConfigError
from whimbrel.integrations.hf import OptimizerFactory
from whimbrel.integrations.hf.fixtures.models import HYBRID, pair, tokens
from whimbrel.optim import AdamW, Fira, GaLore
from whimbrel.testing.budget import assert_close

MODEL = replace(HYBRID, init_std=0.02)
FIRA = {"kind": "fira", "lr": 1e-2, "rank": 4, "min_dim": 16, "refresh_steps": 2}
ROWS = [{"input_ids": row, "labels": row} for row in tokens(4, 16).repeat(6, 1)]


def trainer(model, folder, *, optimizer=FIRA, rows=ROWS, **options):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "lr_scheduler_type": "linear",
        "seed": 3,
    }
    arguments = transformers.TrainingArguments(**(defaults | options))
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        optimizer_cls_and_kwargs=(OptimizerFactory, optimizer),
    )


def losses(run):
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize(("kind", "expected"), [("fira", Fira), ("galore", GaLore), ("adamw", AdamW)])
def test_trainer_takes_each_optimizer(kind, expected, tmp_path):
    options = {"kind": "adamw", "lr": 1e-2} if kind == "adamw" else FIRA | {"kind": kind}
    run = trainer(pair(MODEL)[1], tmp_path, optimizer=options, save_strategy="no", max_steps=4)
    run.train()
    inner = run.optimizer.optimizer if hasattr(run.optimizer, "optimizer") else run.optimizer
    assert isinstance(inner, expected)
    assert losses(run)[-1] < losses(run)[0] - 0.1
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # the schedule has come to its end


def test_low_rank_state_is_that_of_all_linear_layers_but_the_head():
    model = pair(replace(MODEL, tie_embeddings=False))[1]
    groups = {group["name"]: group for group in OptimizerFactory()(model, **FIRA).param_groups}
    low_rank = {id(p) for p in groups["low_rank"]["params"]}
    for name, p in model.named_parameters():
        inside = name.startswith("blocks.") and p.dim() == 2 and min(p.shape) >= 16
        assert (id(p) in low_rank) == inside, name
    only = OptimizerFactory()(model, **FIRA, targets="*mlp*").param_groups[0]["params"]
    assert len(only) == 3 * MODEL.num_layers


def test_low_rank_state_in_a_model_of_transformers():
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4
        )
    )
    groups = {group["name"]: group["params"] for group in OptimizerFactory()(llama, **FIRA).param_groups}
    assert len(groups["low_rank"]) == 2 * 7
    assert {id(p) for p in groups["decay"]} == {id(llama.lm_head.weight), id(llama.model.embed_tokens.weight)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fria"}, r"kind = 'fria' is not known; did you mean 'fira'\?"),
        ({"kind": "fira", "rnak": 3}, r"unknown setting 'optim.rnak'; did you mean 'rank'\?"),
        ({"kind": "fira", "targets": "layers.*"}, r"low_rank pattern 'layers.\*' matches no parameter"),
    ],
)
def test_the_factory_says_what_is_wrong(options, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerFactory()(pair(MODEL)[1], **options)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    whole = trainer(pair(MODEL)[1], tmp_path / "whole")
    whole.train()
    resumed = trainer(pair(MODEL)[1], tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert losses(whole)[3:] == losses(resumed)[-3:]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "resumed" / "checkpoint-6")
    assert torch.equal(loaded.embed.weight, whole.model.embed.weight)


def test_accumulated_and_checkpointed_steps_are_the_same_steps(tmp_path):
    """Rows with different numbers of targets: the loss must be divided by those of the whole step."""
    rows = [row | {"labels": row["labels"].where(torch.arange(16) >= 3 * (i % 5), -100)} for i, row in enumerate(ROWS)]
    options = {"rows": rows, "save_strategy": "no", "max_steps": 3}
    whole = trainer(pair(MODEL)[1], tmp_path, **options)
    whole.train()
    parts = trainer(
        pair(MODEL)[1],
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        **options,
    )
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_lora_trains_the_projections_alone(tmp_path):
    peft = pytest.importorskip("peft")
    own, model = pair(MODEL)
    ids = tokens(2, 20)
    before = own(ids).logits
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    layers = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 2 * 5 + 2 * 4  # a recurrent block has a gate besides
    assert torch.equal(adapted(ids).logits, before)
    trainer(adapted, tmp_path, optimizer={"kind": "adamw", "lr": 1e-2}, save_strategy="no").train()
    adapted.eval()
    after = adapted(ids).logits
    assert not torch.allclose(after, before, atol=1e-3)
    frozen = {name for name, p in adapted.named_parameters() if not p.requires_grad}
    state = own.state_dict()
    for name in frozen:
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(adapted.get_parameter(name), state["embed.weight" if plain == "head.weight" else plain]), (
            name
        )
    assert adapted.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 24)

    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(pair(MODEL)[1], tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, after)
    assert_close("merged", after, again.merge_and_unload()(ids).logits, 1e-5)
