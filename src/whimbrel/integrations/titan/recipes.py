"""A run of Whimbrel as a job of torchtitan: the same model, data, optimizer, schedule and average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config.configs import DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.protocols.model_spec import ModelSpec

from whimbrel.config import Config, encode, to_toml
from whimbrel.integrations.titan.data import TitanTokenizer, TokenData
from whimbrel.integrations.titan.model import Adapter, TitanDecoder
from whimbrel.integrations.titan.optim import Schedules, WhimbrelOptimizers
from whimbrel.integrations.titan.parallelize import parallelize
from whimbrel.integrations.titan.trainer import SummedLoss, TitanTrainer


def trainer_config(config: Config, **changes: Any) -> TitanTrainer.Config:
    """The job that trains as `whimbrel train` would with `config`; every flag of torchtitan changes it further.

    `config.data.corpus` names a folder of token shards, made by `whimbrel data`. `micro_batch_tokens` becomes
    training.local_batch_size. `changes` are fields of the result.
    """
    corpus = Path(config.data.corpus)
    optim = encode(config.optim)
    whole = config.batch_sequences
    rows = config.micro_batch_tokens // config.data.seq_len
    fields: dict[str, Any] = {
        "model_spec": ModelSpec(
            name="whimbrel",
            flavor=config.name,
            model=TitanDecoder.Config(
                table=encode(config.model), seed=config.seed, autocast=config.dtype == "bfloat16"
            ),
            parallelize_fn=parallelize,
            pipelining_fn=None,
            post_optimizer_build_fn=None,
            state_dict_adapter=Adapter,
        ),
        "hf_assets_path": "",
        "dump_folder": f"runs/{config.name}-titan",
        "loss": SummedLoss.Config(),
        "tokenizer": TitanTokenizer.Config(path=str(corpus / "tokenizer.json")),
        "dataloader": TokenData.Config(
            dataset_path=str(corpus),
            batch_sequences=whole,
            seed=config.seed,
            recall_fraction=config.data.recall_fraction,
            recall_warmup_steps=config.data.recall_warmup_steps,
        ),
        "optimizer": WhimbrelOptimizers.Config(kind=optim.pop("kind"), options=optim),
        "lr_scheduler": Schedules.Config(schedule=config.schedule),
        "training": TrainingConfig(
            local_batch_size=rows or 1,
            global_batch_size=whole,
            seq_len=config.data.seq_len,
            max_norm=config.clip_grad_norm or float("inf"),
            steps=config.steps,
            disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        "parallelism": ParallelismConfig(spmd_backend="partial_dtensor", context_parallel_load_balancer=None),
        "checkpoint": CheckpointManager.Config(
            enable=True,
            interval=config.checkpoint.every_steps,
            keep_latest_k=config.checkpoint.keep,
            last_save_model_only=False,
        ),
        "activation_checkpoint": None,
        "metrics": MetricsProcessor.Config(log_freq=config.log_every),
        "debug": DebugConfig(seed=config.seed, enable_structured_logging=False),
        "average": config.averaging.online,
        "run_toml": to_toml(config),
    }
    return TitanTrainer.Config(**{**fields, **changes})
