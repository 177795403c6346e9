"""What Fira and GaLore share: groups, first steps, refreshes, batches, loading."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from whimbrel.errors import CheckpointError, ConfigError, UnsupportedError
from whimbrel.optim import AdamW, Fira, GaLore, matrix, param_groups
from whimbrel.testing.budget import assert_close
from whimbrel.testing.optim import TinyModel, flat, no_host_reads, state_tensors, train

BOTH = pytest.mark.parametrize("cls", [Fira, GaLore])


def make(cls, model, **options):
    return cls(param_groups(model, min_dim=4), **{"lr": 1e-2, "rank": 4, "refresh_steps": 3, **options})


def random_grads(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def zero_grads(model):
    for param in model.parameters():
        param.grad = torch.zeros_like(param)


@BOTH
@pytest.mark.parametrize("rate", [0.0, 0.01])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_zero_gradient_steps_before_the_first_change_nothing(cls, rate, weight_decay):
    plain, primed = TinyModel(), TinyModel()
    train(plain, make(cls, plain, weight_decay=weight_decay), 7)
    optimizer = make(cls, primed, weight_decay=weight_decay)
    before = flat(primed)
    for group in optimizer.param_groups:
        group["lr"] = rate
    for _ in range(2):
        zero_grads(primed)
        optimizer.step()
    assert torch.equal(flat(primed), before)
    assert all(not tensor.any() for tensor in state_tensors(optimizer))
    assert all(group["step"] == 0 for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    train(primed, optimizer, 7)
    assert torch.equal(flat(primed), flat(plain))


@BOTH
@pytest.mark.parametrize("stop", [0, 4])
def test_resumes_through_torchs_checkpoint_helpers(cls, stop):
    """`get_optimizer_state_dict` runs a zero-gradient step on a fresh optimizer, before and after loading."""
    whole = TinyModel()
    train(whole, make(cls, whole), 8)
    for flatten in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        model = TinyModel()
        optimizer = make(cls, model)
        train(model, optimizer, stop)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        again = make(cls, model)
        model.zero_grad()
        set_optimizer_state_dict(model, again, saved, options=options)
        train(model, again, 8 - stop, begin=stop)
        assert torch.equal(flat(model), flat(whole))


@BOTH
def test_a_matrix_starts_at_its_own_first_gradient(cls):
    """As an expert that sees no token for a while: it then moves as one that starts there."""
    late, fresh = (nn.Parameter(torch.zeros(9, 14)) for _ in range(2))
    busy = nn.Parameter(torch.zeros(9, 14))
    both = cls([{"params": [busy, late], "rank": 3}], refresh_steps=1000)
    alone = cls([{"params": [nn.Parameter(torch.zeros(9, 14)), fresh], "rank": 3}], refresh_steps=1000)
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        busy.grad = torch.randn(9, 14, generator=generator)
        late.grad = torch.randn(9, 14, generator=generator) * (step >= 3)
        both.step()
        if step >= 3:
            fresh.grad = late.grad.clone()
            alone.step()
    assert both.state[late]["step"].item() == 3
    assert_close("late matrix", fresh, late, 1e-6)


@BOTH
def test_a_zero_gradient_later_leaves_a_matrix_alone(cls):
    model = TinyModel()
    optimizer = make(cls, model, weight_decay=0.1)
    train(model, optimizer, 4)
    param = model.blocks[0].up
    before = {key: value.clone() for key, value in optimizer.state[param].items()}
    weight = param.detach().clone()
    for seed in range(4):
        random_grads(model, seed)
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param, weight)
    assert all(torch.equal(before[key], value) for key, value in optimizer.state[param].items())


@BOTH
@pytest.mark.parametrize("side", ["std", "left", "right"])
def test_steps_read_nothing_back_to_the_host(cls, side):
    model = TinyModel()
    optimizer = make(cls, model, side=side, weight_decay=0.1, on_refresh="rotate")
    random_grads(model, 0)
    optimizer.step()
    before = flat(model)
    for seed in range(1, 8):
        random_grads(model, seed)
        with no_host_reads():
            optimizer.step()
    assert not torch.equal(flat(model), before)


def test_the_watch_for_host_reads_sees_them():
    for read in (lambda t: t.item(), bool, lambda t: t.nonzero(), lambda t: max(t, 0.5), lambda t: t[t > 0]):
        with pytest.raises(AssertionError, match="reads a value on the host"), no_host_reads():
            read(torch.ones(1))


@BOTH
def test_batches_of_any_size_give_the_same_step(cls, monkeypatch):
    results = []
    for elements in (1, 2 * 21 * 13, 1 << 20):
        monkeypatch.setattr(matrix, "BATCH_ELEMENTS", elements)
        model = TinyModel()
        train(model, make(cls, model, weight_decay=0.1), 10)
        results.append(flat(model))
    for other in results[1:]:
        assert_close("weights", results[0], other, 1e-5)


def bases_that_changed(optimizer, model, steps):
    """How many bases change in each step."""
    matrices = [param for group in optimizer.param_groups if group["low_rank"] for param in group["params"]]
    changed = []
    for seed in range(steps):
        before = [optimizer.state[p]["basis"].clone() if optimizer.state[p] else None for p in matrices]
        random_grads(model, seed)
        optimizer.step()
        pairs = zip(before, matrices, strict=True)
        changed.append(sum(b is None or not torch.equal(b, optimizer.state[p]["basis"]) for b, p in pairs))
    return changed


@BOTH
@pytest.mark.parametrize("refresh", ["power", "exact"])
def test_refreshes_are_spread_evenly_or_fall_together(cls, refresh):
    # six matrices
    model = TinyModel()
    together = make(cls, model, refresh_steps=3, stagger=False, refresh=refresh)
    assert bases_that_changed(together, model, 8) == [6, 0, 0, 6, 0, 0, 6, 0]
    spread = make(cls, model, refresh_steps=3, refresh=refresh)
    assert bases_that_changed(spread, model, 8) == [6, 2, 2, 2, 2, 2, 2, 2]
    sparse = make(cls, model, refresh_steps=12, refresh=refresh)
    assert bases_that_changed(sparse, model, 14)[1:] == [0, 1] * 6 + [0]


@BOTH
@pytest.mark.parametrize("refresh", ["power", "exact"])
@pytest.mark.parametrize(("stagger", "on_refresh"), [(True, "keep"), (True, "rotate"), (False, "keep")])
def test_which_step_a_new_basis_serves_first(cls, refresh, stagger, on_refresh):
    """That after its gradient's where a fit may run beside the step, that of its gradient elsewhere."""
    found = []
    for every in (3, 1000):
        torch.manual_seed(0)
        model = TinyModel()
        options = {"refresh": refresh, "stagger": stagger, "on_refresh": on_refresh}
        optimizer = make(cls, model, refresh_steps=every, **options)
        found.append([])
        for seed in range(5):
            random_grads(model, seed)
            optimizer.step()
            weight = optimizer.param_groups[0]["params"][0]  # due in every third step
            found[-1].append((optimizer.state[weight]["basis"].clone(), weight.detach().clone()))
    # fitted in the first step, and in the fourth
    same = [(torch.equal(a[0], b[0]), torch.equal(a[1], b[1])) for a, b in zip(*found, strict=True)]
    assert same == [(True, True)] * 3 + [(False, stagger and on_refresh == "keep"), (False, False)]


