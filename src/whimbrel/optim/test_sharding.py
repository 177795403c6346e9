"""Two gloo processes against one: the same weights after the same gradients, however matrices lie."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from whimbrel.errors import UnsupportedError
from whimbrel.optim import AdamW, Apollo, Fira, GaLore, param_groups
from whimbrel.optim.fused import fuses
from whimbrel.optim.matrix import Matrix
from whimbrel.optim.sharding import Part, Split, Spread
from whimbrel.testing.budget import rms_ratio

WORLD = 2
SAME = 2e-6
"""RMS ratio of weights for sums over two halves in place of sums over the whole, which differ in the last bits: some
7 steps of float32, each with a change of about a hundredth of the weight."""
SAME_BF16 = 1e-3
"""Stochastic rounding draws the same bits, so that weights in bfloat16 differ only where an update crosses a bit."""

VARIANTS = {
    "fira": (Fira, {}),
    "fira, paper, one factor": (Fira, {"residual_mode": "paper", "scaling": "matrix"}),
    "fira, exact, rotate": (Fira, {"refresh": "exact", "on_refresh": "rotate"}),
    "fira, right, lazy": (Fira, {"side": "right", "lazy_overlap": 0.3}),
    "fira, left, small state": (Fira, {"side": "left", "basis_dtype": "int4", "state_dtype": "bfloat16"}),
    "fira, int8": (Fira, {"side": "right", "state_dtype": "int8"}),
    "galore, reset": (GaLore, {"on_refresh": "reset"}),
    "apollo": (Apollo, {}),
}
LOOSE = {"fira, left, small state": 2e-3, "fira, int8": 2e-3}
"""Moments in few bits are rounded by the same words, but may fall to the other side of a threshold."""

RUNS = [(variant, "fsdp") for variant in VARIANTS] + [
    ("fira", "rows"),
    ("fira", "columns"),
    ("fira, exact, rotate", "columns"),
    ("fira, right, lazy", "columns"),
    ("apollo", "columns"),
]
"""What runs where: by FSDP2, or with every matrix, experts' too, split by rows or by columns."""


class Model(nn.Module):
    """Tall and wide matrices that do not divide by two, one of fewer rows than processes need, and experts."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return nn.Parameter((0.3 * torch.randn(*shape, generator=generator)).to(dtype))

        self.tall, self.wide, self.short = draw(17, 10), draw(9, 17), draw(1, 9)
        self.bias, self.experts = draw(17), draw(3, 8, 10)

    def forward(self, x):
        y = torch.tanh(x @ self.tall.mT + self.bias) @ self.wide.mT
        parts = torch.einsum("bi,eoi->beo", x, self.experts[:2])  # the third expert gets no token
        return torch.tanh(y) @ self.short.mT + parts.square().sum((1, 2))[:, None]


def make(variant, model):
    cls, options = VARIANTS[variant]
    groups = param_groups(model, low_rank=["tall", "wide", "experts"], min_dim=3)
    return cls(groups, lr=1e-2, rank=3, refresh_steps=3, weight_decay=0.1, **options)


def gradients(step, dtype=torch.float32):
    """Those of a whole model at its first weights: a pure function of the step."""
    model = Model()
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(step))
    (model(x) - x[:, :1]).square().mean().backward()
    return [param.grad.to(dtype) for param in model.parameters()]


def advance(model, optimizer, steps, dtype=torch.float32):
    for step in steps:
        for param, grad in zip(model.parameters(), gradients(step, dtype), strict=True):
            like = isinstance(param, DTensor)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if like else grad
        optimizer.step()


def whole(model):
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}


def apart(reference, model):
    return {name: rms_ratio(reference[name], value) for name, value in whole(model).items()}


def sharded(mesh, placements=None, dtype=torch.float32):
    """The model over two processes: by FSDP2, or with every matrix split along a given dimension."""
    model = Model(dtype)
    if placements is None:
        return fully_shard(model, mesh=mesh)
    for name, param in list(model.named_parameters()):
        dim = placements if param.ndim == 2 else {1: 0, 3: placements + 1}[param.ndim]
        setattr(model, name, nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(dim)])))
    return model


def check_all(rank, folder):
    """Everything that two processes are asked for; what they found goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {}
    for variant in VARIANTS:
        one = Model()
        advance(one, make(variant, one), range(7))
        for how in [how for name, how in RUNS if name == variant]:
            place = {"fsdp": None, "rows": 0, "columns": 1}[how]
            model = sharded(mesh, place)
            optimizer = make(variant, model)
            advance(model, optimizer, range(4))
            if place is None:
                # saved and loaded in between, through the zero-gradient step of torch's helpers
                saved = get_optimizer_state_dict(model, optimizer)
                optimizer = make(variant, model)
                model.zero_grad()
                set_optimizer_state_dict(model, optimizer, saved)
            advance(model, optimizer, range(4, 7))
            found[variant, how] = apart(whole(one), model)
    found["alone"] = on_one(rank)
    found["bytes"] = state_bytes(mesh)
    found["bf16"] = bfloat16(mesh)
    found["ddp"] = data_parallel(rank)
    found["plans"] = planned(mesh)
    found["norms"] = norms(mesh)
    found["resume"] = resume(mesh, folder)
    found["mesh"] = two_dimensions(rank)
    found["backward"] = in_backward(mesh, rank)
    has_kernels = find_spec("triton") is not None
    found["empty"] = {how: empty(mesh, **options) for how, options in EMPTY.items() if has_kernels or how != "kernels"}
    found["kernels"] = kernels(mesh) if has_kernels else {}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def state_bytes(mesh):
    """Elements of moments held here and in all."""
    model = sharded(mesh)
    optimizer = make("fira", model)
    advance(model, optimizer, range(1))
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return sum(m.to_local().numel() for m in moments), sum(m.numel() for m in moments)


