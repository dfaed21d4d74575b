"""Optimizers and clipping on a GPU: as many launches for any number of parameters, the same numbers as on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_on_cpu
import fake_cupy
import fake_graph
import numpy as np
import pytest
from test_optim import CASES, KINDS, NAMES, Parameter, case_ids

from minigrad.backend import to_host
from minigrad.layout import empty_images
from minigrad.optim import SGD, AdamW, Muon, Optimizer, clip_by_norm

MANY: list[tuple[int, ...]] = [
    (1,), (2,), (5,), (7, 1), (16, 3, 3, 3), (4, 8, 1, 1), (4096,), (4097,), (8193, 2), (100003,), (16, 3, 3, 3),
    (9, 40),
]  # fmt: skip
VIEWS = {"transpose", "reshape", "ascontiguousarray"}  # of what lies so already: no work
on_cupy = pytest.mark.parametrize("xp", ["fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
on_fake = pytest.mark.parametrize("xp", ["fake_cupy"], indirect=True)


def twins(xp: Any, shapes: list[Any], dtype: Any) -> tuple[list[Parameter], list[Parameter]]:
    """The same parameters on the host and on the device, filters channels-last."""
    ours, theirs = [], []
    for number, shape in enumerate(shapes):
        x = np.random.default_rng(number).standard_normal(shape).astype(dtype)
        for place, params in ((np, ours), (xp, theirs)):
            data = empty_images(place, shape, dtype)
            data[...] = place.asarray(x)
            params.append(Parameter(data))
    return ours, theirs


def give_both(ours: list[Parameter], theirs: list[Parameter], xp: Any, step: int) -> None:
    """Gradients, some of them None, some in another layout than their parameter, one that was never written out."""
    rng = np.random.default_rng(1000 + step)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        p.grad = np.empty_like(p.data)
        p.grad[...] = rng.standard_normal(p.data.shape)
        q.grad = xp.empty_like(q.data)
        q.grad[...] = xp.asarray(p.grad)
        if (i + step) % 4 == 1:
            p.grad = q.grad = None
        elif (i + step) % 4 == 2:
            q.grad = xp.ascontiguousarray(q.grad)
        elif i == 2:
            p.grad = np.broadcast_to(p.data.dtype.type(0.5), p.data.shape)
            q.grad = xp.broadcast_to(xp.asarray(0.5, p.data.dtype), p.data.shape)


@on_cupy
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 2e-6)])
@pytest.mark.parametrize(("kind", "options"), [*(case[:2] for case in CASES), (Muon, {})], ids=[*case_ids, "Muon"])
def test_device_and_host_agree(
    monkeypatch: pytest.MonkeyPatch, xp: Any, kind: Any, options: Any, dtype: Any, tolerance: float, reverse: bool
) -> None:
    """All optimizers and options, in groups, for scheduled values, parameters of 1 to 100,003 values."""
    monkeypatch.setattr(cuda_on_cpu, "REVERSED", reverse)
    tolerance *= 10 if kind is Muon else 1  # small singular values grow forty-fold, and what they are off by
    ours, theirs = twins(xp, MANY, dtype)
    scheduled = kind in (AdamW, Muon) or bool(options.get("momentum"))
    optimizers = [
        kind([{"params": params[:4], "lr_scale": 2.0, "weight_decay": 0.2}, {"params": params[4:]}], 0.05, **options)
        for params in (ours, theirs)
    ]
    before = [q.data for q in theirs]
    for step in range(4):
        give_both(ours, theirs, xp, step)
        for optimizer in optimizers:
            optimizer.step(lr=0.05 / (step + 1), momentum=0.8 + 0.04 * step if scheduled else None)
    for p, q, data in zip(ours, theirs, before, strict=True):
        assert q.data is data
        np.testing.assert_allclose(to_host(q.data), p.data, rtol=tolerance, atol=tolerance)
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    for name, x in states[0].items():
        np.testing.assert_allclose(to_host(states[1][name]), x, rtol=tolerance, atol=tolerance)


def launches() -> dict[str, int]:
    """What was started since the last call, without waiting for the device."""
    assert not fake_cupy.SYNCS
    found = {name: n for name, n in fake_cupy.LAUNCHES.items() if name not in VIEWS}
    fake_cupy.LAUNCHES.clear()
    return found


@on_fake
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("build", KINDS[:-1], ids=NAMES[:-1])  # all but Muon, which multiplies too
def test_as_many_launches_for_one_parameter_as_for_twenty(
    xp: Any, build: Callable[..., Optimizer], max_norm: float | None
) -> None:
    counts = []
    for shapes in (MANY[:1], MANY + MANY):
        _, theirs = twins(xp, shapes, np.float32)
        optimizer = build(theirs)
        for step in range(3):
            if step != 1:
                for q in theirs:
                    q.grad = xp.ones_like(q.data)
            launches()
            optimizer.step(lr=0.1 * step, max_norm=max_norm)
            counts.append(launches())
    assert counts[:3] == counts[3:]
    assert (counts[1]["gather"], counts[1]["set"]) == (1, 1)  # the numbers; the gradients lie where they lay
    assert sum(counts[1].values()) <= 18 + 10 * (max_norm is not None), counts[1]


@on_fake
def test_muon_multiplies_weights_of_one_shape_at_once(xp: Any) -> None:
    counts = []
    for shapes in (MANY, MANY * 3):
        _, theirs = twins(xp, shapes, np.float32)
        optimizer = Muon(theirs, 0.1)
        for _ in range(2):
            for q in theirs:
                q.grad = xp.ones_like(q.data)
            launches()
            optimizer.step()
        counts.append(launches())
    assert counts[0] == counts[1]
    assert len({shape for shape in MANY if len(shape) > 1}) == 5 == len(optimizer._matrices())


@on_fake
@pytest.mark.parametrize("kind", [SGD, AdamW, Muon])
def test_a_captured_step_takes_the_numbers_of_its_replay(xp: Any, kind: Any) -> None:
    (ours, theirs), scheduled = twins(xp, MANY, np.float64), [(0.1, 0.9), (0.02, 0.5), (0.3, 0.7)]
    options = {"momentum": 0.9} if kind is SGD else {}
    host, device = (kind(params, 0.1, weight_decay=0.1, **options) for params in (ours, theirs))
    for p, q in zip(ours, theirs, strict=True):
        p.grad, q.grad = np.ones_like(p.data), xp.ones_like(q.data)
    stream, pool = fake_cupy.Stream(non_blocking=True), fake_graph.MemoryPool(fake_cupy.Memory)
    with stream:
        device.step(*scheduled[0])
        updates = [slot.updates for slot in device.slots]
        stream.begin_capture()
        with fake_cupy.cuda.using_allocator(pool.malloc):
            device.step(*scheduled[0])
        graph, gradients = stream.end_capture(), [q.grad for q in theirs]
        for slot, number in zip(device.slots, updates, strict=True):
            slot.updates = number
        runs, kept = device.finish_capture()
        for numbers in scheduled[1:]:
            for q in theirs:  # a step that is taken otherwise leaves other gradients and fewer runs
                q.grad = None
            device.step()
            device.runs = runs
            device.tell(*numbers)
            graph.launch()
    del kept, gradients
    for numbers in scheduled:
        host.step(*numbers)
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(to_host(q.data), p.data, rtol=1e-9)


@on_cupy
@pytest.mark.parametrize("kind", [AdamW, SGD])  # with state, and without
def test_parameters_of_any_memory_order_and_two_dtypes(xp: Any, kind: Any) -> None:
    """With gaps, in Fortran's order, replaced by an array of another order later, and in float32 beside float64."""
    ours, theirs = twins(xp, [(4, 6), (6, 4), (5, 3)], np.float64)
    for place, params in ((np, ours), (xp, theirs)):
        params[0].data = place.asarray(np.arange(48.0).reshape(4, 12))[:, ::2]
        params.append(Parameter(place.ones(3, np.float32)))
        params[2].data = place.asfortranarray(params[2].data)
    values = [p.data.copy() for p in ours]
    host, device = (kind(params, 0.1) for params in (ours, theirs))
    for p, q in zip(ours, theirs, strict=True):
        p.grad, q.grad = np.ones_like(p.data), xp.ones_like(q.data)
    for params in (ours, theirs):
        params[1].data = params[1].data.copy().T.reshape(4, 6).T
    values[1] = values[1].T.reshape(4, 6).T
    for _ in range(2):
        host.step()
        device.step()
    for p, q, value in zip(ours, theirs, values, strict=True):
        np.testing.assert_allclose(to_host(q.data), p.data, rtol=1e-6)
        if kind is SGD:
            np.testing.assert_allclose(p.data, value - 0.2, rtol=1e-6)


