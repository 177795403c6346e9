"""Averages kept during training: equal to the offline merge, whatever the schedule, the windows and the sharding."""

from __future__ import annotations

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from whimbrel.config import MergeConfig
from whimbrel.errors import CheckpointError, ConfigError, UnsupportedError
from whimbrel.merge import OnlineAverage, merge_checkpoints
from whimbrel.merge.config import DecayConfig, EMAConfig, EMACorrectedConfig, SMAConfig, WMAConfig
from whimbrel.merge.online import _Ring, round_once
from whimbrel.testing.merge import nearest_of, trajectory, write_sources

METHODS = [
    SMAConfig(),
    WMAConfig(),
    EMAConfig(),
    EMAConfig(alpha=0.1),
    EMACorrectedConfig(),
    DecayConfig(curve="cosine"),
    DecayConfig(),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def samples(count: int, dtypes: tuple[torch.dtype, ...] = DTYPES, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """Weights of each type along a trajectory, and a number that is not averaged."""
    steps = [trajectory(count, dtype, seed=seed, size=3001) for dtype in dtypes]
    return [{str(d): s[i] for d, s in zip(dtypes, steps, strict=True)} for i in range(count)]


class Live:
    """Tensors that change in place, as a model's weights do."""

    def __init__(self, like: dict[str, Tensor]) -> None:
        self.tensors = {name: torch.zeros_like(value) for name, value in like.items()}

    def set(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.tensors[name].copy_(value)


def merged(folder: Path, sources: list[dict[str, Tensor]], method: str | MergeConfig) -> dict[str, Tensor]:
    merge_checkpoints(write_sources(folder, sources), folder / "out", method=method)
    return load_file(folder / "out" / "model.safetensors")


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert torch.equal(*(value[name].reshape(-1).view(torch.uint8) for value in (a, b))), name


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_full_window_equals_the_merge(method: MergeConfig, tmp_path: Path) -> None:
    sources = samples(7)
    live = Live(sources[0])
    average = OnlineAverage(live.tensors, count=7, every=10, method=method)
    for i, values in enumerate(sources, start=1):
        live.set(values)
        assert not average.update(10 * i - 5)
        assert average.update(10 * i)
    assert average.steps == tuple(range(10, 80, 10))
    assert average.weights == method.weights(7)
    assert_same_bits(average.average(), merged(tmp_path, sources, method))
    assert_same_bits(live.tensors, sources[-1])


def test_rolling_windows_equal_the_merge_of_the_last_checkpoints(tmp_path: Path) -> None:
    """With as many windows as samples in one, at every sample the last `count`; with two, at least half as many."""
    sources = samples(9, (torch.float32,))
    live = Live(sources[0])
    rolling = OnlineAverage(live.tensors, count=4, windows=4, method="wma")
    staggered = OnlineAverage(live.tensors, count=4, windows=2, method="wma")
    lengths = []
    for i, values in enumerate(sources):
        live.set(values)
        rolling.update(i)
        staggered.update(i)
        last = sources[max(0, i - 3) : i + 1]
        assert_same_bits(rolling.average(), merged(tmp_path / str(i), last, "wma"))
        assert rolling.steps == tuple(range(max(0, i - 3), i + 1))
        lengths.append(staggered.samples)
        some = sources[i + 1 - staggered.samples : i + 1]
        assert_same_bits(staggered.average(), merged(tmp_path / f"s{i}", some, "wma"))
    assert lengths == [1, 2, 3, 4, 3, 4, 3, 4, 3]


@pytest.mark.parametrize("method", METHODS[:5], ids=str)
def test_window_without_end(method: MergeConfig, tmp_path: Path) -> None:
    """Within a rounding of float64, which shows in few results of float32 and fewer of bfloat16."""
    sources = samples(8)
    live = Live(sources[0])
    average = OnlineAverage(live.tensors, count=0, method=method)
    for i, values in enumerate(sources):
        live.set(values)
        average.update(i)
    found, expected = average.average(), merged(tmp_path, sources, method)
    for name in expected:
        different = (found[name] != expected[name]).double().mean()
        assert different < 1e-3, f"{name}: {different}"
    assert average.weights == method.weights(8)


def test_a_window_that_is_not_full_has_its_first_weights_scaled(tmp_path: Path) -> None:
    sources = samples(3, (torch.float32,))
    live = Live(sources[0])
    average = OnlineAverage(live.tensors, count=5, method="explicit", weights=["1/2", "1/4", "1/8", "1/16", "1/16"])
    for i, values in enumerate(sources):
        live.set(values)
        average.update(i)
    assert average.weights.values == (Fraction(4, 7), Fraction(2, 7), Fraction(1, 7))
    paths = write_sources(tmp_path, sources)
    merge_checkpoints(paths, tmp_path / "out", method="explicit", weights=["4/7", "2/7", "1/7"])
    assert_same_bits(average.average(), load_file(tmp_path / "out" / "model.safetensors"))


def test_float32_sums_are_exact_for_bfloat16_and_close_for_float32(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(4000, generator=generator)
    walk = [start + 0.01 * i * torch.randn(4000, generator=generator) for i in range(10)]
    sources = [{"bf16": w.bfloat16(), "fp32": w.clone()} for w in walk]
    live = Live(sources[0])
    average = OnlineAverage(live.tensors, count=10, accumulate="float32")
    for i, values in enumerate(sources):
        live.set(values)
        average.update(i)
    found, expected = average.average(), merged(tmp_path, sources, "sma")
    near_zero = expected["bf16"].abs() < 2.0**-6
    assert torch.equal(found["bf16"][~near_zero], expected["bf16"][~near_zero])
    torch.testing.assert_close(found["fp32"], expected["fp32"], rtol=2e-6, atol=1e-6)


def test_state_goes_on_bit_for_bit_and_a_step_counts_once(tmp_path: Path) -> None:
    sources = samples(6)
    live = Live(sources[0])
    whole = OnlineAverage(live.tensors, count=6, method="ema")
    half = OnlineAverage(live.tensors, count=6, method="ema")
    for i, values in enumerate(sources):
        live.set(values)
        whole.update(i)
        half.update(i)
        if i == 3:
            file = io.BytesIO()
            torch.save(half.state_dict(), file)
            file.seek(0)
            half = OnlineAverage(live.tensors, count=6, method="ema")
            half.load_state_dict(torch.load(file, weights_only=True))
            assert not half.update(3)
            assert half.samples == 4
    assert half.steps == whole.steps
    assert_same_bits(half.average(), whole.average())
    half.reset()
    with pytest.raises(CheckpointError, match="nothing has been averaged yet"):
        half.average()


def test_a_saved_state_must_fit() -> None:
    values = samples(1, (torch.float32,))[0]
    average = OnlineAverage(values, count=3)
    state = average.state_dict()
    with pytest.raises(CheckpointError, match=r"was kept with other settings than .*wma"):
        OnlineAverage(values, count=3, method="wma").load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"'sum.0.b' is missing from"):
        OnlineAverage({**values, "b": torch.ones(2)}, count=3).load_state_dict(state)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)
        self.out = nn.Linear(7, 5)
        self.register_buffer("bias_of_router", torch.zeros(3))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


def changed(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator) if value.is_floating_point() else step)


def test_swap_in_for_evaluation_and_back_bit_for_bit(tmp_path: Path) -> None:
    """Buffers are averaged with the parameters; whole numbers stay; an error inside the block changes nothing."""
    torch.manual_seed(0)
    model = Net()
    average = OnlineAverage(model, count=3)
    paths = []
    for step in range(3):
        changed(model, step)
        average.update(step)
        paths.append(tmp_path / f"step-{step}" / "model.safetensors")
        paths[-1].parent.mkdir()
        save_file({k: v.clone() for k, v in model.state_dict().items() if k != "calls"}, paths[-1])
    live = {name: value.clone() for name, value in model.state_dict().items()}
    merge_checkpoints(paths, tmp_path / "out")
    expected = load_file(tmp_path / "out" / "model.safetensors")
    inside: dict[str, Tensor] = {}

    def fail_inside() -> None:
        with average.swapped():
            inside.update((name, value.clone()) for name, value in model.state_dict().items())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert int(inside.pop("calls")) == 2
    assert_same_bits(inside, expected)
    assert_same_bits(dict(model.state_dict()), live)
    average.save(tmp_path / "average.safetensors")
    saved = load_file(tmp_path / "average.safetensors")
    saved.pop("calls")
    assert_same_bits(saved, expected)


def test_names_of_wrapped_models_and_tied_weights() -> None:
    model = Net()
    model.head = nn.Linear(5, 7, bias=False)
    model.head.weight = model.inner.weight
    average = OnlineAverage(torch.compile(model))
    average.update(0)
    assert sorted(average.average()) == ["bias_of_router", "inner.bias", "inner.weight", "out.bias", "out.weight"]


def test_values_that_are_not_finite_are_named() -> None:
    tensors = {"fine": torch.ones(3), "w": torch.tensor([1.0, float("nan")])}
    average = OnlineAverage(tensors, every=5)
    average.update(5)
    with pytest.raises(CheckpointError, match=r"the average of 'w' over steps \[5\] is not finite"):
        average.average()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every = 0 is not allowed; use a positive number of steps"),
        ({"windows": 4, "count": 3}, "windows = 4 is not allowed; use 1 to count = 3, and 1 if that is 0"),
        ({"count": 0, "method": "decay"}, "count = 0, a window without end, is for sma, wma, ema and ema-corrected"),
        ({"device": "gpu"}, "device = 'gpu' is not allowed; use 'cpu' or 'same'"),
    ],
)
def test_settings_that_are_not_allowed(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        OnlineAverage({"w": torch.ones(2)}, **settings)
    assert message in str(error.value)


def test_codes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"tensor 'w' is torch.float8_e4m3fn, whose codes cannot be averaged"):
        OnlineAverage({"w": torch.ones(2).to(torch.float8_e4m3fn)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_round_once(dtype: torch.dtype) -> None:
    """Half-way points of the narrow type, moved by less than float32 can tell; overflow, underflow, signs."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, generator=generator, dtype=torch.float64).to(dtype)
    bits = base.view(torch.int32 if dtype == torch.float32 else torch.int16)
    half_way = (base.double() + (bits + 1).view(dtype).double()) / 2
    values = torch.cat([half_way * (1 + shift * 2.0**-40) for shift in (-1, 0, 1)])
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1e-300, -1e-300, torch.finfo(dtype).tiny / 3])])
    found = round_once(values, dtype)
    assert found.double().tolist() == [nearest_of(Fraction(v), dtype) for v in values.tolist()]
    assert torch.isinf(round_once(torch.tensor([1e300], dtype=torch.float64), dtype)).all()


def test_ring_on_the_cpu_gives_the_same_sums() -> None:
    """Pieces smaller than a tensor, more of them than slots: all arrive once, in order, before `finish` returns."""
    value = torch.arange(10_000, dtype=torch.float32)
    total = torch.zeros(10_000)
    ring = _Ring(torch.device("cpu"), 8 * 4096)
    size = ring.slot_bytes // 4
    seen = []

    def adder(start: int):
        def add(piece: Tensor) -> None:
            seen.append(start)
            total[start : start + len(piece)] += piece

        return add

    for _ in range(3):
        ring.start([(value[i : i + size], adder(i)) for i in range(0, len(value), size)])
        ring.hold()
        ring.finish()
    assert torch.equal(total, 3 * value)
    assert seen == [*range(0, len(value), size)] * 3

    def fail(piece: Tensor) -> None:
        raise CheckpointError("no")

    ring.start([(value[:5], fail)] * 20)
    ring.hold()
    with pytest.raises(CheckpointError, match="no"):
        ring.finish()


SHARDED = """
import sys
from pathlib import Path
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from whimbrel.checkpoint.weights import save_weights
from whimbrel.merge import OnlineAverage

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
mesh = init_device_mesh("cpu", (2,))
fully_shard(model[0], mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
average = OnlineAverage(model, optimizer, count=4, method="wma")
draw = torch.Generator().manual_seed(0)
for step in range(4):
    model(torch.randn(6, 5, generator=draw)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update(step)
    save_weights(folder / f"{step}.safetensors", model)
    if step == 1:
        dcp.save(average.state_dict(), checkpoint_id=folder / "state")
x = torch.randn(6, 5, generator=draw)
with torch.no_grad():
    before = model(x).clone()
    with average.swapped():
        inside = model(x).clone()
    after = model(x)
assert torch.equal(before, after), "the live weights are not what they were"
assert not torch.equal(before, inside)
average.save(folder / "average.safetensors")
assert torch.equal(model(x), before)
dist.barrier()
dist.destroy_process_group()
"""


def test_sharded_weights_and_a_state_loaded_by_another_number_of_processes(tmp_path: Path) -> None:
    """FSDP2 in two processes, shards of 4 and 3 rows; what they saved after two samples, one process goes on from."""
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in running:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    paths = [tmp_path / f"{step}.safetensors" for step in range(4)]
    merge_checkpoints(paths, tmp_path / "out", method="wma")
    expected = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_bits(load_file(tmp_path / "average.safetensors"), expected)
    live = Live(expected)
    average = OnlineAverage(live.tensors, count=4, method="wma")
    state = average.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "state", no_dist=True)
    average.load_state_dict(state)
    for step in (2, 3):
        live.set(load_file(paths[step]))
        average.update(step)
    assert average.steps == (0, 1, 2, 3)
    assert_same_bits(average.average(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "same"])
def test_on_a_gpu(device: str, tmp_path: Path) -> None:
    """Through the ring, while the weights go on changing, with an optimizer's step as the only point of waiting."""
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(6)]).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    average = OnlineAverage(model, optimizer, count=5, method="wma", device=device, ring_bytes=2**20)
    memory = torch.cuda.memory_allocated()
    sources = []
    for step in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        given_out = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        average.update(step)
        if step == 3:
            average.wait()  # so that all that the sample takes has been given out
        taken = torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - given_out
        assert device == "same" or taken == 0, f"a sample takes {taken} bytes of the GPU"
        sources.append({name: value.cpu().clone() for name, value in model.state_dict().items()})
    expected = merged(tmp_path, sources, "wma")
    assert_same_bits({name: value.cpu() for name, value in average.average().items()}, expected)
    if device == "cpu":
        grads = sum(p.numel() * 4 for p in model.parameters())
        assert torch.cuda.memory_allocated() - memory <= grads + 2**20
