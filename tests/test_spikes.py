"""A run that blows up and is carried through: detection, skipped batches, the way back to an average, resuming."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from whimbrel.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from whimbrel.config import Config, SpikesConfig, to_toml, with_overrides
from whimbrel.errors import CheckpointError, ConfigError, TrainingError
from whimbrel.merge import SpikeDetector, load_average, merge_checkpoints
from whimbrel.model import build_model
from whimbrel.training import loop
from whimbrel.training.loop import train
from whimbrel.training.metrics import read_metrics
from whimbrel.training.recovery import read_events

SPIKES = {
    "spikes.action": "restart",
    "spikes.window": 16,
    "spikes.patience": 4,
    "spikes.margin_steps": 2,
    "spikes.checkpoints": 3,
}


@pytest.fixture
def spiky(tiny: Config) -> Config:
    return with_overrides(tiny, {"steps": 48, "checkpoint.every_steps": 4, "eval.checkpoint_tokens": 0, **SPIKES})


@pytest.fixture
def blow_up(monkeypatch: pytest.MonkeyPatch):
    """Steps 33 to 34 are taken with an absurd learning rate, the first `times` times that the run comes by."""
    real = loop.learning_rate_factor

    def start(times: int) -> None:
        left = {32: times, 33: times}

        def factor(step: int, *args, **kwargs) -> float:
            if left.get(step, 0) > 0:
                left[step] -= 1
                return 300.0
            return real(step, *args, **kwargs)

        monkeypatch.setattr(loop, "learning_rate_factor", factor)

    return start


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}


@pytest.mark.parametrize("policy", ["average", "newest", "reset"])
def test_a_blow_up_is_carried_through(spiky: Config, tmp_path: Path, blow_up, policy: str) -> None:
    blow_up(1)
    config = with_overrides(spiky, {"spikes.optimizer": policy, "spikes.rewarm_steps": 4})
    with pytest.warns(UserWarning, match=r"the loss has collapsed: .*going on from step \d+ with the average of step-"):
        result = train(config, run_dir=tmp_path / "run", quiet=True)
    assert (result.step, result.restarts) == (48, 1)
    restart = next(event for event in read_events(tmp_path / "run") if event["event"] == "restart")
    assert restart["onset"] in (34, 35)
    assert restart["back_to"] == 28
    assert restart["averaged"] == ["step-000020", "step-000024", "step-000028"]
    assert restart["optimizer"] == policy
    found = losses(tmp_path / "run")
    assert sorted(found) == list(range(1, 49))
    before = sum(found[step] for step in range(25, 29)) / 4
    assert max(found[step] for step in range(29, 49)) < before * 1.05
    aside = tmp_path / "run" / "before-restart-1"
    assert [path.name for path in list_checkpoints(aside)] == ["step-000028", "step-000032", "step-000036"]
    assert max(losses(aside).values()) > before * 1.25
    sources = [tmp_path / "run" / name for name in restart["averaged"][:2]]
    merge_checkpoints([*sources, aside / "step-000028"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    went_on_from = load_file(tmp_path / "run" / "step-000028" / "model.safetensors")
    assert all(torch.equal(merged[name], went_on_from[name]) for name in merged)


def test_without_the_restart_the_same_run_stays_above(spiky: Config, tmp_path: Path, blow_up) -> None:
    """The blow-up is one that does not heal by itself, so the test above has something to show."""
    blow_up(1)
    train(with_overrides(spiky, {"spikes.action": "log"}), run_dir=tmp_path / "run", quiet=True)
    found = losses(tmp_path / "run")
    assert min(found[step] for step in range(36, 49)) > 1.25 * found[28]
    assert [event["event"] for event in read_events(tmp_path / "run")] == ["spike"]


@pytest.mark.filterwarnings("ignore:the loss has collapsed")
def test_a_run_stopped_after_a_restart_goes_on_as_if_it_had_not_been(spiky: Config, tmp_path: Path, blow_up) -> None:
    config = with_overrides(
        spiky, {"spikes.skip_data": True, "spikes.rate_factor": 0.5, "averaging.online.every_steps": 4}
    )
    for name, stops in (("whole", [48]), ("parts", [40, 48])):
        blow_up(1)
        for stop in stops:
            result = train(with_overrides(config, {"steps": stop}), run_dir=tmp_path / name, quiet=True)
        assert result.restarts == 1
    for name in ("step-000048", "average-000048"):
        whole, parts = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole), name


SCRIPT = """
import sys
from pathlib import Path
from whimbrel.config import load_config
from whimbrel.training import loop
real, left = loop.learning_rate_factor, {14: 1, 15: 1}
def factor(step, *args, **kwargs):
    if left.pop(step, 0):
        return 300.0
    return real(step, *args, **kwargs)