@BOTH
@pytest.mark.parametrize("on_refresh", ["keep", "rotate", "reset"])
def test_moments_at_a_refresh(cls, on_refresh):
    model = TinyModel()
    optimizer = make(cls, model, on_refresh=on_refresh, stagger=False)
    losses = train(model, optimizer, 60)
    assert losses[-1] < 0.5 * losses[0]
    # 60 steps of 3: the last refresh was at step index 57
    assert optimizer.state[model.blocks[0].mix]["step"].item() == (3 if on_refresh == "reset" else 60)


@BOTH
def test_the_first_basis_depends_on_the_seed_alone(cls):
    bases = []
    for seed, noise in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(noise)
        model = TinyModel()
        optimizer = make(cls, model, seed=seed)
        random_grads(model, 0)
        optimizer.step()
        bases.append(optimizer.state[model.blocks[1].mix]["basis"])
    assert torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[0], bases[2])


@BOTH
def test_bf16_weights_keep_float32_state_through_loading(cls):
    model = TinyModel(dtype=torch.bfloat16)
    optimizer = make(cls, model)
    train(model, optimizer, 4)
    again = make(cls, model)
    again.load_state_dict(optimizer.state_dict())
    for param in model.parameters():
        for key, value in again.state[param].items():
            assert value.dtype == torch.float32, key
            assert torch.equal(value, optimizer.state[param][key]), key
            assert value.data_ptr() != optimizer.state[param][key].data_ptr(), f"'{key}' is shared"


@BOTH
def test_non_contiguous_weights_and_gradients(cls):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(12, 20, generator=generator)
    plain = nn.Parameter(start.clone())
    turned = nn.Parameter(start.T.contiguous().T)
    assert not turned.is_contiguous()
    for param in (plain, turned):
        optimizer = cls([{"params": [param], "rank": 4}])
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            param.grad = torch.randn(20, 12, generator=generator).T
            optimizer.step()
    assert_close("weights", plain, turned, 1e-6)