def bfloat16(mesh):
    one, model = Model(torch.bfloat16), sharded(mesh, dtype=torch.bfloat16)
    for it in (one, model):
        advance(it, make("fira", it), range(5), torch.bfloat16)
    return apart(whole(one), model)


def data_parallel(rank):
    """Equal gradients on both processes, bases fitted on one of them each: which fits were done here, and the bits."""
    found = {}
    for variant in ("fira", "fira, exact, rotate"):
        one, model = Model(), Model()
        optimizer = make(variant, model)
        optimizer.share_refreshes()
        fits = []
        bases = optimizer._bases
        bases.fit = functools.partial(counted, bases.fit, fits)
        advance(model, optimizer, range(7))
        advance(one, make(variant, one), range(7))
        found[variant] = {name: p.detach() for name, p in model.named_parameters()}, apart(whole(one), model), fits
    return found


def counted(fit, fits, group, chosen, *rest):
    fits += [matrix.offset for matrix in chosen]
    return fit(group, chosen, *rest)


def planned(mesh):
    """Steps in which a plan was made: the first of six, and one after a part of a weight came to lie elsewhere."""
    model = sharded(mesh)
    optimizer, made = make("fira", model), []
    plan = optimizer._plan
    optimizer._plan = lambda *given: (made.append(step), plan(*given))[1]
    for step in range(6):
        for param in model.parameters():
            whole = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
            param.grad = distribute_tensor(whole, mesh, param.placements)
        if step == 4:
            model.tall._local_tensor = model.tall._local_tensor.clone()
        before = model.tall.to_local().clone()
        optimizer.step()
        assert not torch.equal(before, model.tall.to_local())
    return made


def norms(mesh):
    """The norm of all gradients that each process reports, over that of the whole ones."""
    found = {}
    for how, place in (("fsdp", None), ("rows", 0), ("columns", 1)):
        model = sharded(mesh, place)
        optimizer = make("fira", model)
        optimizer.report_grad_norm()
        advance(model, optimizer, range(2))
        found[how] = float(optimizer.grad_norm / torch.cat([grad.flatten() for grad in gradients(1)]).norm())
    return found


def resume(mesh, folder):
    """Stopped, saved by torch.distributed.checkpoint, and gone on with, at the same number of processes: equal bits?"""
    through, model = sharded(mesh), sharded(mesh)
    advance(through, make("fira", through), range(7))
    optimizer = make("fira", model)
    advance(model, optimizer, range(4))
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=f"{folder}/dcp")
    again = sharded(mesh)
    optimizer = make("fira", again)
    advance(again, optimizer, range(90, 91))
    state = {"model": again.state_dict(), "optim": get_optimizer_state_dict(again, optimizer)}
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    again.load_state_dict(state["model"])
    set_optimizer_state_dict(again, optimizer, state["optim"])
    advance(again, optimizer, range(4, 7))
    want = whole(through)
    return all(torch.equal(want[name], value) for name, value in whole(again).items())


def two_dimensions(rank):
    """A mesh of 2 x 1: the other dimension, of one process, splits columns; and one that replicates."""
    found = {}
    for how, shape, placements in (("split", (2, 1), [Shard(0), Shard(1)]), ("hybrid", (1, 2), [Shard(0), Shard(0)])):
        mesh = init_device_mesh("cpu", shape)
        one, model = Model(), Model()
        for name in ("tall", "wide"):
            param = getattr(model, name)
            setattr(model, name, nn.Parameter(distribute_tensor(param.detach(), mesh, placements)))
        for it in (one, model):
            advance(it, make("fira", it), range(5))
        found[how] = apart(whole(one), model)
    return found


EMPTY = {"std": {}, "right": {"side": "right"}, "kernels": {"side": "right", "impl": "triton"}}


