"""Pictures on their way to a GPU: the same bits as the host's, few bytes, nothing too early, nobody waiting."""

from __future__ import annotations

import gc
import importlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_on_cpu
import fake_cupy
import numpy as np
import pytest
import tiny_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_backend import needs_cupy
from test_training import Net

from inception.data import Augment, Dataset, Loader, feed, mean_and_std, normalise
from inception.data.feed import Feed, Resident, Uploaded, open_feed
from inception.training import Recipe, evaluate, train
from inception.training.step import training_step
from minigrad import backend, optim
from minigrad.backend import to_host
from minigrad.random import Key, integers

run_module = importlib.import_module("inception.training.run")

on_gpu = pytest.mark.parametrize("xp", ["fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
on_stand_in = pytest.mark.parametrize("xp", ["fake_cupy"], indirect=True)

MOVED = [
    Augment(padding, flip, cutout)
    for padding, flip, cutout in itertools.product((0, 2, 9), ("no", "random", "alternate"), (0, 3, 30))
]
REPAINTED = [Augment(2, jitter=0.4), Augment(resized_crop=(0.2, 1.0)), Augment(0, "alternate", 3, 0.2, (0.5, 0.5))]


class FromFiles:
    """Looks like pictures that are decoded when they are asked for."""

    def __init__(self, images: np.ndarray) -> None:
        self.images, self.shape, self.dtype, self.ndim = images, images.shape, images.dtype, images.ndim

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.images[rows]

    def select(self, rows: np.ndarray) -> FromFiles:
        return FromFiles(self.images[rows])


def some_dataset(n: int = 50, h: int = 5, w: int = 7, *, files: bool = False) -> Dataset:
    images = integers(Key(1), 256, (n, h, w, 3)).astype(np.uint8)
    images[..., 1] //= 2  # no two channels have the same mean and deviation
    images[..., 2] //= 5
    return Dataset(FromFiles(images) if files else images, integers(Key(2), 10, n), tuple("abcdefghij"), "some")


def some_loader(augment: Augment | None, *, files: bool = False, batch_size: int = 8, **options: Any) -> Loader:
    dataset = some_dataset(files=files)
    mean, std = mean_and_std(dataset)
    return Loader(dataset, batch_size, mean=mean, std=std, augment=augment, shuffle=True, seed=5, **options)


def on_host(loader: Loader, rows: np.ndarray, epoch: int) -> np.ndarray:
    host = Feed(loader.dataset, loader.augment, loader.mean, loader.std, loader.seed)
    return host.deliver(host.prepare(rows, epoch))


def assert_as_on_the_host(loader: Loader, xp: Any, epoch: int = 3) -> None:
    seen = 0
    for batch in loader.batches(epoch):
        assert isinstance(batch.images, xp.ndarray)
        assert batch.images.dtype == np.float32
        assert batch.images.transpose(0, 2, 3, 1).flags.c_contiguous
        np.testing.assert_array_equal(to_host(batch.images), on_host(loader, batch.rows, epoch))
        np.testing.assert_array_equal(batch.labels, loader.dataset.labels[batch.rows])
        seen += len(batch.rows)
    assert seen == len(loader.dataset)


# ---- The same bits ----


@on_gpu
@pytest.mark.parametrize("order", ["first to last", "reversed"])
@pytest.mark.parametrize("augment", [None, *MOVED], ids=str)
def test_pictures_on_the_gpu_are_changed_as_on_the_host(monkeypatch: Any, xp: Any, augment: Any, order: str) -> None:
    """5×7 pictures, up to nine pixels of padding, squares larger than the picture, a last batch of two."""
    monkeypatch.setattr(cuda_on_cpu, "REVERSED", order == "reversed")
    loader = some_loader(augment)
    assert type(loader.feed) is Resident
    assert_as_on_the_host(loader, xp)


@on_gpu
@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("augment", [None, *MOVED[-2:], *REPAINTED], ids=str)
def test_uploaded_pictures_are_changed_as_on_the_host(monkeypatch: Any, xp: Any, augment: Any, files: bool) -> None:
    monkeypatch.setattr(feed, "_SHARE", 0)
    loader = some_loader(augment, files=files)
    assert type(loader.feed) is Uploaded
    assert_as_on_the_host(loader, xp)


@on_gpu
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 6),
    h=st.integers(1, 9),
    w=st.integers(1, 40),
    padding=st.integers(0, 12),
    cutout=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_any_size(xp: Any, n: int, h: int, w: int, padding: int, cutout: int, seed: int) -> None:
    dataset = some_dataset(9, h, w)
    augment, rows = Augment(padding, cutout=cutout), integers(Key(seed).fold("rows"), 9, n)
    about = dataset, augment, np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4]), seed
    host, there = Feed(*about), open_feed(*about)
    np.testing.assert_array_equal(to_host(there.deliver(there.prepare(rows, 2))), host.prepare(rows, 2))


