"""Arenas: what may be done to parameters that lie in one, and what is refused."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
from test_optim import SHAPES, Parameter, give_gradients, parameters

from minigrad import nn
from minigrad.arena import Arena, Layout
from minigrad.errors import MinigradError
from minigrad.optim import SGD, AdamW, Muon, Optimizer
from minigrad.tensor import Tensor
from minigrad.threads import num_threads, set_num_threads


def momentum_by_hand(params: list[Parameter], steps: int, lr: float = 0.1) -> list[np.ndarray]:
    """v ← 0.9·v + g, p ← p − lr·v, with the gradients of `give_gradients`."""
    twins = [Parameter(p.data.copy()) for p in params]
    velocity = [np.zeros(p.data.shape) for p in params]
    for step in range(steps):
        give_gradients(twins, step)
        for p, v in zip(twins, velocity, strict=True):
            v[...] = 0.9 * v + p.grad
            p.data = p.data - lr * v
    return [p.data for p in twins]


def take(optimizer: Optimizer, params: list[Parameter], step: int) -> None:
    give_gradients(params, step)
    optimizer.step()


def assert_close(params: list[Parameter], expected: list[np.ndarray]) -> None:
    for p, value in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.data, value, rtol=1e-12, atol=1e-12)


def test_parameters_are_views_that_start_at_cache_lines_in_channels_last_memory() -> None:
    params = parameters(np.float32)
    before = [p.data.copy() for p in params]
    (arena,) = SGD(params, 0.1).arenas
    for p, old in zip(params, before, strict=True):
        assert np.shares_memory(p.data, arena.data)
        assert p.data.ctypes.data % 64 == 0
        np.testing.assert_array_equal(p.data, old)
    assert params[0].data.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("shapes", [[(3,), (0, 4), (), (70000, 3), (2, 50000), (5, 4)], [(1, 200000)], [()]])
def test_blocks_and_their_pieces_cover_every_value_once(shapes: list[tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    arrays = [np.asarray(rng.standard_normal(shape)) for shape in shapes]
    layout = Layout(arrays)
    values, seen = layout.zeros(), np.zeros(layout.starts[-1], int)
    layout.gather(arrays, values)
    for block in layout.blocks():
        seen[block.values] += 1
    assert (seen == 1).all()
    for x, view in zip(arrays, values.views, strict=True):
        np.testing.assert_array_equal(view, x)
    assert len(layout.blocks()) > 5 or shapes[0] != (3,)


@pytest.mark.parametrize("kind", [SGD, AdamW, Muon])
def test_any_number_of_threads_gives_the_same_bits(kind: Any) -> None:
    results, before = [], num_threads()
    try:
        for threads in (1, 2, 5):
            set_num_threads(threads)
            params = [Parameter(np.random.default_rng(i).standard_normal((300, 257))) for i in range(3)]
            optimizer = kind(params, 0.1)
            for step in range(2):
                give_gradients(params, step)
                optimizer.step(max_norm=1.0)
            results.append([p.data.tobytes() for p in params])
    finally:
        set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_an_array_set_as_data_is_taken_into_the_arena() -> None:
    params = parameters()
    expected = momentum_by_hand(params, 3)
    optimizer = SGD(params, 0.1, momentum=0.9)
    for step in range(3):
        for p in params:
            p.data = np.asfortranarray(p.data)
        take(optimizer, params, step)
    assert_close(params, expected)
    assert all(np.shares_memory(p.data, optimizer.arenas[0].data) for p in params)


def test_two_optimizers_over_one_model_take_turns() -> None:
    params = parameters()
    start = [p.data.copy() for p in params]
    first, second = SGD(params, 0.1), SGD(params, 0.01)
    total = [np.zeros(shape) for shape in SHAPES]
    for step in range(4):
        optimizer, lr = ((first, 0.1), (second, 0.01))[step % 2]
        take(optimizer, params, step)
        for t, p in zip(total, params, strict=True):
            t += lr * np.asarray(p.grad)
    assert_close(params, [p - t for p, t in zip(start, total, strict=True)])


def test_a_copy_of_model_and_optimizer_goes_on_by_itself() -> None:
    params = parameters()
    expected = momentum_by_hand(params, 3)
    optimizer = SGD(params, 0.1, momentum=0.9)
    take(optimizer, params, 0)
    alone = copy.deepcopy(params)
    both = params, optimizer
    pairs = [copy.deepcopy(both), pickle.loads(pickle.dumps(both)), both]
    untouched = [p.data.copy() for p in alone]
    for theirs, own in pairs:
        for step in (1, 2):
            take(own, theirs, step)
        assert_close(theirs, expected)
    assert_close(alone, untouched)
    with pytest.raises(MinigradError, match=r"copy\.deepcopy\(\(model, optimizer\)\)"):
        copy.copy(optimizer)


def test_a_model_copied_after_an_optimizer_was_built_has_memory_of_its_own() -> None:
    model = nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), 0.1)
    twin = copy.deepcopy(model)
    before = twin.state_dict()
    model(Tensor(np.ones((1, 3), np.float32))).sum().backward()
    optimizer.step()
    np.testing.assert_array_equal(twin.state_dict()["weight"], before["weight"])
    model.load_state_dict(before)  # in place: still in the arena
    assert np.shares_memory(model.weight.data, optimizer.arenas[0].data)
    np.testing.assert_array_equal(model.weight.data, before["weight"])


def test_gradients_that_come_and_go_are_updated_by_their_own_count() -> None:
    """AdamW's first update moves each value by lr, whatever the gradient, also where it comes a step later."""
    params = [Parameter(np.zeros(3)) for _ in range(3)]
    optimizer = AdamW(params, 0.1, eps=0.0, weight_decay=0.0)
    for due in ([0, 2], [0, 1, 2]):
        for i, p in enumerate(params):
            p.grad = np.full(3, 7.0) if i in due else None
        optimizer.step()
    np.testing.assert_allclose([p.data[0] for p in params], [-0.2, -0.1, -0.2], rtol=1e-12)
    assert [slot.updates for slot in optimizer.slots] == [2, 1, 2]


def changed(how: Any) -> Any:
    params = parameters()
    optimizer = SGD(params, 0.1, momentum=0.9)
    give_gradients(params, 0)
    how(params)
    optimizer.step()


def set_data(i: int, x: Any) -> Any:
    return lambda params: setattr(params[i], "data", x)


def set_grad(i: int, x: Any) -> Any:
    return lambda params: setattr(params[i], "grad", x)


shared = np.zeros(3)


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (lambda: SGD([Parameter(shared), Parameter(shared)], 0.1), r"two tensors \(3,\) share their memory"),
        (lambda: changed(set_data(2, np.zeros(6))), r"float64 \(5,\) on numpy and is float64 \(6,\) on numpy"),
        (lambda: changed(set_data(2, np.zeros(5, np.float32))), r"and is float32 \(5,\) on numpy: build a new SGD"),
        (lambda: changed(set_grad(2, np.zeros(1))), r"a gradient is float64 \(1,\), its parameter float64 \(5,\)"),
        (lambda: changed(set_grad(2, np.zeros(5, np.float32))), r"a gradient is float32 \(5,\), its parameter float64"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(mistake: Any, sentence: str) -> None:
    with pytest.raises(MinigradError, match=sentence):
        mistake()


def test_moving_in_frees_the_old_arrays() -> None:
    tensors = [Parameter(np.ones(1000)) for _ in range(3)]
    old = [weakref.ref(t.data) for t in tensors]
    Arena(tensors)
    assert [ref() for ref in old] == [None] * 3