def empty(mesh, **options):
    """A matrix of one row, of which one process holds nothing; GaLore, as Fira's residual is rounding noise there."""
    one, model = Model(), sharded(mesh)
    for it in (one, model):
        groups = param_groups(it, low_rank=["short"], min_dim=1)
        mine = options if it is model else {}
        advance(it, GaLore(groups, lr=1e-2, rank=1, refresh_steps=2, **{"side": "right", **mine}), range(3))
    return apart(whole(one), model)


KERNELS = {
    "right": (Fira, {"side": "right"}, 1e-5),
    "right, bfloat16": (Fira, {"side": "right", "state_dtype": "bfloat16"}, 2e-3),
    "std": (Fira, {}, 1e-5),
    "std, small state": (Fira, {"state_dtype": "int8", "basis_dtype": "int4"}, 5e-3),
    "std, paper, one factor": (Fira, {"residual_mode": "paper", "scaling": "matrix"}, 1e-5),
    "std, galore": (GaLore, {}, 1e-5),
    "std, apollo": (Apollo, {}, 1e-5),
}
"""What kernels step in parts, and how far weights may be from those of one process in PyTorch."""


def kernels(mesh):
    """The kernels, interpreted without a GPU, on the parts of every process; experts among the matrices."""
    found = {}
    for how, (cls, options, _) in KERNELS.items():
        one, model = Model(), sharded(mesh)
        for it, impl in ((one, "eager"), (model, "triton")):
            groups = param_groups(it, low_rank=["tall", "wide", "experts"], min_dim=3)
            advance(it, cls(groups, lr=1e-2, impl=impl, rank=3, refresh_steps=1, weight_decay=0.1, **options), range(2))
        found[how] = apart(whole(one), model)
    return found


def on_one(rank):
    """FSDP2 over a single process."""
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    one, model = Model(), sharded(DeviceMesh.from_group(alone, "cpu"))
    for it in (one, model):
        advance(it, make("fira", it), range(7))
    return apart(whole(one), model)


def in_backward(mesh, rank):
    """Forward and backward by FSDP2 on half of the batch each, updates within."""
    one, model = Model(), sharded(mesh)
    ordinary, fused = make("fira", one), make("fira", model)
    fused.fuse_into_backward(model)
    for step in range(5):
        x = torch.randn(8, 10, generator=torch.Generator().manual_seed(step))
        ordinary.zero_grad()
        for it, part in ((one, x), (model, x.chunk(WORLD)[rank])):
            (it(part) - part[:, :1]).square().mean().backward()
        assert all(param.grad is None for param in model.parameters())
        ordinary.step()
        fused.step()
    return apart(whole(one), model)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(check_all, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)], folder


@pytest.mark.parametrize(("variant", "how"), RUNS)
def test_two_processes_equal_one(variant, how, found):
    for ratios in found[0]:
        assert len(ratios[variant, how]) == 5
        assert max(ratios[variant, how].values()) <= LOOSE.get(variant, SAME), ratios[variant, how]


def test_fsdp2_on_one_process_is_the_same_bit_for_bit(found):
    for each in found[0]:
        assert set(each["alone"].values()) == {0.0}, each["alone"]


def test_each_process_holds_its_part_of_the_moments(found):
    held, sizes = zip(*(each["bytes"] for each in found[0]), strict=True)
    assert sum(held) == sizes[0] == sizes[1]
    assert max(held) < 0.7 * sizes[0]


def test_bfloat16_weights_are_rounded_alike(found):
    for each in found[0]:
        assert max(each["bf16"].values()) <= SAME_BF16, each["bf16"]


@pytest.mark.parametrize("variant", ["fira", "fira, exact, rotate"])
def test_data_parallel_processes_share_the_fits(variant, found):
    (first, parted, fits), (second, _, others) = (each["ddp"][variant] for each in found[0])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert max(parted.values()) <= SAME, parted
    assert fits
    assert others
    assert abs(len(fits) - len(others)) <= len(fits + others) // 2
    # four matrices with gradients (an expert has none), each fitted once in a round
    assert len(fits + others) == 4 * 3


def test_resume_is_bitwise_at_the_same_number_of_processes(found):
    assert all(each["resume"] for each in found[0])


def test_saved_on_two_processes_and_loaded_on_one(found):
    model, one = Model(), Model()
    optimizer = make("fira", model)
    advance(model, optimizer, range(90, 91))
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=str(found[1] / "dcp"), no_dist=True)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    advance(model, optimizer, range(4, 7))
    advance(one, make("fira", one), range(7))
    assert max(apart(whole(one), model).values()) <= SAME


@pytest.mark.parametrize("how", ["split", "hybrid"])
def test_meshes_of_two_dimensions(how, found):
    for each in found[0]:
        assert max(each["mesh"][how].values()) <= SAME, each["mesh"][how]


