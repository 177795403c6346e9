"""torchtitan as the engine, in two processes on a CPU, against `whimbrel train` in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan", reason="needs the extra `titan`")
pytest.importorskip("triton", reason="torchtitan needs triton")

from whimbrel.config import Config, to_toml, with_overrides
from whimbrel.data import prepare
from whimbrel.errors import ConfigError, UnsupportedError
from whimbrel.infer.load import load_model
from whimbrel.training.loop import train
from whimbrel.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A hybrid of two blocks over token shards, with an average of its last two steps."""
    from whimbrel.config import load_config
    from whimbrel.testing.tiny import tiny_overrides, write_corpus

    folder = tmp_path_factory.mktemp("titan")
    plain = load_config("demo", tiny_overrides(write_corpus(folder / "text")))
    prepare(plain.data, folder / "shards", vocab_size=plain.model.vocab_size, quiet=True)
    online = {"averaging.online.every_steps": 1, "averaging.online.count": 2, "averaging.online.windows": 1}
    return with_overrides(
        plain, {"steps": 4, "data.corpus": str(folder / "shards"), "eval.checkpoint_tokens": 0, **online}
    )


@pytest.fixture(scope="module")
def own(config: Config, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """Step, loss and gradient norm of `whimbrel train` in one process."""
    folder = tmp_path_factory.mktemp("own") / "run"
    train(config, run_dir=folder, quiet=True)
    return [[line["step"], line["loss"], line["grad_norm"]] for line in read_metrics(folder) if "loss" in line]


@pytest.fixture(scope="module")
def jobs(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have run all jobs: they are slow to start, so all tests share them."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "run.toml").write_text(to_toml(config))
    start(folder, 2)
    return folder


def start(folder: Path, world: int) -> None:
    common = {**os.environ, "TITAN_TOML": str(folder / "run.toml"), "WORLD_SIZE": str(world)}
    common |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"log{rank}").open("w+") for rank in range(world)]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.titan.worker", str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    statuses = [child.wait(timeout=240) for child in children]
    for rank, (status, log) in enumerate(zip(statuses, logs, strict=True)):
        log.seek(0)
        assert status == 0, f"process {rank}: {log.read()[-4000:]}"
        log.close()


def result(jobs: Path, name: str) -> Any:
    return json.loads((jobs / f"{name}.json").read_text())


def assert_close(found: list[list[float]], wanted: list[list[float]]) -> None:
    assert [step for step, *_ in found] == [step for step, *_ in wanted]
    for (step, *values), (_, *expected) in zip(found, wanted, strict=True):
        assert values == pytest.approx(expected, rel=2e-5), f"step {step}"


def test_two_processes_train_as_whimbrel_does(jobs: Path, own: list[list[float]]) -> None:
    """Gradients divided once too often, by the processes, would show in their norm."""
    assert_close(result(jobs, "whole"), own)


def test_a_run_that_stopped_goes_on_bit_for_bit(jobs: Path) -> None:
    assert result(jobs, "parts") == result(jobs, "whole")[2:]
    assert result(jobs, "parts_equal") is True
    assert result(jobs, "average_equal") is True


def test_what_two_processes_saved_goes_on_in_one(jobs: Path, own: list[list[float]]) -> None:
    step = Path("checkpoint") / "step-2"
    shutil.copytree(jobs / "parts" / step, jobs / "alone" / step)
    start(jobs, 1)
    assert_close(result(jobs, "alone"), own[2:])


def test_every_process_has_its_own_part_of_the_weights(jobs: Path) -> None:
    """A shard that is drawn by each process from one seed holds the numbers of the others."""
    assert result(jobs, "drawn_equal") is True


def test_a_step_with_gradients_of_zero_before_training_changes_nothing(jobs: Path) -> None:
    """torchtitan takes one to make the state; a basis fitted to it would be one of nothing."""
    assert result(jobs, "primed") == {"steps": [0], "unchanged": True}


def test_an_override_puts_our_optimizer_into_a_job(jobs: Path) -> None:
    """And training goes as it does where no such step was taken."""
    assert result(jobs, "override") == result(jobs, "whole")[:3]


def test_sequences_are_shared(jobs: Path, own: list[list[float]]) -> None:
    assert_close(result(jobs, "context"), own[:3])


def test_projections_are_split(jobs: Path, own: list[list[float]]) -> None:
    assert_close(result(jobs, "tensor"), own[:3])


def test_the_last_checkpoint_is_a_model(jobs: Path, config: Config, tmp_path: Path) -> None:
    """Of Whimbrel's own and, after `whimbrel convert`, of transformers."""
    last = jobs / "tensor" / "checkpoint" / "step-3"
    model = load_model(last)
    tokens = torch.arange(40)[None] % config.model.vocab_size
    transformers = pytest.importorskip("transformers")
    from whimbrel.integrations.hf import convert_checkpoint

    convert_checkpoint(last, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, model(tokens).logits)
    expected = result(jobs, "loss_of_export")
    targets = tokens.roll(-1, 1)
    assert float(model.loss(tokens, targets).detach()) == pytest.approx(expected, rel=1e-5)


def test_the_average_is_a_model(jobs: Path, config: Config) -> None:
    average = load_model(jobs / "whole" / "average")
    assert average.config == config.model


def test_what_is_refused(config: Config) -> None:
    import tests.titan.cpu  # noqa: F401
    from whimbrel.integrations.titan.data import TokenData
    from whimbrel.integrations.titan.parallelize import parallelize, share_sequences
    from whimbrel.model import build_model

    class Job:
        spmd_backend = "spmd_types"

    with pytest.raises(UnsupportedError, match=r"spmd_backend = 'spmd_types' is not supported; use 'partial_dtensor'"):
        parallelize(None, parallel_dims=None, parallelism=Job, compile_config=None, ac_config=None)
    odd = TokenData.Config(dataset_path=config.data.corpus, batch_sequences=6)
    with pytest.raises(ConfigError, match=r"local_batch_size = 2 does not divide the 3 sequences of each of 2"):
        TokenData(odd, dp_world_size=2, dp_rank=0, seq_len=64, local_batch_size=2)
    other = with_overrides(config, {"model.mixer": {"kind": "gdn-sum", "num_heads": 2, "head_dim": 16}})
    with pytest.raises(UnsupportedError, match=r"block 0 .* cannot share a sequence with other processes"):
        share_sequences(build_model(other.model), _Mesh())


class _Mesh:
    def get_group(self) -> None:
        return None


def test_data_goes_on_at_any_number_of_processes(config: Config) -> None:
    from whimbrel.integrations.titan.data import TokenData

    settings = TokenData.Config(dataset_path=config.data.corpus, batch_sequences=4, seed=3)

    def loaders(world: int, rows: int) -> list[TokenData]:
        return [
            TokenData(settings, dp_world_size=world, dp_rank=rank, seq_len=64, local_batch_size=rows)
            for rank in range(world)
        ]

    def step(iterators: list[Any], parts: int) -> torch.Tensor:
        return torch.cat([next(it)[0]["input"] for it in iterators for _ in range(parts)])

    two = loaders(2, 1)
    running = [iter(data) for data in two]
    batches = [step(running, 2) for _ in range(3)]
    (one,) = loaders(1, 4)
    one.load_state_dict(two[1].state_dict())
    assert one.step == 3
    fourth = step(running, 2)
    assert torch.equal(step([iter(one)], 1), fourth)
    assert not any(torch.equal(fourth, batch) for batch in batches)