@on_gpu
@pytest.mark.parametrize("resident", [False, True])
def test_pictures_in_any_memory_order(monkeypatch: Any, xp: Any, resident: bool) -> None:
    """Channels first in memory, columns before rows: a kernel knows no strides."""
    monkeypatch.setattr(feed, "_SHARE", float(resident))
    plain = some_dataset()
    for order in ((0, 3, 1, 2), (3, 2, 1, 0)):
        back = np.argsort(order)
        images = np.ascontiguousarray(plain.images[...].transpose(order)).transpose(back)
        for augment in (None, Augment()):
            loader = Loader(
                replace(plain, images=images), 8, mean=np.full(3, 0.5), std=np.full(3, 0.2), augment=augment
            )
            assert isinstance(loader.feed, Resident) == resident
            assert_as_on_the_host(loader, xp)


def test_cutout_leaves_the_level_nearest_to_the_mean(xp: Any) -> None:
    dataset, mean, std = some_dataset(), np.array([127.6, 100.4, 0.5]) / 255, np.array([0.2, 0.3, 0.4])
    (batch,) = Loader(dataset, 50, mean=mean, std=std, augment=Augment(cutout=30)).batches(0)
    level = np.array([128, 100, 0], np.uint8)  # the last one half way, to even
    wanted = np.broadcast_to(normalise(level[None, None, None], mean, std), batch.images.shape)
    np.testing.assert_array_equal(to_host(batch.images), wanted)


@on_gpu
def test_the_furthest_that_augment_allows(xp: Any) -> None:
    """Squares that begin far outside, crops that lie there: the sums fit into the kernel's 32 bits."""
    assert_as_on_the_host(some_loader(Augment(0, cutout=2**15)), xp)
    loader = some_loader(Augment(2**15), batch_size=50)
    black = on_host(some_loader(Augment(500), batch_size=50), np.arange(50), 0)[0, :, :1, :1]
    (batch,) = loader.batches(0)
    np.testing.assert_array_equal(to_host(batch.images) - black, 0)


@on_gpu
@pytest.mark.parametrize("files", [False, True])
def test_prefetch_and_resuming_change_no_bit(xp: Any, files: bool) -> None:
    wanted = [to_host(batch.images) for batch in some_loader(Augment(), files=files).batches(2)]
    for prefetch, start in itertools.product((0, 4), (0, 3)):
        loader = some_loader(Augment(), files=files, prefetch=prefetch)
        found = [to_host(batch.images) for batch in loader.batches(2, start)]
        assert len(found) == len(wanted) - start
        for a, b in zip(found, wanted[start:], strict=True):
            np.testing.assert_array_equal(a, b)


@on_gpu
@pytest.mark.parametrize("files", [False, True])
def test_a_batch_stays_what_it_is(xp: Any, files: bool) -> None:
    """Whoever keeps a batch keeps its pictures, whatever becomes of the memory it came by."""
    batches = list(some_loader(Augment(), files=files, prefetch=2).batches(0))
    for batch, again in zip(batches, some_loader(Augment(), files=files).batches(0), strict=True):
        np.testing.assert_array_equal(to_host(batch.images), to_host(again.images))