def test_a_matrix_that_two_layers_share_is_one_matrix():
    """One state and one step, with the sum of both gradients; so also under updates in backward."""
    found = []
    for tied, fused in ((True, False), (True, True), (False, False)):
        first, second = nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False)
        first.weight = nn.Parameter(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)))
        model = nn.ModuleDict({"first": first})
        if tied:
            second.weight = first.weight
            model["second"] = second
        optimizer = Fira(param_groups(model, low_rank="*", min_dim=2), rank=3)
        if fused:
            optimizer.fuse_into_backward(model)
        for step in range(4):
            x = torch.randn(5, 9, generator=torch.Generator().manual_seed(1 + step))
            middle = torch.tanh(first(x))
            y = second(middle) if tied else torch.nn.functional.linear(middle, first.weight)
            y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert [state["step"].item() for state in optimizer.state.values()] == [4.0]
        found.append(first.weight.detach().clone())
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


@BOTH
def test_odd_sizes(cls):
    """A small cousin of LLaMA's 5461: nothing may rely on sizes that divide."""
    for shape in ((61, 27), (27, 61), (1, 5), (5, 1)):
        param = nn.Parameter(torch.zeros(shape))
        optimizer = cls([{"params": [param], "rank": min(shape)}], refresh_steps=2)
        for seed in range(4):
            param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        assert torch.isfinite(param).all()
        assert param.abs().max() > 0


@BOTH
def test_keys_of_a_group_win_over_arguments(cls):
    param = nn.Parameter(torch.zeros(8, 12))
    group = {"params": [param], "rank": 2, "update_proj_gap": 7, "alpha": 0.5, "proj_type": "reverse_std"}
    optimizer = cls([group, {"params": [nn.Parameter(torch.zeros(3))]}], rank=5, alpha=1.0, refresh_steps=9)
    low_rank, plain = optimizer.param_groups
    assert [low_rank[key] for key in ("rank", "refresh_steps", "alpha", "side")] == [2, 7, 0.5, "reverse_std"]
    assert (low_rank["low_rank"], plain["low_rank"]) == (True, False)
    param.grad = torch.ones(8, 12)
    optimizer.step()
    assert optimizer.state[param]["basis"].shape == (12, 2)
    # groups of a running optimizer may be handed to a new one, as engines do
    again = cls(optimizer.param_groups)
    assert [group["low_rank"] for group in again.param_groups] == [True, False]


@BOTH
def test_the_learning_rate_may_be_a_tensor(cls):
    models = [TinyModel(), TinyModel()]
    for model, rate in zip(models, (0.25, torch.tensor(0.25)), strict=True):
        optimizer = make(cls, model, lr=rate, weight_decay=0.1)
        for seed in range(3):
            random_grads(model, seed)
            optimizer.step()
    assert torch.equal(flat(models[0]), flat(models[1]))


