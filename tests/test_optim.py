"""Optimizers against PyTorch and against plain loops, and what they promise about memory, dtype and state."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from minigrad import nn
from minigrad.errors import MinigradError, StateError
from minigrad.optim import SGD, AdamW, Muon, Optimizer, RMSProp, clip_by_norm, decay_groups, orthogonal

STEPS = 12
SHAPES = [(4, 3, 3, 2), (5, 4), (5,), (1,)]


@dataclass
class Parameter:
    """As much of a parameter as an optimizer sees."""

    data: np.ndarray
    grad: np.ndarray | None = None


def parameters(dtype: Any = np.float64, seed: int = 0) -> list[Parameter]:
    """One parameter of each shape; the convolution's weight in channels-last memory, like minigrad's."""
    rng = np.random.default_rng(seed)
    data = [rng.standard_normal(shape).astype(dtype) for shape in SHAPES]
    data[0] = np.ascontiguousarray(data[0].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    return [Parameter(x) for x in data]


def give_gradients(params: list[Parameter], step: int) -> None:
    rng = np.random.default_rng(1000 + step)
    for p in params:
        p.grad = np.empty_like(p.data)
        p.grad[...] = rng.standard_normal(p.data.shape)


# Each optimizer, its options, and the options' names in PyTorch.
CASES: list[tuple[type[Optimizer], dict[str, Any], str, dict[str, Any]]] = [
    (SGD, {}, "SGD", {}),
    (SGD, {"weight_decay": 0.05}, "SGD", {"weight_decay": 0.05}),
    (SGD, {"momentum": 0.9}, "SGD", {"momentum": 0.9}),
    *[
        (SGD, options, "SGD", options)
        for options in [{"momentum": 0.9, "nesterov": n, "weight_decay": w} for n in (False, True) for w in (0.0, 0.05)]
    ],
    (RMSProp, {}, "RMSprop", {"alpha": 0.9, "eps": 1e-8}),
    (RMSProp, {"decay": 0.99, "eps": 1.0}, "RMSprop", {"alpha": 0.99, "eps": 1.0}),
    (
        RMSProp,
        {"eps": 1.0, "momentum": 0.9, "weight_decay": 0.05},
        "RMSprop",
        {"alpha": 0.9, "eps": 1.0, "momentum": 0.9, "weight_decay": 0.05},
    ),
    (AdamW, {}, "AdamW", {}),
    (
        AdamW,
        {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
        "AdamW",
        {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    ),
]
case_ids = [f"{kind.__name__}-{'-'.join(options) or 'plain'}-{i}" for i, (kind, options, _, _) in enumerate(CASES)]


def torch_step(theirs: Any, twins: list[Any], ours: list[Parameter], torch: Any) -> None:
    for twin, p in zip(twins, ours, strict=True):
        twin.grad = None if p.grad is None else torch.tensor(p.grad.copy())
    theirs.step()


@pytest.mark.parametrize(("kind", "options", "torch_name", "torch_options"), CASES, ids=case_ids)
def test_agrees_with_torch_step_for_step(
    kind: Callable[..., Optimizer], options: dict[str, Any], torch_name: str, torch_options: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    ours = parameters()
    twins = [torch.nn.Parameter(torch.tensor(p.data.copy())) for p in ours]
    optimizer = kind(ours, 0.03, **options)
    theirs = getattr(torch.optim, torch_name)(twins, lr=0.03, **torch_options)
    for step in range(STEPS):
        give_gradients(ours, step)
        if step == 4:
            ours[1].grad = None  # skipped: neither its state nor its count of updates goes on
        torch_step(theirs, twins, ours, torch)
        optimizer.step()
        for p, twin in zip(ours, twins, strict=True):
            np.testing.assert_allclose(p.data, twin.detach().numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "torch_name"), [(SGD, "SGD"), (RMSProp, "RMSprop"), (AdamW, "AdamW")])
def test_groups_and_scheduled_values_agree_with_torch(kind: Callable[..., Optimizer], torch_name: str) -> None:
    torch = pytest.importorskip("torch")
    ours = parameters()
    twins = [torch.nn.Parameter(torch.tensor(p.data.copy())) for p in ours]
    options: dict[str, Any] = {"betas": (0.9, 0.999)} if kind is AdamW else {"momentum": 0.9}
    optimizer = kind(
        [{"params": ours[:2], "weight_decay": 0.2}, {"params": iter(ours[2:]), "lr_scale": 2.0}],
        1.0,
        weight_decay=0.01,
        **options,
    )
    theirs = getattr(torch.optim, torch_name)(
        [{"params": twins[:2], "weight_decay": 0.2}, {"params": twins[2:], "weight_decay": 0.01}],
        lr=1.0,
        **(options | ({"alpha": 0.9} if kind is RMSProp else {})),
    )
    for step in range(STEPS):
        lr, momentum = 0.01 * (step + 1), 0.95 - 0.01 * step
        for group, scale in zip(theirs.param_groups, (1.0, 2.0), strict=True):
            group["lr"] = scale * lr
            group |= {"betas": (momentum, 0.999)} if kind is AdamW else {"momentum": momentum}
        give_gradients(ours, step)
        torch_step(theirs, twins, ours, torch)
        optimizer.step(lr=lr, momentum=momentum)
        for p, twin in zip(ours, twins, strict=True):
            np.testing.assert_allclose(p.data, twin.detach().numpy(), rtol=1e-12, atol=1e-12)


def test_clip_by_norm_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    for max_norm in (0.5, 2.0, 1e9):
        ours = parameters()
        give_gradients(ours, 0)
        twins = [torch.nn.Parameter(torch.tensor(p.data.copy())) for p in ours]
        for twin, p in zip(twins, ours, strict=True):
            twin.grad = torch.tensor(np.array(p.grad))
        theirs = torch.nn.utils.clip_grad_norm_(twins, max_norm)
        np.testing.assert_allclose(clip_by_norm(ours, max_norm), float(theirs), rtol=1e-13)
        for p, twin in zip(ours, twins, strict=True):
            np.testing.assert_allclose(np.asarray(p.grad), twin.grad.numpy(), rtol=1e-12)


# ---- against the formulas, one number at a time


def sgd(p: float, g: float, memory: dict[str, float], t: int) -> float:
    d = g + 0.05 * p
    memory["v"] = 0.9 * memory.get("v", 0.0) + d
    return p - 0.1 * (d + 0.9 * memory["v"])


def rmsprop(p: float, g: float, memory: dict[str, float], t: int) -> float:
    d = g + 0.05 * p
    memory["s"] = 0.8 * memory.get("s", 0.0) + 0.2 * d**2
    memory["v"] = 0.9 * memory.get("v", 0.0) + d / (math.sqrt(memory["s"]) + 0.5)
    return p - 0.1 * memory["v"]


def adamw(p: float, g: float, memory: dict[str, float], t: int) -> float:
    memory["m"] = 0.8 * memory.get("m", 0.0) + 0.2 * g
    memory["s"] = 0.9 * memory.get("s", 0.0) + 0.1 * g**2
    m, s = memory["m"] / (1 - 0.8**t), memory["s"] / (1 - 0.9**t)
    return p - 0.1 * 0.05 * p - 0.1 * m / (math.sqrt(s) + 1e-3)


@pytest.mark.parametrize(
    ("formula", "kind", "options"),
    [
        (sgd, SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
        (rmsprop, RMSProp, {"decay": 0.8, "eps": 0.5, "momentum": 0.9, "weight_decay": 0.05}),
        (adamw, AdamW, {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.05}),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 1e-5)])
def test_agrees_with_its_formula(
    formula: Callable[..., float], kind: Callable[..., Optimizer], options: dict[str, Any], dtype: Any, tolerance: float
) -> None:
    params = parameters(dtype)
    optimizer = kind(params, 0.1, **options)
    expected = [[float(x) for x in p.data.ravel()] for p in params]
    memory: list[list[dict[str, float]]] = [[{} for _ in values] for values in expected]
    for step in range(STEPS):
        give_gradients(params, step)
        optimizer.step()
        for p, values, memories in zip(params, expected, memory, strict=True):
            for i, g in enumerate(np.asarray(p.grad).ravel()):
                values[i] = formula(values[i], float(g), memories[i], step + 1)
            np.testing.assert_allclose(p.data.ravel(), values, rtol=tolerance, atol=tolerance)


# ---- Muon


def by_singular_values(matrix: np.ndarray, steps: int = 3) -> np.ndarray:
    """The iteration on the singular values alone."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / (np.linalg.norm(s) + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5), (1, 4), (4, 1), (64, 27), (32, 288)], ids=str)