# ---- How it travels ----


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each host array that is copied to the stand-in."""
    sizes: list[int] = []
    plain = fake_cupy.__getattr__("asarray")

    def asarray(data: Any, **options: Any) -> Any:
        if isinstance(data, np.ndarray):
            sizes.append(data.nbytes)
        return plain(data, **options)

    monkeypatch.setattr(fake_cupy, "asarray", asarray, raising=False)
    return sizes


@on_stand_in
def test_of_resident_pictures_six_numbers_a_picture_are_uploaded(xp: Any, uploaded: list[int]) -> None:
    batches = some_loader(Augment(), prefetch=2).batches(0)
    next(batches)
    uploaded.clear()
    next(batches)
    assert uploaded == [8 * 6 * 4]


@on_stand_in
@pytest.mark.parametrize("prefetch", [0, 1])
def test_other_pictures_are_uploaded_as_bytes(xp: Any, uploaded: list[int], prefetch: int) -> None:
    loader = some_loader(REPAINTED[0], prefetch=prefetch)
    assert loader.feed.where
    uploaded.clear()
    assert len(list(loader.batches(0))) == 7
    assert sum(uploaded) == loader.dataset.images[...].nbytes + 50 * 6 * 4


@on_stand_in
@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_nothing_waits_and_nothing_is_overwritten_early(xp: Any, files: bool, prefetch: int) -> None:
    """The stand-in refuses what is used before it has arrived, and notes what may be overwritten before it is read."""
    loader = some_loader(Augment(), files=files, prefetch=prefetch)
    model, recipe = Net(dropout=0.5), Recipe()
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    fake_cupy.RACES.clear()
    fake_cupy.SYNCS.clear()
    for step, batch in enumerate(loader.batches(0)):
        model.set_key(Key(0).fold(step), batch.rows)
        training_step(model, batch, recipe)
        optimizer.step()
        optimizer.zero_grad()
    for end in ("close", "drop"):
        batches = loader.batches(1)
        next(batches)
        batches.close() if end == "close" else gc.collect()
    del batch, batches
    gc.collect()
    assert not fake_cupy.SYNCS
    assert not fake_cupy.RACES


@on_stand_in
@pytest.mark.parametrize("mistake", ["used too early", "given back too early"])
def test_the_stand_in_sees_streams_that_do_not_wait(monkeypatch: Any, xp: Any, mistake: str) -> None:
    loader = some_loader(Augment(), files=True)
    fake_cupy.RACES.clear()
    waits = fake_cupy.Stream.null if mistake == "used too early" else loader.feed.uploads
    monkeypatch.setattr(waits, "wait_event", lambda event: None)
    if mistake == "used too early":
        with pytest.raises(RuntimeError, match="used before it has arrived"):
            next(loader.batches(0))
    else:
        next(loader.batches(0))
        gc.collect()
        assert len(fake_cupy.RACES) == 1
    fake_cupy.RACES.clear()


@needs_cupy
def test_what_is_asked_of_cupy_exists() -> None:
    cupy = importlib.import_module("cupy")
    for name in ("Device", "Stream", "get_current_stream", "runtime.memGetInfo", "Stream.record", "Stream.wait_event"):
        where = cupy.cuda
        for part in name.split("."):
            where = getattr(where, part)
    assert hasattr(cupy.ndarray, "set")
    assert hasattr(cupy.get_default_memory_pool(), "free_bytes")


# ---- Where they are ----


@on_stand_in
def test_pictures_stay_on_the_gpu_if_there_is_room(monkeypatch: Any, xp: Any) -> None:
    size = 50 * 5 * 7 * 3
    for free, resident in ((4 * size, True), (4 * size - 1, False)):
        monkeypatch.setattr(fake_cupy.cuda.runtime, "free", free)
        assert isinstance(some_loader(Augment()).feed, Resident) == resident
    assert isinstance(some_loader(Augment()).feed, Uploaded)


@on_stand_in
def test_what_a_feed_says_of_itself(monkeypatch: Any, xp: Any) -> None:
    big = some_dataset(400, 32, 64)  # 2.46 MB
    about = np.full(3, 0.5), np.full(3, 0.25), 0
    by_batch = "pictures: uploaded batch by batch: "
    assert open_feed(big, None, *about).where == "pictures: 2 MB on the GPU"
    assert open_feed(big, Augment(), *about).where == "pictures: 2 MB on the GPU, augmented there"
    for augment in REPAINTED:
        assert open_feed(big, augment, *about).where == by_batch + "resized crops and jitter are made on the host"
    decoded = by_batch + "they are decoded from files as they are asked for"
    assert open_feed(some_dataset(files=True), None, *about).where == decoded
    monkeypatch.setattr(fake_cupy.cuda.runtime, "free", 4_000_000)
    small = "their 2 MB are more than 1 MB, 25% of the GPU's free memory"
    assert open_feed(big, Augment(), *about).where == by_batch + small


def test_the_feed_is_that_of_the_backend_when_it_is_first_needed(xp: Any) -> None:
    before = backend.backend()
    backend.set_backend("numpy")
    loader = some_loader(Augment())
    backend.set_backend(before)
    assert type(loader.feed) is (Feed if xp is np else Resident)
    assert isinstance(next(loader.batches(0)).images, xp.ndarray)


@pytest.mark.parametrize("quiet", [False, True])
def test_train_says_where_the_pictures_are(monkeypatch: Any, tmp_path: Path, capsys: Any, xp: Any, quiet: bool) -> None:
    monkeypatch.setattr(run_module, "create_model", tiny_run.make_model)
    monkeypatch.setattr(run_module, "open_data", tiny_run.make_data)
    run_module.run(tiny_run.options(tmp_path, quiet=quiet, recipe=Recipe(epochs=1, batch_size=8)))
    said = capsys.readouterr().out.splitlines()
    assert said.count("pictures: 0 MB on the GPU, augmented there") == (xp is not np and not quiet)
    assert quiet == (not said)


# ---- Training ----


def trained(files: bool, prefetch: int) -> list[float]:
    loader = some_loader(Augment(), files=files, prefetch=prefetch, drop_last=True)
    model = Net()
    reports = train(model, loader, Recipe(epochs=2), quiet=True)
    tested = evaluate(model, some_loader(None, files=files), quiet=True)
    return [*(report.losses["loss"] for report in reports), tested.loss]


@pytest.mark.parametrize("files", [False, True])
def test_training_has_the_losses_that_it_has_on_the_host(xp: Any, files: bool) -> None:
    """Twelve steps on bits that are the same: what is left is the rounding of the kernels."""
    found = trained(files, 0)
    assert trained(files, 4) == found
    before = backend.backend()
    backend.set_backend("numpy")
    np.testing.assert_allclose(found, trained(False, 0), rtol=1e-5)
    backend.set_backend(before)
