"""The contract of an optimizer, as checks that anyone can run on an OptimConfig of their own.

Each check takes a config and raises AssertionError where its optimizer breaks the contract. `CONTRACTS` lists
them all. Give them a config that fits `TinyModel`; `shrink` makes one.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from whimbrel.config import OptimConfig, decode, encode
from whimbrel.testing.budget import assert_close

C = TypeVar("C", bound=OptimConfig)

SAME_RULE = 1e-5
"""RMS ratio of the movement for two roundings of the same fp32 rule over 20 steps."""


class TinyBlock(nn.Module):
    """A tall, a wide and a square matrix, and a vector."""

    def __init__(self, draw: Callable[..., nn.Parameter]) -> None:
        super().__init__()
        self.up, self.down, self.mix, self.norm = draw(21, 13), draw(13, 21), draw(13, 13), draw(13)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 13] -> [N, 13]."""
        return x + torch.tanh(x * self.norm @ self.mix.mT @ self.up.mT) @ self.down.mT


class TinyModel(nn.Module):
    """Two blocks, an embedding tied to the head, and a scalar that must not be decayed."""

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter((0.3 * torch.randn(*shape, generator=generator)).to(dtype))

        self.embed = nn.Embedding(11, 13, dtype=dtype)
        self.embed.weight = draw(11, 13)
        self.blocks = nn.ModuleList(TinyBlock(draw) for _ in range(2))
        self.head = nn.Linear(13, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.scale._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 13] -> [N, 11]."""
        for block in self.blocks:
            x = block(x)
        return self.scale * self.head(x)


def shrink(config: C, **changes: Any) -> C:
    """The config for TinyModel: rate 0.01, rank 4, a refresh every 3 steps, min_dim 4, where it has these."""
    small = {"lr": 1e-2, "rank": 4, "refresh_steps": 3, "min_dim": 4, **changes}
    names = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: value for name, value in small.items() if name in names})


def build(config: OptimConfig, model: nn.Module) -> optim.Optimizer:
    """The config's optimizer over a model."""
    return config.build(config.groups(model))


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int, *, begin: int = 0) -> list[float]:
    """Steps of regression on a moving, seeded batch; returns the losses."""
    target = TinyModel(seed=99)
    losses = []
    for step in range(begin, begin + steps):
        x = torch.randn(16, 13, generator=torch.Generator().manual_seed(1000 + step))
        dtype = next(model.parameters()).dtype
        loss = (model(x.to(dtype)).float() - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def flat(model: nn.Module) -> Tensor:
    """All parameters in one fp64 vector."""
    return torch.cat([param.detach().double().flatten() for param in model.parameters()])


def state_tensors(optimizer: optim.Optimizer) -> Iterator[Tensor]:
    """Every tensor in the optimizer's state."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Raise AssertionError where torch reads a tensor's value on the host, which stalls a CUDA stream.

    `Tensor.tolist` and `Tensor.numpy` pass unseen on the CPU.
    """

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            reads = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select")
            name = func.overloadpacket.__name__
            by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
            read = name in reads or by_mask
            assert not read, f"{func} reads a value on the host"
            return func(*args, **(kwargs or {}))

    with Mode():
        yield


def check_config_round_trip(config: OptimConfig) -> None:
    """The config survives being written out and read in."""
    data = encode(config)
    data.pop("kind")
    assert decode(type(config), data) == config


def check_every_parameter_once(config: OptimConfig) -> None:
    """The groups hold every parameter exactly once, with names, and vectors are never decayed."""
    model = TinyModel()
    groups = config.groups(model)
    params = [param for group in groups for _, param in group["params"]]
    assert len(params) == len(set(params)) == len(list(model.parameters()))
    for group in groups:
        for name, param in group["params"]:
            assert model.get_parameter(name) is param, name
            if param.ndim < 2:
                assert group["weight_decay"] == 0, f"{name} is decayed"


def check_equals_adamw_without_projection(config: OptimConfig) -> None:
    """With no parameter projected it moves as torch.optim.AdamW does, up to the place of a vanishing eps."""
    config = shrink(config, low_rank=(), eps=1e-12, weight_decay=0.0)
    ours, theirs = TinyModel(), TinyModel()
    start = flat(ours)
    options = {name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay")}
    train(ours, build(config, ours), 20)
    train(theirs, optim.AdamW(theirs.parameters(), **options), 20)
    assert_close("movement", flat(theirs) - start, flat(ours) - start, SAME_RULE)


def check_closure(config: OptimConfig) -> None:
    """`step` takes None, and runs a closure with gradients on and returns its value."""
    model = TinyModel()
    optimizer = build(config, model)
    train(model, optimizer, 1)
    assert optimizer.step(None) is None

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 13)).square().mean()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        expected = model(torch.ones(3, 13)).square().mean().item()
        assert optimizer.step(closure) == expected


