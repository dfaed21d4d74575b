"""Batches: their order, resuming within an epoch, and a thread that prepares them ahead."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest
from test_data import some_dataset
from test_data_augment import EVERYTHING

from inception.data import (
    Augment,
    DataError,
    Loader,
    load_shapes,
    normalise,
)


def some_loader(batch_size: int = 8, **options) -> Loader:
    return Loader(some_dataset(), batch_size, **({"mean": np.full(3, 0.5), "std": np.full(3, 0.25)} | options))


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [
        (8, False, [8] * 6 + [2]),
        (8, True, [8] * 6),
        (10, True, [10] * 5),
        (64, False, [50]),
        (64, True, []),
    ],
)
def test_loader_cuts_an_epoch_into_batches(batch_size, drop_last, sizes):
    loader = some_loader(batch_size, drop_last=drop_last, shuffle=True)
    batches = list(loader.batches(0))
    assert [len(b.images) for b in batches] == sizes
    assert len(loader) == len(sizes)
    seen = [row for b in batches for row in b.rows]
    assert len(set(seen)) == len(seen) == sum(sizes)
    for b in batches:
        assert (b.images.dtype, b.labels.dtype, b.rows.dtype) == (np.float32, np.int64, np.int64)
        assert np.array_equal(b.labels, loader.dataset.labels[b.rows])
        expected = normalise(loader.dataset.images[b.rows], loader.mean, loader.std)
        assert np.array_equal(b.images, expected)


def test_loader_without_shuffle_keeps_the_order():
    assert [row for b in some_loader().batches(5) for row in b.rows] == list(range(50))


def test_loader_order_and_augmentation_are_functions_of_seed_and_epoch():
    options = {"shuffle": True, "augment": Augment(padding=2)}

    def epoch(number: int, seed: int = 0, batch_size: int = 8) -> list[np.ndarray]:
        """Every picture as the network sees it, by its place in the data set."""
        batches = list(some_loader(batch_size, seed=seed, **options).batches(number))
        images, rows = np.concatenate([b.images for b in batches]), np.concatenate([b.rows for b in batches])
        return [rows, images[np.argsort(rows)]]

    for a, b in zip(epoch(3), epoch(3), strict=True):
        assert np.array_equal(a, b)
    for other in (epoch(4), epoch(3, seed=1)):
        for a, b in zip(epoch(3), other, strict=True):
            assert not np.array_equal(a, b)
    # neither the batch's size nor the place in it matters to a picture
    assert np.array_equal(epoch(3)[1], epoch(3, batch_size=13)[1])
    unshuffled = some_loader(50, augment=Augment(padding=2)).batches(3)
    assert np.array_equal(epoch(3)[1], next(unshuffled).images)


@pytest.mark.parametrize("start", [0, 3, 6, 7, 9])
def test_loader_resumes_in_the_middle_of_an_epoch(start):
    loader = some_loader(shuffle=True, augment=Augment())
    whole, rest = list(loader.batches(2))[start:], list(loader.batches(2, start))
    assert len(whole) == len(rest)
    for a, b in zip(whole, rest, strict=True):
        for x, y in zip(a, b, strict=True):
            assert np.array_equal(x, y)


def test_loader_says_which_argument_is_wrong():
    for options, message in (
        ({"batch_size": 0}, "batch size"),
        ({"prefetch": -1}, "prefetch"),
        ({"std": np.array([0.2, 0.0, 0.2])}, "std"),
        ({"std": np.array([0.2, np.nan, 0.2])}, "std"),
        ({"mean": np.zeros(2)}, r"mean and std must be three numbers each, got \[0. 0.\]"),
    ):
        with pytest.raises(DataError, match=f"^some: .*{message}"):
            some_loader(**options)


# ------------------------------------------------------------------------------------------------------ prefetch


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("start", [0, 3, 6, 7])
@pytest.mark.parametrize("prefetch", [1, 4, 100])
def test_prefetch_changes_no_bit(prefetch, start):
    options = {"shuffle": True, "augment": EVERYTHING, "seed": 5}
    here = list(some_loader(**options).batches(2, start))
    ahead = list(some_loader(**options, prefetch=prefetch).batches(2, start))
    assert len(here) == len(ahead) == 7 - start
    for a, b in zip(here, ahead, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not loader_threads()


def test_prefetch_prepares_so_many_ahead_and_no_more(monkeypatch):
    loader, begun = some_loader(prefetch=2), []
    prepare = loader._batch
    monkeypatch.setattr(loader, "_batch", lambda rows, epoch: begun.append(rows[0] // 8) or prepare(rows, epoch))
    batches = loader.batches(0)
    assert not begun
    for i in range(3):
        next(batches)
        deadline = time.monotonic() + 5
        while len(begun) < i + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert begun == list(range(i + 3))
    batches.close()


@pytest.mark.parametrize("end", ["close", "drop", "exhaust", "error here", "throw"])
def test_prefetch_leaves_no_thread_behind(end):
    before = threading.active_count()
    batches = some_loader(prefetch=3).batches(0)
    next(batches)
    assert loader_threads()
    if end == "close":
        batches.close()
    elif end == "drop":
        del batches
        gc.collect()
    elif end == "exhaust":
        assert len(list(batches)) == 6
    elif end == "throw":
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
    else:

        def fails():
            for _ in some_loader(prefetch=3).batches(0):
                raise RuntimeError("of the one who reads")

        batches.close()
        with pytest.raises(RuntimeError):
            fails()
        gc.collect()
    assert not loader_threads()
    assert threading.active_count() == before


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_comes_in_place_of_its_batch(monkeypatch, prefetch):
    loader = some_loader(prefetch=prefetch)
    prepare = loader._batch

    def fails(rows, epoch):
        if rows[0] == 24:
            raise DataError("picture 24 is damaged")
        return prepare(rows, epoch)

    monkeypatch.setattr(loader, "_batch", fails)
    seen: list[int] = []
    with pytest.raises(DataError, match="picture 24"):
        seen.extend(batch.rows[0] for batch in loader.batches(0))
    assert seen == [0, 8, 16]
    assert not loader_threads()


def test_waited_is_what_the_reader_waited(monkeypatch):
    """Seven batches, 0.03 s each to prepare and 0.05 s each to use: prefetched, only the first keeps one waiting."""
    waited = []
    for prefetch in (0, 2):
        loader = some_loader(prefetch=prefetch)
        prepare = loader._batch
        monkeypatch.setattr(loader, "_batch", lambda *arguments, p=prepare: time.sleep(0.03) or p(*arguments))
        for _ in loader.batches(0):
            time.sleep(0.05)
        waited.append(loader.waited)
        next(loader.batches(1, start=6))
        assert loader.waited < waited[0] / 2  # of this epoch alone
    assert waited[0] > 7 * 0.03
    assert 0.03 < waited[1] < waited[0] / 2


def test_an_epoch_does_not_start_before_its_beginning():
    with pytest.raises(DataError, match="not at -1"):
        next(some_loader().batches(0, -1))


def test_loader_of_both_parts_of_a_data_set():
    """What load_shapes and open_data return is a pair."""
    with pytest.raises(DataError, match=r"a Loader wants a Dataset, got tuple: open_data returns \(train, test\)"):
        Loader(load_shapes(4, 4), 2, mean=np.zeros(3), std=np.ones(3))