loop.learning_rate_factor = factor
loop.train(load_config(sys.argv[1]), run_dir=sys.argv[2], quiet=True)
"""


def test_two_processes_go_back_together(spiky: Config, tmp_path: Path) -> None:
    """FSDP2 over gloo: sharded weights, moments and average; both go back to the same average and go on alike."""
    settings = {"steps": 24, "spikes.window": 8, "averaging.online.every_steps": 4, "averaging.online.count": 3}
    (tmp_path / "config.toml").write_text(to_toml(with_overrides(spiky, settings)))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, *(str(tmp_path / name) for name in ("script.py", "config.toml", "run"))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    running = []
    for rank in ("0", "1"):
        env = os.environ | place | {"RANK": rank, "LOCAL_RANK": rank}
        running.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    run = tmp_path / "run"
    events = [event for event in read_events(run) if event["event"] == "restart"]
    assert len(events) == 1
    before = run / "before-restart-1"
    assert events[0]["averaged"] == ["step-000004", "step-000008", "step-000012"]
    merge_checkpoints([run / "step-000004", run / "step-000008", before / "step-000012"], tmp_path / "merged")
    merged, went_on = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", run / "step-000012"))
    assert all(torch.equal(merged[name], went_on[name]) for name in merged)
    found = losses(run)
    assert found[24] < 1.05 * found[12] < 0.9 * max(losses(before).values())
    # The average that was kept: of the newest samples, the one taken before the restart among them.
    average = load_file(run / "average-000024" / "model.safetensors")
    steps = json.loads((run / "average-000024" / "merge.json").read_text())["steps"]
    paths = [(before if step == 12 else run) / f"step-{step:06d}" for step in steps]
    merge_checkpoints(paths, tmp_path / "offline")
    offline = load_file(tmp_path / "offline" / "model.safetensors")
    assert all(torch.equal(offline[name], average[name]) for name in offline)


def test_too_many_restarts_end_the_run(spiky: Config, tmp_path: Path, blow_up) -> None:
    blow_up(2)
    config = with_overrides(spiky, {"spikes.max_restarts": 1})
    message = r"after spikes.max_restarts = 1 restarts; lower optim.lr or"
    with pytest.warns(UserWarning, match="going on from step 28"), pytest.raises(TrainingError, match=message):
        train(config, run_dir=tmp_path / "run", quiet=True)
    assert len(list_checkpoints(tmp_path / "run")) > 0


def test_a_collapse_before_the_first_checkpoint(spiky: Config, tmp_path: Path, blow_up) -> None:
    blow_up(1)
    config = with_overrides(spiky, {"checkpoint.every_steps": 40})
    with pytest.raises(TrainingError, match=r"no checkpoint lies 2 steps or more before that; save more often"):
        train(config, run_dir=tmp_path / "run", quiet=True)


def test_batches_that_are_not_finite_are_left_out(spiky: Config, tmp_path: Path, monkeypatch) -> None:
    real = loop.build_model

    def poisoned(*args, **kwargs):
        model = real(*args, **kwargs)
        calls = iter(range(1000))
        model.blocks[1].mlp.down.weight.register_hook(
            lambda grad: grad * float("nan") if next(calls) in (10, 20, 21) else grad
        )
        return model

    monkeypatch.setattr(loop, "build_model", poisoned)
    config = with_overrides(spiky, {"steps": 30, "spikes.action": "skip"})
    train(config, run_dir=tmp_path / "run", quiet=True)
    events = read_events(tmp_path / "run")
    assert [(event["event"], event["step"]) for event in events] == [("skip", 11), ("skip", 21), ("skip", 22)]
    assert events[0]["grad_norm"] is None
    strict = with_overrides(config, {"spikes.max_skips": 1})
    with pytest.raises(TrainingError, match="step 22: loss = "):
        train(strict, run_dir=tmp_path / "strict", quiet=True)


def test_checkpoints_that_are_not_kept() -> None:
    with pytest.raises(
        ConfigError, match=r"checkpoint.keep = 2 leaves fewer than spikes.checkpoints = 3 to go back to"
    ):
        with_overrides(Config(), {"spikes.action": "restart", "checkpoint.keep": 2})


def detector(**settings) -> SpikeDetector:
    found = SpikeDetector(SpikesConfig(**{"action": "restart", "window": 20, "patience": 3, **settings}))
    for step in range(1, 41):
        wave = 1 + 0.02 * math.sin(step)
        assert found.check(step, 3.0 * wave, 1.0 * wave).action == "none"
    return found


def test_scores_are_deviations_of_the_logarithm() -> None:
    """Of ten values the median is that of a normal distribution's mean, 1.4826 times the deviation its spread."""
    found = SpikeDetector(SpikesConfig(window=10, creep=10.0))
    logs = [0.1 * i for i in range(10)]
    for step, value in enumerate(logs, start=1):
        assert found.check(step, math.exp(value), math.exp(2 * value)).action == "none"
    verdict = found.check(11, math.exp(0.45 + 3), math.exp(0.9 + 3))
    assert verdict.loss_score == pytest.approx(3 / (1.4826 * 0.25))
    assert verdict.norm_score == pytest.approx(3 / (1.4826 * 0.5))


