"""The contract of a token mixer, as checks that anyone can run on a MixerConfig of their own.

Each check takes a config and raises AssertionError where its layer breaks the contract. `CONTRACTS` lists them all.
Layers run in fp64 where equality is meant, so that the bounds hold for any correct implementation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from whimbrel.config import MixerConfig, decode, encode
from whimbrel.testing.budget import assert_close

HIDDEN = 20
"""Width of the layers under test: no multiple of a power of two above 4."""
EXACT = 1e-9
"""RMS ratio for two orders of the same fp64 arithmetic."""


def make_layer(config: MixerConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The config's layer for width HIDDEN in evaluation mode, drawn from `seed`."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return config.build(HIDDEN, 1e-5).to(dtype).eval()


def make_input(batch: int, time: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal x [batch, time, HIDDEN], drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def state_tensors(state: Any) -> Iterator[Tensor]:
    """Every tensor in a layer's state, in order."""
    if isinstance(state, Tensor):
        yield state
    elif state is not None:
        for part in state:
            yield from state_tensors(part)


def state_row(state: Any, row: int) -> Any:
    """The state of one sequence, with a leading dim of 1."""
    if isinstance(state, Tensor):
        return state[row : row + 1]
    return None if state is None else type(state)(*(state_row(part, row) for part in state))


def check_shapes_and_dtypes(config: MixerConfig) -> None:
    """y has the shape and dtype of x, in fp64, fp32 and bf16; low precision stays near fp64."""
    for time in (1, 2, 7, 65):
        x = make_input(2, time, dtype=torch.float32)
        layer = make_layer(config, dtype=torch.float32)
        y = layer(x).y
        assert y.shape == x.shape, f"y {tuple(y.shape)} for x {tuple(x.shape)}"
        assert y.dtype == torch.float32, f"y is {y.dtype} for x in fp32"
        reference = layer.double()(x.double()).y
        assert reference.dtype == torch.float64, f"y is {reference.dtype} for x in fp64"
        assert_close(f"fp32, {time} tokens", reference, y, 2e-5)
        layer = make_layer(config, dtype=torch.bfloat16)
        x = x.bfloat16()
        y = layer(x).y
        assert y.dtype == torch.bfloat16, f"y is {y.dtype} for x in bf16"
        assert_close(f"bf16, {time} tokens", layer.double()(x.double()).y, y, 0.03)


def check_segments(config: MixerConfig) -> None:
    """Any cut of a sequence into calls gives the outputs and the state of one call, token by token included."""
    layer, x = make_layer(config), make_input(2, 71)
    whole, last = layer(x)
    for cuts in ((30, 41), (1, 69, 1), (2, 1, 3, 65), (64, 7), (1,) * 71):
        state, pieces = None, []
        for piece in x.split(cuts, dim=1):
            y, state = layer(piece, state)
            pieces.append(y)
        label = f"cut into {cuts}" if len(cuts) < 10 else "token by token"
        assert_close(label, whole, torch.cat(pieces, 1), EXACT)
        _assert_same_state(f"state, {label}", last, state)


def check_packed(config: MixerConfig) -> None:
    """Packed sequences give what each gives alone, also when they go on from states."""
    layer, lengths = make_layer(config), (5, 1, 66, 2)
    x = make_input(1, sum(lengths))
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    packed, packed_state = layer(x, cu_seqlens=edges)
    _assert_packed(layer, x, lengths, packed, packed_state, None)
    if packed_state is None:
        return
    _, before = layer(make_input(len(lengths), 9, seed=1))
    packed, packed_state = layer(x, before, cu_seqlens=edges.int())
    _assert_packed(layer, x, lengths, packed, packed_state, before)


def _assert_packed(
    layer: nn.Module, x: Tensor, lengths: Sequence[int], packed: Tensor, packed_state: Any, before: Any
) -> None:
    for i, (alone, together) in enumerate(zip(x.split(lengths, 1), packed.split(lengths, 1), strict=True)):
        y, state = layer(alone, state_row(before, i))
        assert_close(f"packed sequence {i}", y, together, EXACT)
        if packed_state is not None:
            _assert_same_state(f"state of packed sequence {i}", state, state_row(packed_state, i))


def check_causal(config: MixerConfig) -> None:
    """A token changes its own output and later ones, and none before it."""
    layer, x = make_layer(config), make_input(1, 67)
    for at in (0, 1, 31, 63, 66):
        changed = x.clone()
        changed[:, at] += 1
        difference = (layer(changed).y - layer(x).y).abs().amax(-1)[0]
        assert difference[:at].sum() == 0, f"token {at} changed an earlier output"
        assert difference[at] > 0, f"token {at} did not change its own output"
        assert at + 2 > 66 or difference[at + 1 :].max() > 0, f"token {at} did not change any later output"


def check_rows_independent(config: MixerConfig) -> None:
    """A sequence gives the same beside other sequences as alone."""
    layer, x = make_layer(config), make_input(3, 33)
    together = layer(x).y
    for row in range(3):
        assert_close(f"row {row}", layer(x[row : row + 1]).y, together[row : row + 1], EXACT)