def check_state_is_plain(config: OptimConfig) -> None:
    """The state holds tensors alone, and its file loads with weights_only=True."""
    model = TinyModel()
    optimizer = build(config, model)
    train(model, optimizer, 2)
    for state in optimizer.state.values():
        for key, value in state.items():
            assert isinstance(value, Tensor), f"state '{key}' is a {type(value).__name__}"
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)


def check_zero_gradients_at_zero_rate(config: OptimConfig) -> None:
    """A step with zero gradients and rate 0, as engines run to make the state, moves nothing and makes the state."""
    for weight_decay in (0.0, 0.1):
        model = TinyModel()
        optimizer = build(shrink(config, weight_decay=weight_decay), model)
        before = flat(model)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        assert torch.equal(flat(model), before)
        assert set(optimizer.state) == set(model.parameters())


def check_resume_is_bitwise(config: OptimConfig) -> None:
    """Stopping after any number of steps, saving, loading and going on gives the same bits as not stopping."""
    for dtype in (torch.float32, torch.bfloat16):
        whole = TinyModel(dtype=dtype)
        train(whole, build(config, whole), 9)
        for stop in (1, 3, 4, 5):
            model = TinyModel(dtype=dtype)
            optimizer = build(config, model)
            train(model, optimizer, stop)
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            resumed = TinyModel(seed=1, dtype=dtype)
            resumed.load_state_dict(saved["model"])
            again = build(config, resumed)
            again.load_state_dict(saved["optim"])
            train(resumed, again, 9 - stop, begin=stop)
            assert torch.equal(flat(resumed), flat(whole)), f"stopped after {stop} steps in {dtype}"


def check_copy(config: OptimConfig) -> None:
    """A deep copy of model and optimizer goes on as the original does."""
    model = TinyModel()
    optimizer = build(config, model)
    train(model, optimizer, 4)
    other, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, 4, begin=4)
    train(other, copied, 4, begin=4)
    assert torch.equal(flat(model), flat(other))


def check_state_bytes(config: OptimConfig) -> None:
    """The bytes that the config states are the bytes that the optimizer holds."""
    for dtype in (torch.float32, torch.bfloat16):
        model = TinyModel(dtype=dtype)
        optimizer = build(config, model)
        train(model, optimizer, 1)
        held = sum(t.numel() * t.element_size() for t in state_tensors(optimizer))
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        stated = config.state_bytes(shapes, bytes_per_element=dtype.itemsize)
        assert stated == held, f"{stated} bytes stated, {held} held in {dtype}"


def check_loss_falls(config: OptimConfig) -> None:
    """The loss of a small regression falls to less than half, in fp32 and in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        model = TinyModel(dtype=dtype)
        losses = train(model, build(config, model), 60)
        first, last = sum(losses[:5]), sum(losses[-5:])
        assert last < 0.5 * first, f"loss {first / 5:.3g} -> {last / 5:.3g} in {dtype}"


def check_missing_gradients(config: OptimConfig) -> None:
    """Parameters without a gradient keep their values; none at all is not an error."""
    model = TinyModel()
    optimizer = build(config, model)
    optimizer.step()
    train(model, optimizer, 1)
    optimizer.zero_grad()
    kept = {name: param.detach().clone() for name, param in model.named_parameters()}
    model.blocks[0].get_parameter("up").grad = torch.ones(21, 13)
    optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, kept[name]) == (name != "blocks.0.up"), name


CONTRACTS: tuple[Callable[[OptimConfig], None], ...] = (
    check_config_round_trip,
    check_every_parameter_once,
    check_equals_adamw_without_projection,
    check_closure,
    check_state_is_plain,
    check_zero_gradients_at_zero_rate,
    check_resume_is_bitwise,
    check_copy,
    check_state_bytes,
    check_loss_falls,
    check_missing_gradients,
)