def test_detector_escalates_and_heals() -> None:
    found = detector()
    first = found.check(41, 3.6, 1.0)
    assert (first.action, first.onset, first.is_first) == ("log", 41, True)
    assert first.loss_score > 6
    assert not found.check(42, 3.6, 1.0).is_first
    for step in range(43, 48):
        assert found.check(step, 3.0, 1.0).action == "none"
    again = found.check(48, 3.0, 50.0)
    assert (again.action, again.onset, again.is_first) == ("skip", 48, True)


def test_detector_goes_back_only_for_a_loss_that_stays_far_up() -> None:
    found = detector()
    assert [found.check(step, 3.5, 1.0).action for step in range(41, 61)] == ["log"] * 20
    found = detector()
    assert [found.check(step, 6.0, 1.0).action for step in range(41, 44)] == ["log", "log", "restart"]


def test_detector_sees_a_collapse_that_takes_its_bounds_along() -> None:
    """Each step is within the range of those before it; the way back begins where the loss was lowest."""
    found = detector(creep=1.5)
    verdicts = {step: found.check(step, 3.0 * 1.01 ** (step - 41), 1.0) for step in range(41, 100)}
    first = next(step for step, verdict in verdicts.items() if verdict.action != "none")
    assert 3.0 * 1.01 ** (first - 42) < 1.5 * 3.0 * 1.02
    assert verdicts[first].loss_score < 6
    assert 20 <= verdicts[first].onset <= 51 < first
    assert verdicts[first + 2].action == "restart"
    assert not any(v.action != "none" for v in map(detector(creep=10.0).check, verdicts, [3.0] * 59, [1.0] * 59))


def test_detector_of_a_run_from_before_it_knew_its_lowest_median() -> None:
    state = detector().state_dict()
    del state["lowest"]
    found = SpikeDetector(SpikesConfig(window=20))
    found.load_state_dict(state)
    assert found.check(41, 3.0, 1.0).action == "none"


def test_detector_on_values_that_are_not_finite() -> None:
    found = detector(max_skips=1)
    assert [found.check(step, math.nan, 1.0).action for step in (41, 42)] == ["skip", "restart"]
    assert detector(action="log").check(41, math.inf, math.inf).action == "log"


def test_detector_goes_on_from_its_state() -> None:
    one, other = detector(), SpikeDetector(SpikesConfig(action="restart", window=20, patience=3))
    one.check(41, 6.0, 1.0)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step in range(42, 48):
        assert one.check(step, 6.0, 1.0) == other.check(step, 6.0, 1.0)


def test_counters_are_the_newest_ones_even_where_they_look_like_a_moment(tmp_path: Path) -> None:
    """Adam's step of a parameter without dimensions has the parameter's shape."""
    model = torch.nn.Module()
    model.gain = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    paths = []
    for step in (1, 2):
        (model.gain * step).backward()
        optimizer.step()
        state = {"step": step, "tokens": step, "model": model, "optimizer": optimizer}
        paths.append(save_checkpoint(tmp_path, **state, extra={}, config_toml=""))
    moments = [0.1 * 1, 0.9 * 0.1 * 1 + 0.1 * 3]
    load_average(paths, model=model, optimizer=optimizer)
    assert float(optimizer.state[model.gain]["step"]) == 2
    assert float(optimizer.state[model.gain]["exp_avg"]) == pytest.approx(sum(moments) / 2)


def test_average_of_optimizer_states(tiny: Config, tmp_path: Path) -> None:
    """Moments in the parameter's coordinates are averaged; bases, moments in them and counters are the newest's."""
    train(with_overrides(tiny, {"eval.checkpoint_tokens": 0}), run_dir=tmp_path / "run", quiet=True)
    paths = list_checkpoints(tmp_path / "run")
    states = []
    model = build_model(tiny.model)
    optimizer = tiny.optim.build(tiny.optim.groups(model))
    names = {parameter: name for name, parameter in model.named_parameters()}

    def state() -> dict[str, torch.Tensor]:
        return {f"{names[p]}/{k}": v.clone() for p, values in optimizer.state.items() for k, v in values.items()}

    for path in paths:
        load_checkpoint(path, model=model, optimizer=optimizer)
        states.append(state())
    assert int(load_average(paths, model=model, optimizer=optimizer)["step"]) == 6
    averaged = 0
    for name, value in state().items():
        mean = torch.stack([s[name].double() for s in states]).mean(0).float() if "basis" not in name else None
        follows = model.get_parameter(name.rpartition("/")[0]).shape == value.shape and not name.endswith("/step")
        averaged += follows
        assert torch.equal(value, mean if follows and mean is not None else states[-1][name]), name
    assert 0 < averaged < len(states[-1])
    load_average(paths, model=model, optimizer=optimizer, policy="newest")
    assert all(torch.equal(value, states[-1][name]) for name, value in state().items())
    load_average(paths, model=model, optimizer=optimizer, policy="reset")
    assert not any(optimizer.state.values())
    with pytest.raises(CheckpointError):
        load_average([tmp_path / "none"], model=model, optimizer=optimizer)