def test_updates_in_backward_under_fsdp2(found):
    for each in found[0]:
        assert max(each["backward"].values()) <= 10 * SAME, each["backward"]  # gradients, too, are sums of halves


@pytest.mark.parametrize("how", EMPTY)
def test_a_process_without_a_row_joins_in(how, found):
    if how == "kernels":
        pytest.importorskip("triton")
    for each in found[0]:
        assert max(each["empty"][how].values()) <= 10 * SAME, each["empty"][how]


@pytest.mark.parametrize("how", KERNELS)
def test_kernels_step_the_parts_of_each_process(how, found):
    pytest.importorskip("triton")
    for each in found[0]:
        assert max(each["kernels"][how].values()) <= KERNELS[how][2], each["kernels"][how]


def test_experts_without_a_token_stay_as_they_are():
    model = Model()
    before, optimizer = model.experts.detach().clone(), make("fira", model)
    advance(model, optimizer, range(3))
    state = optimizer.state[model.experts]
    assert torch.equal(model.experts[2], before[2])
    assert state["step"].tolist() == [3.0, 3.0, 0.0]
    assert not state["exp_avg"][2].any()
    assert not state["exp_avg_sq"][2].any()
    assert state["limiter_norm"][2] == 0
    # once it has had some, a step without any decays nothing
    generator = torch.Generator().manual_seed(0)
    model.experts.grad = torch.randn(3, 8, 10, generator=generator)
    optimizer.step()
    kept = {key: value[2].clone() for key, value in state.items()} | {"weight": model.experts[2].detach().clone()}
    model.experts.grad = torch.randn(3, 8, 10, generator=generator)
    model.experts.grad[2] = 0
    optimizer.step()
    now = {key: value[2] for key, value in state.items()} | {"weight": model.experts[2].detach()}
    assert all(torch.equal(kept[key], now[key]) for key in kept)


def test_each_expert_is_a_matrix_of_its_own():
    model, apart_ = Model(), nn.ParameterList([nn.Parameter(part.clone()) for part in Model().experts.detach()])
    together = Fira([{"params": [model.experts], "rank": 3}], refresh="exact", stagger=False, refresh_steps=2)
    alone = Fira([{"params": list(apart_), "rank": 3}], refresh="exact", stagger=False, refresh_steps=2)
    for step in range(5):
        grad = gradients(step)[-1]
        model.experts.grad = grad
        for param, part in zip(apart_, grad, strict=True):
            param.grad = part
        together.step()
        alone.step()
    assert rms_ratio(torch.stack([p.detach() for p in apart_]), model.experts.detach()) <= SAME


def test_steps_of_parts_are_planned_once(found):
    assert [each["plans"] for each in found[0]] == [[0, 0, 0, 4, 4, 4]] * WORLD


def test_processes_report_the_norm_of_all_gradients(found):
    for each in found[0]:
        assert each["norms"] == pytest.approx(dict.fromkeys(("fsdp", "rows", "columns"), 1.0), rel=1e-6)


def test_a_state_that_was_replaced_is_the_one_that_is_stepped():
    param = nn.Parameter(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))
    optimizer = Fira([{"params": [param], "rank": 3}], refresh_steps=100)
    for step in range(4):
        param.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(step))
        if step == 2:
            optimizer.state[param]["exp_avg"] = torch.zeros_like(optimizer.state[param]["exp_avg"])
        optimizer.step()
    assert optimizer.state[param]["step"] == 4
    assert optimizer.state[param]["exp_avg"].any()


def test_kernels_refuse_slices_that_are_cut_in_two_ways(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    weight, group = torch.zeros(4, 6), dist.ProcessGroup(0, 1)
    split = Split((group,), Part(0, 4), 4)
    spread = Spread(slices=split, depth=split)
    matrix = Matrix((weight, None), weight, weight, {}, (8, 6), 0, spread, (0, 0), None)
    with pytest.raises(UnsupportedError) as error:
        fuses("triton", matrix)
    assert str(error.value) == (
        "impl = 'triton' takes no matrices whose slices are split over several dimensions of a mesh, or not in "
        "order; use impl = 'auto'"
    )


def test_flat_parameters_of_fsdp1_are_refused():
    param = nn.Parameter(torch.ones(64))
    param._fsdp_flattened = True
    with pytest.raises(UnsupportedError) as error:
        Fira([{"params": [("q", nn.Parameter(torch.ones(8, 8)))], "rank": 2}, {"params": [("layer.weight", param)]}])
    assert str(error.value) == (
        "layer.weight is a flat parameter of FSDP1 (FullyShardedDataParallel), in which matrices are lost; "
        "use torch.distributed.fsdp.fully_shard"
    )
    AdamW([param])