def check_gradients(config: MixerConfig) -> None:
    """Every parameter, the input and a given state receive the gradient that finite differences find."""
    layer, x = make_layer(config).train(), make_input(1, 11).requires_grad_()
    with torch.no_grad():
        _, state = layer(make_input(1, 4, seed=2))
    probe = make_input(1, 11, seed=3)
    held = [t.requires_grad_() for t in state_tensors(state)]
    targets = {**dict(layer.named_parameters()), "x": x, **{f"state[{i}]": t for i, t in enumerate(held)}}

    def objective() -> Tensor:
        y, after = layer(x, state)
        return (y * probe).sum() + sum(t.sin().sum() for t in state_tensors(after))

    objective().backward()
    for seed, (name, tensor) in enumerate(targets.items()):
        gradient = tensor.grad
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.shape == tensor.shape, f"{name}: gradient {tuple(gradient.shape)} for {tuple(tensor.shape)}"
        assert gradient.abs().max() > 0, f"the gradient of {name} is zero"
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=tensor.dtype)
        found = _slope(objective, tensor, direction)
        want = float((gradient * direction).sum())
        scale = float(gradient.norm() * direction.norm()) / max(1, tensor.numel()) ** 0.5
        assert abs(found - want) <= 1e-5 * scale, f"{name}: slope {found:.9g}, gradient gives {want:.9g}"


def _slope(objective: Callable[[], Tensor], tensor: Tensor, direction: Tensor, step: float = 1e-6) -> float:
    values = []
    with torch.no_grad():
        start = tensor.clone()
        for sign in (1, -1):
            tensor.copy_(start + sign * step * direction)
            values.append(float(objective()))
        tensor.copy_(start)
    return (values[0] - values[1]) / (2 * step)


def check_counts(config: MixerConfig) -> None:
    """`num_params` and `state_bytes` are those of the layer, also after many tokens."""
    layer = make_layer(config, dtype=torch.float32)
    found = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    declared = getattr(config, "parameter_shapes", None)
    assert declared is None or declared(HIDDEN) == found, f"parameter_shapes says {declared(HIDDEN)}, found {found}"
    number = sum(p.numel() for p in layer.parameters())
    assert config.num_params(HIDDEN) == number, f"num_params says {config.num_params(HIDDEN)}, the layer has {number}"
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)):
        layer = make_layer(config, dtype=dtype)
        for time in (1, 3, 50):
            state = layer(make_input(1, time, dtype=dtype)).state
            held = sum(t.numel() * t.element_size() for t in state_tensors(state))
            said = config.state_bytes(HIDDEN, time, bytes_per_element=width)
            assert said == held, f"state_bytes says {said} for {time} tokens in {dtype}, the state holds {held}"


def check_state_owns_its_memory(config: MixerConfig) -> None:
    """The state of a long call does not keep larger tensors alive, and a call leaves the state it got unchanged."""
    layer = make_layer(config)
    with torch.no_grad():
        _, state = layer(make_input(1, 50))
        before = [t.clone() for t in state_tensors(state)]
        layer(make_input(1, 1, seed=1), state)
        layer(make_input(1, 9, seed=1), state)
    for i, (tensor, copied) in enumerate(zip(state_tensors(state), before, strict=True)):
        assert torch.equal(tensor, copied), f"state[{i}] was changed by a later call"
        kept, own = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
        assert kept <= own, f"state[{i}] of {own} bytes keeps {kept} bytes alive"


def check_deterministic(config: MixerConfig) -> None:
    """Two runs, and a deep copy of the layer, give bitwise equal outputs and gradients."""
    layer = make_layer(config, dtype=torch.float32).train()
    results = []
    for run in (layer, layer, copy.deepcopy(layer)):
        x = make_input(2, 37, dtype=torch.float32).requires_grad_()
        run.zero_grad()
        y = run(x).y
        y.square().sum().backward()
        results.append([y, *(t.grad for t in (x, *run.parameters()) if t.grad is not None)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), "two runs differ"


def check_config_round_trip(config: MixerConfig) -> None:
    """The config survives being written and read, and the layer from it has the same weights."""
    data = encode(config)
    data.pop("kind")
    again = decode(type(config), data)
    assert again == config == copy.deepcopy(config), f"{config} became {again}"
    ours, theirs = make_layer(config).state_dict(), make_layer(again).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _assert_same_state(name: str, want: Any, got: Any) -> None:
    wanted, found = list(state_tensors(want)), list(state_tensors(got))
    assert len(wanted) == len(found), f"{name}: {len(found)} tensors, want {len(wanted)}"
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        assert_close(f"{name}[{i}]", a, b, EXACT)


CONTRACTS: tuple[Callable[[MixerConfig], None], ...] = (
    check_shapes_and_dtypes,
    check_segments,
    check_packed,
    check_causal,
    check_rows_independent,
    check_gradients,
    check_counts,
    check_state_owns_its_memory,
    check_deterministic,
    check_config_round_trip,
)
"""Everything that a mixer must hold."""
