"""Optimizers and clipping on a GPU: all parameters in one launch, the same numbers as on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_on_cpu
import fake_cupy
import numpy as np
import pytest
from test_optim import CASES, KINDS, NAMES, Parameter, case_ids

from minigrad.backend import to_host
from minigrad.layout import empty_images
from minigrad.optim import SGD, AdamW, ClipByNorm, Muon, Optimizer, clip_by_norm

MANY: list[tuple[int, ...]] = [
    (1,), (2,), (5,), (7, 1), (16, 3, 3, 3), (4, 8, 1, 1), (4096,), (4097,), (8193, 2), (100003,), (16, 3, 3, 3),
    (9, 40),
]  # fmt: skip
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


@on_fake
@pytest.mark.parametrize("build", KINDS[:-1], ids=NAMES[:-1])  # all but Muon, which multiplies too
def test_as_many_launches_for_one_parameter_as_for_twenty(xp: Any, build: Callable[..., Optimizer]) -> None:
    counts = []
    for shapes in (MANY[:1], MANY + MANY):
        _, theirs = twins(xp, shapes, np.float32)
        optimizer = build(theirs)
        for step in range(3):
            if step != 1:
                for q in theirs:
                    q.grad = xp.ones_like(q.data)
            fake_cupy.LAUNCHES.clear()
            fake_cupy.SYNCS.clear()
            optimizer.step(lr=0.1 * step)
            counts.append(dict(fake_cupy.LAUNCHES))
            assert not fake_cupy.SYNCS
    assert counts[0] == counts[3]
    assert counts[1] == counts[4] == {"set": 1, optimizer.kernel: 1}


@on_fake
def test_muon_multiplies_weights_of_one_shape_at_once(xp: Any) -> None:
    counts = []
    for shapes in (MANY, MANY * 3):
        _, theirs = twins(xp, shapes, np.float32)
        optimizer = Muon(theirs, 0.1)
        for _ in range(2):
            for q in theirs:
                q.grad = xp.ones_like(q.data)
            fake_cupy.LAUNCHES.clear()
            fake_cupy.SYNCS.clear()
            optimizer.step()
            assert not fake_cupy.SYNCS
        counts.append(dict(fake_cupy.LAUNCHES))
    assert counts[0] == counts[1]
    assert (counts[0]["muon_momentum"], counts[0]["muon"], len(optimizer.stacks)) == (1, 1, 5)


@on_fake
def test_a_recorded_launch_takes_the_numbers_of_its_step(xp: Any) -> None:
    """What a CUDA graph replays is the launch alone: the same tables at the same place, filled anew before it."""
    (ours, theirs), scheduled = twins(xp, MANY, np.float64), [(0.1, 0.9), (0.02, 0.5), (0.3, 0.7)]
    host, device = (SGD(params, 0.1, momentum=0.9, weight_decay=0.1) for params in (ours, theirs))
    for p, q in zip(ours, theirs, strict=True):
        p.grad, q.grad = np.ones_like(p.data), xp.ones_like(q.data)
    device.step(*scheduled[0])
    tables = [(table, table.data.ptr) for table in (device.together.addresses, device.together.numbers)]
    launch, device.together.launch = device.together.launch, lambda: None
    for lr, momentum in scheduled[1:]:
        device.step(lr, momentum)  # which only writes
        launch()
    for lr, momentum in scheduled:
        host.step(lr, momentum)
    assert [(table, address) for table, address in tables if table.data.ptr == address] == tables
    assert tables[1][0] is device.together.numbers
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(to_host(q.data), p.data, rtol=1e-13)


@on_cupy
@pytest.mark.parametrize("kind", [AdamW, SGD])  # with state, and without
def test_what_does_not_fit_into_the_launch_is_updated_by_the_formula(xp: Any, kind: Any) -> None:
    """Parameters with gaps, state of another layout or dtype than its parameter's, and two dtypes."""
    ours, theirs = twins(xp, [(4, 6), (6, 4), (5, 3)], np.float64)
    for place, params in ((np, ours), (xp, theirs)):
        params[0].data = place.asarray(np.arange(48.0).reshape(4, 12))[:, ::2]
        params.append(Parameter(place.ones(3, np.float32)))
        params[2].data = place.asfortranarray(params[2].data)
    host, device = (kind(params, 0.1) for params in (ours, theirs))
    for p, q in zip(ours, theirs, strict=True):
        p.grad, q.grad = np.ones_like(p.data), xp.ones_like(q.data)
    for params in (ours, theirs):
        params[1].data = params[1].data.copy().T.reshape(4, 6).T  # another layout than its state has
    for _ in range(2):
        host.step()
        device.step()
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(to_host(q.data), p.data, rtol=1e-6)


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
@pytest.mark.xfail(reason="the kernel still multiplies gradients without a norm by NaN or 0", strict=True)
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
        fake_cupy.LAUNCHES.clear()
        fake_cupy.SYNCS.clear()
        clip_by_norm(theirs, 1.0)
        assert not fake_cupy.SYNCS
        counts.append(dict(fake_cupy.LAUNCHES))
    assert counts[0] == counts[1]
    assert (counts[0]["squares"], counts[0]["clip"]) == (1, 1)


@on_fake
def test_clipping_step_after_step_makes_its_tables_once(xp: Any) -> None:
    _, theirs = twins(xp, MANY, np.float32)
    clip, kept = ClipByNorm(1.0), []
    for _ in range(3):
        for q in theirs:
            q.grad = xp.ones_like(q.data)
        kept += [q.grad for q in theirs]  # so that the next ones lie elsewhere
        fake_cupy.LAUNCHES.clear()
        clip(theirs)
        found = dict(fake_cupy.LAUNCHES)
    assert {name: found.get(name) for name in ("set", "asarray", "squares", "clip")} == {
        "set": 1, "asarray": None, "squares": 1, "clip": 1,
    }  # fmt: skip
    clip(theirs[:2])  # other parameters
    norm = np.sqrt(sum(float(xp.sum(q.grad * q.grad)) for q in theirs[2:]))
    np.testing.assert_allclose(float(clip(theirs[2:])), norm, rtol=1e-6)


@on_cupy
def test_an_optimizer_of_your_own_needs_no_kernel(xp: Any) -> None:
    class Sign(SGD):
        def _update(self, p: Any, g: Any, slot: Any, lr: float, **options: Any) -> None:
            p -= lr * xp.sign(g)

    p = Parameter(xp.ones(3))
    p.grad = xp.asarray([-3.0, 0.0, 2.0])
    Sign([p], 0.5).step()
    np.testing.assert_array_equal(to_host(p.data), [1.5, 1.0, 0.5])