def test_orthogonal(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    np.testing.assert_allclose(orthogonal(matrix), by_singular_values(matrix), rtol=1e-9, atol=1e-11)
    values = np.linalg.svd(orthogonal(matrix), compute_uv=False)
    assert values.max() < 1.25
    assert np.median(values) > 0.6
    np.testing.assert_allclose(orthogonal(1e3 * matrix), orthogonal(matrix), atol=1e-6)  # length does not count
    assert not orthogonal(np.zeros(shape)).any()
    np.testing.assert_allclose(
        orthogonal(np.stack([matrix, matrix[::-1]])), [orthogonal(matrix), orthogonal(matrix)[::-1]], atol=1e-13
    )


@pytest.mark.parametrize("momentum", [None, 0.7], ids=["own", "of the step"])
def test_muon_agrees_with_its_formula(momentum: float | None) -> None:
    params = parameters()
    optimizer = Muon(params, 0.1, momentum=0.9, weight_decay=0.05)
    expected = [p.data.copy() for p in params]
    velocity = [np.zeros(p.data.shape) for p in params]
    mu = momentum or 0.9
    for step in range(STEPS):
        give_gradients(params, step)
        optimizer.step(momentum=momentum)
        for i, p in enumerate(params):
            velocity[i] = mu * velocity[i] + p.grad
            d = p.grad + mu * velocity[i]
            if p.data.ndim > 1:
                rows, columns = len(d), d[0].size
                d = by_singular_values(d.reshape(rows, columns)).reshape(d.shape) * max(1, rows / columns) ** 0.5
            expected[i] = (1 - 0.1 * 0.05) * expected[i] - 0.1 * d
            np.testing.assert_allclose(p.data, expected[i], rtol=1e-10, atol=1e-10)


# ---- memory, dtype, layout

KINDS: list[Callable[..., Optimizer]] = [
    lambda params: SGD(params, 0.1, weight_decay=0.1),
    lambda params: SGD(params, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    lambda params: RMSProp(params, 0.1),
    lambda params: RMSProp(params, 0.1, momentum=0.9, weight_decay=0.1),
    lambda params: AdamW(params, 0.1),
    lambda params: Muon(params, 0.1, weight_decay=0.1),
]
NAMES = ["SGD", "SGD-nesterov", "RMSProp", "RMSProp-all", "AdamW", "Muon"]
every_optimizer = pytest.mark.parametrize("build", KINDS, ids=NAMES)


@every_optimizer
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_updates_in_place_and_leaves_gradients_alone(build: Callable[..., Optimizer], dtype: Any) -> None:
    params = parameters(dtype)
    optimizer = build(params)
    before = [(p.data, p.data.ctypes.data, p.data.strides, p.data.copy()) for p in params]
    for step in range(2):
        give_gradients(params, step)
        gradients = [(p.grad, np.array(p.grad)) for p in params]
        optimizer.step(lr=np.float64(0.05))  # a NumPy scalar from a schedule must not promote
        for p, (array, address, strides, old), (gradient, values) in zip(params, before, gradients, strict=True):
            assert p.data is array
            assert (p.data.ctypes.data, p.data.strides, p.data.dtype) == (address, strides, dtype)
            assert not np.array_equal(p.data, old)
            assert p.grad is gradient
            np.testing.assert_array_equal(gradient, values)
    for slot in optimizer.slots:
        for state in slot.state.values():
            assert (state.dtype, state.strides) == (dtype, slot.param.data.strides)


@every_optimizer
def test_layouts_of_parameter_and_gradient_may_differ(build: Callable[..., Optimizer]) -> None:
    ours, theirs = parameters(), parameters()
    theirs[0].data = np.ascontiguousarray(theirs[0].data)
    for params in (ours, theirs):
        optimizer = build(params)
        for step in range(3):
            give_gradients(params, step)
            params[0].grad = np.ascontiguousarray(params[0].grad)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(p.data, q.data)


@every_optimizer
def test_a_step_needs_one_scratch_array(build: Callable[..., Optimizer]) -> None:
    params = [Parameter(np.ones((64, 3, 100, 10), np.float32), np.ones((64, 3, 100, 10), np.float32)) for _ in range(4)]
    optimizer = build(params)
    tracemalloc.start()
    optimizer.step()
    arrays = tracemalloc.get_traced_memory()[1] / params[0].data.nbytes
    tracemalloc.stop()
    with_decay = isinstance(optimizer, RMSProp) and optimizer.slots[0].options["weight_decay"] > 0.0
    assert arrays < (5.1 if isinstance(optimizer, Muon) else 2.1 if with_decay else 1.1)


@every_optimizer
def test_no_gradient_no_update(build: Callable[..., Optimizer]) -> None:
    params = parameters()
    optimizer = build(params)
    give_gradients(params, 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    optimizer.step()
    for p, untouched in zip(params, parameters(), strict=True):
        np.testing.assert_array_equal(p.data, untouched.data)
    assert optimizer.state_dict()["updates"].tolist() == [0] * len(params)


# ---- state


@every_optimizer
def test_resumes_bit_for_bit(build: Callable[..., Optimizer], tmp_path: Any) -> None:
    params = parameters(np.float32)
    optimizer = build(params)
    for step in range(5):
        give_gradients(params, step)
        optimizer.step()
    np.savez(tmp_path / "state.npz", **optimizer.state_dict())

    resumed = parameters(np.float32, seed=1)
    for p, q in zip(resumed, params, strict=True):
        p.data[...] = q.data
    other = build(resumed)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        other.load_state_dict(state)
    for step in range(5, 8):
        for which, its in ((optimizer, params), (other, resumed)):
            give_gradients(its, step)
            which.step()
        for p, q in zip(resumed, params, strict=True):
            np.testing.assert_array_equal(p.data, q.data)
    for slot in other.slots:
        assert all(state.strides == slot.param.data.strides for state in slot.state.values())


def test_state_dict_is_a_copy_with_names_by_position() -> None:
    params = parameters()
    optimizer = SGD([{"params": params[:1], "momentum": 0.0}, {"params": params[1:]}], 0.1, momentum=0.9)
    state = optimizer.state_dict()
    assert list(state) == ["updates", "velocity.1", "velocity.2", "velocity.3"]
    give_gradients(params, 0)
    optimizer.step()
    assert not state["updates"].any()
    assert not state["velocity.1"].any()
    assert optimizer.state_dict()["updates"].tolist() == [1, 1, 1, 1]


def test_a_misfit_is_named_and_changes_nothing() -> None:
    params = parameters()
    optimizer = SGD(params, 0.1, momentum=0.9)
    give_gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    wrong = dict(state, **{"mean.0": np.zeros(3), "velocity.2": np.zeros(6), "velocity.3": np.zeros(1, np.float32)})
    del wrong["velocity.0"]
    with pytest.raises(StateError) as caught:
        optimizer.load_state_dict(wrong)
    for part in (
        "SGD",
        "missing (1): velocity.0",
        "unexpected (1): mean.0",
        "velocity.2 is float64 (6,) instead of float64 (5,)",
        "velocity.3 is float32 (1,) instead of float64 (1,)",
    ):
        assert part in str(caught.value)
    for name, x in optimizer.state_dict().items():
        np.testing.assert_array_equal(x, state[name])


# ---- groups, clipping, errors


def test_decay_groups_decays_weights_only() -> None:
    params = parameters()
    named = list(zip(["conv.weight", "fc.weight", "bn.gamma", "fc.bias"], params, strict=True))

    class Module:
        def named_parameters(self) -> Any:
            yield from named

    for source in (named, Module()):
        weights, rest = decay_groups(source, 5e-4)
        assert (weights["weight_decay"], rest["weight_decay"]) == (5e-4, 0.0)
        assert [id(p) for p in weights["params"]] == [id(p) for p in params[:2]]
        assert [id(p) for p in rest["params"]] == [id(p) for p in params[2:]]
    assert [slot.options["weight_decay"] for slot in SGD(decay_groups(named, 5e-4), 0.1).slots] == [5e-4] * 2 + [
        0.0
    ] * 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_clipping(dtype: Any) -> None:
    params = parameters(dtype)
    give_gradients(params, 0)
    params[1].grad = None
    shared = np.broadcast_to(np.asarray(3.0, dtype), (5,))  # read-only: an upstream gradient that was never written out
    params[2].grad = shared
    present = [p for p in params if p.grad is not None]
    norm = math.sqrt(sum(float(g) ** 2 for p in present for g in np.asarray(p.grad).ravel()))

    untouched = [np.array(p.grad) for p in present]
    np.testing.assert_allclose(clip_by_norm(params, 10 * norm), norm, rtol=1e-14)
    for p, g in zip(present, untouched, strict=True):
        np.testing.assert_array_equal(np.asarray(p.grad), g)

    total = clip_by_norm(params, 0.25)
    assert isinstance(total, np.ndarray)
    assert (total.shape, total.dtype) == ((), np.float64)
    np.testing.assert_allclose(clip_by_norm(params, 1.0), 0.25, rtol=1e-5)
    assert params[1].grad is None
    assert (shared == 3.0).all()
    for p in present:
        assert p.grad is not None
        assert (p.grad.dtype, p.grad.strides) == (dtype, p.data.strides)


def test_clipping_sums_in_float64_and_passes_infinity_on() -> None:
    large = Parameter(np.zeros(4, np.float32), np.full(4, 1e30, np.float32))  # its square is no float32
    np.testing.assert_allclose(clip_by_norm([large], 1.0), 2e30, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(large.grad), 0.5, rtol=1e-6)
    broken = Parameter(np.zeros(2), np.array([1.0, np.nan]))
    assert np.isnan(clip_by_norm([broken], 1.0))
    assert clip_by_norm([Parameter(np.zeros(2))], 1.0) == 0.0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_clipping_leaves_gradients_alone_that_have_no_norm(value: float) -> None:
    """A factor of 0, or NaN, would erase the finite ones, and make NaN of what was infinite."""
    p, q = Parameter(np.zeros(2), np.array([value, 1.0])), Parameter(np.zeros(2), np.array([1.0, 1.0]))
    assert not np.isfinite(clip_by_norm([p, q], 1.0))
    np.testing.assert_array_equal(p.grad, [value, 1.0])
    np.testing.assert_array_equal(q.grad, [1.0, 1.0])


def one() -> list[Parameter]:
    return [Parameter(np.zeros(3), np.ones(3))]


shared_parameter = Parameter(np.zeros(3))


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (lambda: SGD(one(), -0.1), "lr must be a number of at least 0, got -0.1"),
        (lambda: SGD(one(), "0.1"), "lr must be a number of at least 0, got '0.1'"),
        (lambda: SGD(one(), math.nan), "lr must be a number of at least 0, got nan"),
        (lambda: AdamW(one(), 0.1, betas=(0.9, -0.1)), "betas must be a number of at least 0, got"),
        (lambda: AdamW(one(), 0.1, betas=(1.0, 0.999)), "AdamW: beta1 must be below 1, got 1.0"),
        (lambda: AdamW([{"params": one(), "betas": (0.9, 1.5)}], 0.1), "AdamW: beta2 must be below 1, got 1.5"),
        (lambda: AdamW(one(), 0.1).step(momentum=1.0), "AdamW: momentum must be below 1, got 1.0"),
        (lambda: RMSProp(one(), 0.1, decay=1.5), "RMSProp: decay must be at most 1, got 1.5"),
        (lambda: SGD(one(), 0.1).step(lr=-1.0), "lr must be a number of at least 0, got -1.0"),
        (lambda: SGD(one(), 0.1).step(lr=math.nan), "lr must be a number of at least 0, got nan"),
        (lambda: SGD(one(), 0.1, momentum=0.9).step(momentum=-0.1), "momentum must be a number of at least 0, got"),
        (lambda: SGD([{"params": nn.Linear(2, 2).weight}], 0.1), "group 0: 'params' must be a list of parameters"),
        (lambda: AdamW(one(), 0.1, betas=0.9), r"betas must be two numbers, \(beta1, beta2\), got 0.9"),
        (lambda: SGD(one(), 0.1, nesterov=True), "nesterov=True needs a momentum"),
        (lambda: SGD([{"params": one(), "momentum": 0.0}], 0.1, momentum=0.9, nesterov=True), "needs a momentum"),
        (lambda: SGD([], 0.1), "SGD got no parameters"),
        (lambda: SGD([{"params": []}], 0.1), "SGD got no parameters"),
        (lambda: SGD([shared_parameter, shared_parameter], 0.1), "given twice"),
        (lambda: AdamW([{"params": [shared_parameter]}, {"params": [shared_parameter]}], 0.1), "given twice"),
        (lambda: SGD([{"params": one(), "lr": 0.1}], 0.1), r"group 0: there is no option 'lr': choose from lr_scale"),
        (lambda: SGD([{"params": one(), "momentun": 0.1}], 0.1), "did you mean 'momentum'"),
        (lambda: SGD([{"momentum": 0.1}], 0.1), "group 0 has no 'params'"),
        (lambda: SGD(nn.Linear(1, 1), 0.1), r"SGD wants parameters, as model\.parameters\(\) gives them, got Linear"),
        (lambda: SGD(nn.Linear(1, 1).named_parameters(), 0.1), r"as model\.parameters\(\) gives them, got tuple"),
        (lambda: SGD(nn.Linear(2, 2).weight, 0.1), "SGD wants parameters, .*, got Parameter"),
        (lambda: SGD([np.zeros(3)], 0.1), "SGD wants parameters, .*, got ndarray"),
        (lambda: decay_groups(list(nn.Linear(2, 2).parameters()), 0.1), "decay_groups wants a module, or its named"),
        (lambda: SGD([{"params": one(), "lr_scale": -1.0}], 0.1), "lr_scale must be a number of at least 0, got -1.0"),
        (lambda: SGD(one(), 0.1).step(momentum=0.9), "momentum=0.9, but SGD was built without one"),
        (lambda: clip_by_norm(one(), 0.0), "max_norm must be above 0, got 0.0"),
    ],
)
def test_mistakes_are_explained(mistake: Callable[[], object], sentence: str) -> None:
    with pytest.raises(MinigradError, match=sentence):
        mistake()