@BOTH
@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        (
            lambda p: [p],
            {},
            "no group given to {cls} is marked low-rank; "
            'pass param_groups(model, low_rank=...), or set "rank" on a group',
        ),
        (
            lambda p: [{"params": [p], "rank": 9}],
            {},
            "rank = 9 exceeds the smaller side 8 of group 0, parameter 0; choose at most 8",
        ),
        (
            lambda p: [{"params": [("w.weight", p)], "low_rank": True}],
            {"rank": 30},
            "rank = 30 exceeds the smaller side 8 of w.weight; choose at most 8",
        ),
        (
            lambda p: [{"params": [("norm", nn.Parameter(torch.ones(4)))], "rank": 2}],
            {},
            "norm has shape [4], but a low-rank group takes matrices; put it into a group without a rank",
        ),
        (
            lambda p: [{"params": [p], "rank": 2, "refresh_stesp": 3}],
            {},
            "unknown key 'refresh_stesp' in a group of {cls}; did you mean 'refresh_steps'?",
        ),
        (
            lambda p: [{"params": [p], "rank": 2, "side": "std", "proj_type": "left"}],
            {},
            "a group has both 'proj_type' and 'side', which mean the same; keep one of them",
        ),
        (
            lambda p: [{"params": [p], "rank": 2, "proj_type": "full"}],
            {},
            "side = 'full' is not allowed; use one of std, reverse_std, left, right",
        ),
        (
            lambda p: [{"params": [p], "rank": 2}],
            {"refresh_steps": 0},
            "refresh_steps = 0 is not allowed; use a positive number of steps",
        ),
        (lambda p: [{"params": [p], "rank": 0}], {}, "rank = 0 is not allowed; use a positive whole number"),
        (lambda p: [{"params": [p], "rank": 2}], {"lr": -0.1}, "lr = -0.1 is not allowed; use a number of at least 0"),
    ],
)
def test_errors_when_built(cls, groups, options, message):
    with pytest.raises(ConfigError) as error:
        cls(groups(nn.Parameter(torch.zeros(8, 12))), **options)
    assert str(error.value) == message.replace("{cls}", cls.__name__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_what_float32_does_not_hold_is_refused(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(UnsupportedError) as error:
        Fira(
            [
                {"params": [("w", nn.Parameter(torch.ones(8, 8)))], "rank": 2},
                {"params": [("b", torch.ones(8, dtype=dtype))]},
            ]
        )
    assert str(error.value) == (f"b is {name}, but Fira computes in float32; use float32, bfloat16 or float16")


def test_the_kernels_want_cuda(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    param = nn.Parameter(torch.ones(8, 8))
    optimizer = Fira([{"params": [param], "rank": 2, "impl": "triton"}])
    param.grad = torch.ones(8, 8)
    with pytest.raises(UnsupportedError) as error:
        optimizer.step()
    assert str(error.value) == (
        "impl = 'triton' needs parameters on a CUDA device, these are on cpu; use impl = 'auto' or 'eager'"
    )


def test_sparse_gradients_are_refused():
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = Fira([{"params": list(table.parameters()), "low_rank": False}])
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UnsupportedError, match=r"^Fira takes no sparse gradients; use dense ones$"):
        optimizer.step()


def test_a_state_of_another_optimizer_is_refused():
    model = TinyModel()
    galore = make(GaLore, model)
    train(model, galore, 1)
    with pytest.raises(CheckpointError) as error:
        make(Fira, model).load_state_dict(galore.state_dict())
    assert str(error.value) == (
        "optimizer state of blocks.0.up lacks 'limiter_norm'; load a state that Fira has written"
    )
    adamw = AdamW(param_groups(model, min_dim=4))
    train(model, adamw, 1)
    with pytest.raises(CheckpointError, match="load a state that GaLore has written"):
        make(GaLore, model).load_state_dict(adamw.state_dict())


def test_a_state_of_other_shapes_is_refused():
    small, large = (nn.Linear(6, size, bias=False) for size in (8, 9))
    optimizers = [GaLore(param_groups(m, low_rank="*", min_dim=4), rank=3) for m in (small, large)]
    small(torch.ones(2, 6)).sum().backward()
    optimizers[0].step()
    with pytest.raises(CheckpointError) as error:
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert str(error.value) == (
        "optimizer state 'exp_avg' of weight has shape [8, 3], but needs [9, 3]; "
        "load it into the model that it was saved with"
    )


@BOTH
def test_a_huge_gradient_does_not_become_nan(cls):
    """Norms above the float32 range count as not finite; norms below it as zero."""
    for size, moves in ((1e30, False), (1e15, True), (1e-15, True), (1e-30, False)):
        param = nn.Parameter(torch.zeros(8, 12))
        optimizer = cls([{"params": [param], "rank": 3}])
        param.grad = size * torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert torch.isfinite(param).all()
        assert bool((param != 0).any()) == moves, size
        assert math.isfinite(float(optimizer.state[param]["exp_avg_sq"].sum()))


@pytest.mark.parametrize("cls", [Fira, GaLore, AdamW])
def test_weights_may_be_exchanged_before_the_first_step(cls):
    """accelerate shards a model after its optimizer was built and puts the new tensors into the groups."""
    plain, swapped = TinyModel(), TinyModel()
    build = {AdamW: lambda m: AdamW(param_groups(m, low_rank=()), lr=1e-2)}.get(cls, lambda m: make(cls, m))
    train(plain, build(plain), 5)
    optimizer = build(swapped)
    new = {id(p): nn.Parameter(p.detach().clone()) for p in swapped.parameters()}
    for module in swapped.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, new[id(p)])
    for group in optimizer.param_groups:
        group["params"] = [new[id(p)] for p in group["params"]]
    train(swapped, optimizer, 5)
    assert torch.equal(flat(swapped), flat(plain))


@pytest.mark.parametrize("cls", [Fira, GaLore, AdamW])
def test_keys_that_engines_add_to_groups_change_nothing(cls):
    """torchtitan sets `fused` and `foreach`, torch's checkpoints `param_names`."""
    plain, marked = TinyModel(), TinyModel()
    build = {AdamW: lambda g: AdamW(g, lr=1e-2)}.get(cls, lambda g: cls(g, lr=1e-2, rank=4, refresh_steps=3))
    options = {"low_rank": ()} if cls is AdamW else {"min_dim": 4}
    train(plain, build(param_groups(plain, **options)), 4)
    groups = [group | {"fused": False, "foreach": False} for group in param_groups(marked, **options)]
    train(marked, build(groups), 4)
    assert torch.equal(flat(marked), flat(plain))