@on_cupy
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_device_and_host_clip_alike(monkeypatch: pytest.MonkeyPatch, xp: Any, dtype: Any, reverse: bool) -> None:
    monkeypatch.setattr(cuda_on_cpu, "REVERSED", reverse)
    for step, max_norm in enumerate((1e9, 2.0, 0.01)):
        ours, theirs = twins(xp, MANY, dtype)
        give_both(ours, theirs, xp, step)
        kept = [(q.grad, to_host(q.grad)) for q in theirs if q.grad is not None]
        norms = clip_by_norm(ours, max_norm), clip_by_norm(theirs, max_norm)
        assert norms[1].shape == ()
        np.testing.assert_allclose(to_host(norms[1]), norms[0], rtol=1e-12)
        for p, q in zip(ours, theirs, strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                assert q.grad.dtype == dtype
                np.testing.assert_allclose(to_host(q.grad), p.grad, rtol=1e-6 if dtype == np.float32 else 1e-13)
        for gradient, values in kept:
            np.testing.assert_array_equal(to_host(gradient), values)


@on_cupy
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_clipping_hides_nothing_on_a_device(xp: Any, value: float) -> None:
    ours, theirs = twins(xp, MANY[:4], np.float32)
    for params, place in ((ours, np), (theirs, xp)):
        for p in params:
            p.grad = place.ones_like(p.data)
        params[1].grad[0] = value
        np.testing.assert_equal(float(to_host(clip_by_norm(params, 1.0))), value)
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(to_host(q.grad), p.grad)


@on_fake
def test_clipping_takes_as_many_launches_for_one_gradient_as_for_twenty(xp: Any) -> None:
    counts = []
    for shapes in (MANY[:1], MANY + MANY):
        _, theirs = twins(xp, shapes, np.float32)
        for q in theirs:
            q.grad = xp.ones_like(q.data)
        launches()
        clip_by_norm(theirs, 1.0)
        counts.append(launches())
    assert counts[0] == counts[1]
    assert counts[0]["gather"] == 1


@on_cupy
def test_an_optimizer_of_your_own_needs_no_kernel(xp: Any) -> None:
    class Sign(SGD):
        def _update(self, p: Any, g: Any, state: Any, n: Any, options: Any) -> None:
            p -= n.lr * xp.sign(g)

    p = Parameter(xp.ones(3))
    p.grad = xp.asarray([-3.0, 0.0, 2.0])
    Sign([p], 0.5).step()
    np.testing.assert_array_equal(to_host(p.data), [1.5, 1.0, 0.5])
