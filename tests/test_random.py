"""Counter-based random numbers: reproducible by name, and statistically what they claim to be.

The keys are fixed, so nothing here fails by chance: each bound is five standard deviations of a true random source.
"""

from __future__ import annotations

import itertools
import math
import threading
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from minigrad.backend import to_host
from minigrad.errors import DtypeError
from minigrad.random import Key, StoredKey, bits, integers, next_key, normal, permutation, seeded, uniform

DRAWS = [
    lambda key, shape, **how: bits(key, shape, **how),
    lambda key, shape, **how: uniform(key, shape, **how),
    lambda key, shape, **how: integers(key, 1000, shape, **how),
    lambda key, shape, **how: normal(key, shape, **how),
]
NAMES = ["bits", "uniform", "integers", "normal"]
N = 100_000


# ---- Keys ----


def test_equal_names_are_equal_streams() -> None:
    assert Key(3).fold("dropout", 7) == Key(3).fold("dropout", 7)
    assert hash(Key(3).fold("dropout", 7)) == hash(Key(3).fold("dropout", 7))
    assert Key(3).fold("dropout").fold(7) == Key(3).fold("dropout", 7)
    assert Key(3) != 3


def test_different_names_are_different_streams() -> None:
    """Order, type, and where one string ends and the next begins all count."""
    root = Key(0)
    names: list[tuple[int | str, ...]] = [
        (), (0,), (1,), (-1,), (2**63,), (0, 0), (1, 2), (2, 1), ("",), ("", ""), ("a",), ("1",), (1, 1), ("a", 1),
        (1, "a"), ("ab", "c"), ("a", "bc"), ("abc",), ("a", "b"), ("b", "a"), ("longer than a word",),
        ("longer than a wore",), ("a\0",), ("\0a",), ("\0",), ("a" * 8,), ("a" * 9,), ("a" * 16,), (1, ord("a")),
    ]  # fmt: skip
    keys = [root.fold(*name) for name in names]
    keys += [Key(1), Key(-1), Key(2**32), Key(1).fold(0), Key(1).fold("a")]
    assert len(set(keys)) == len(keys)


def test_folding_leaves_the_key_alone() -> None:
    key = Key(5)
    before = key.value
    key.fold("x", 1)
    assert key.value == before


# ---- Reproducibility ----


@pytest.mark.parametrize("draw", DRAWS, ids=NAMES)
def test_same_key_same_numbers(draw: Any) -> None:
    np.testing.assert_array_equal(draw(Key(1), (5, 7)), draw(Key(1), (5, 7)))
    assert (draw(Key(1), (5, 7)) != draw(Key(2), (5, 7))).mean() > 0.9


def test_these_very_numbers() -> None:
    """Pinned: a change here breaks every resumed run and every stated result."""
    assert Key(0).value == 0xE220A8397B1DCDAF  # SplitMix64's first output for the seed 0, from its published code
    assert bits(Key(0), 2).tolist() == [12035550249420947055, 12935080325729570654]
    assert Key(0).fold("dropout", 3).value == 0x444E9B443FADE39F
    assert permutation(Key(0), 8).tolist() == [5, 7, 2, 0, 3, 1, 6, 4]


@pytest.mark.parametrize("draw", DRAWS, ids=NAMES)
def test_number_i_does_not_depend_on_how_many_are_drawn(draw: Any) -> None:
    np.testing.assert_array_equal(draw(Key(1), 10), draw(Key(1), 1000)[:10])
    np.testing.assert_array_equal(draw(Key(1), (4, 5)).ravel(), draw(Key(1), 20))


@pytest.mark.parametrize("draw", DRAWS, ids=NAMES)
def test_a_row_depends_on_its_identity_alone(draw: Any) -> None:
    whole = draw(Key(1), (100, 3, 4), rows=np.arange(100))
    batch = np.array([42, 7, 99, 0, 7])
    np.testing.assert_array_equal(draw(Key(1), (5, 3, 4), rows=batch), whole[batch])
    assert len(np.unique(whole[:, 0, 0])) > 90


@pytest.mark.parametrize("draw", DRAWS, ids=NAMES)
def test_every_backend_draws_the_same(draw: Any, xp: Any) -> None:
    """Bit for bit, except where the device computes logarithm and cosine itself."""
    for how in ({}, {"rows": np.array([5, 3, 4])}):
        here, there = draw(Key(1), (3, 50), **how), to_host(draw(Key(1), (3, 50), xp=xp, **how))
        np.testing.assert_allclose(there, here, rtol=1e-12 if draw is DRAWS[-1] else 0, atol=1e-13)


@pytest.mark.parametrize("draw", DRAWS, ids=NAMES)
def test_shapes_and_dtypes(draw: Any) -> None:
    dtype = {"bits": np.uint64, "integers": np.int64}.get(NAMES[DRAWS.index(draw)], np.float64)
    for shape in ((), (0,), (3,), (2, 3, 4), (4, 0)):
        assert draw(Key(0), shape).shape == shape
        assert draw(Key(0), shape).dtype == dtype
    assert draw(Key(0), 6).shape == (6,)
    assert draw(Key(0), (3,), rows=np.arange(3)).shape == (3,)


# ---- Distribution ----


def five_sigma(statistic: float, mean: float, variance: float) -> bool:
    return abs(statistic - mean) < 5 * math.sqrt(variance)


def chi_square(values: np.ndarray, cells: int) -> float:
    """Σ (seen − expected)² / expected over equal cells of [0, 1): mean cells − 1, variance 2 (cells − 1)."""
    seen = np.bincount((values * cells).astype(int), minlength=cells)
    wanted = len(values) / cells
    return float(((seen - wanted) ** 2 / wanted).sum())


STREAMS = {
    "one stream": lambda draw: draw(Key(0), N),
    "neighbouring seeds": lambda draw: np.array([draw(Key(seed), 1)[0] for seed in range(5000)]),
    "neighbouring steps": lambda draw: np.array([draw(Key(0).fold("step", s), 1)[0] for s in range(5000)]),
    "first of each row": lambda draw: draw(Key(0), (N, 1), rows=np.arange(N))[:, 0],
    "rows side by side": lambda draw: draw(Key(0), (100, N // 100), rows=np.arange(100)).ravel(),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_uniform_fills_the_interval_evenly(stream: str) -> None:
    values = STREAMS[stream](uniform)
    assert values.min() >= 0
    assert values.max() < 1
    assert five_sigma(chi_square(values, 128), 127, 2 * 127)
    tail = values * 128 % 1  # seven bits further down
    assert five_sigma(chi_square(tail, 128), 127, 2 * 127)


def test_every_bit_is_fair() -> None:
    words = bits(Key(4), N)
    for position in range(64):
        ones = int(((words >> np.uint64(position)) & np.uint64(1)).sum())
        assert five_sigma(ones, N / 2, N / 4), position


def test_one_changed_bit_of_the_key_changes_half_of_the_numbers_bits() -> None:
    base = bits(Key(0).fold(0), 1)[0]
    flips = [int(bits(Key(0).fold(1 << i), 1)[0] ^ base).bit_count() for i in range(63)]
    assert five_sigma(float(np.mean(flips)), 32, 16 / 63)


@pytest.mark.parametrize("stream", STREAMS)
def test_neighbours_are_uncorrelated(stream: str) -> None:
    values = STREAMS[stream](uniform) - 0.5
    for lag in (1, 2, 3, 100, 1000):
        pairs = values[:-lag] * values[lag:]  # mean 0, variance (1/12)²
        assert five_sigma(float(pairs.mean()), 0, (1 / 12) ** 2 / len(pairs)), lag


@pytest.mark.parametrize(
    "pair",
    [
        (Key(0), Key(1)),
        (Key(0).fold(0), Key(0).fold(1)),
        (Key(0).fold("a"), Key(0).fold("b")),
        (Key(0), Key(0).fold(0)),
    ],
    ids=["seeds", "numbers", "strings", "parent and child"],
)
def test_streams_are_uncorrelated_with_each_other(pair: tuple[Key, Key]) -> None:
    a, b = (uniform(key, N) - 0.5 for key in pair)
    for lag in (0, 1, 2):  # one stream must not be the other one shifted, either
        products = a[lag:] * b[: N - lag]
        assert five_sigma(float(products.mean()), 0, (1 / 12) ** 2 / len(products))
    assert not set(bits(pair[0], 1000).tolist()) & set(bits(pair[1], 1000).tolist())


def test_rows_are_not_the_streams_of_folded_keys() -> None:
    """Row r of a key and the child key.fold(r) are two different things: an epoch must not repeat a picture's noise."""
    for r in range(3):
        row = bits(Key(0), (1, 100), rows=np.array([r]))
        for child in range(3):
            assert not set(row.ravel().tolist()) & set(bits(Key(0).fold(child), 100).tolist()), (r, child)


def test_rows_are_uncorrelated_with_each_other() -> None:
    rows = uniform(Key(0), (200, 500), rows=np.arange(200)) - 0.5
    correlation = np.corrcoef(rows) - np.eye(200)
    assert np.abs(correlation).max() < 6 / math.sqrt(500)  # 20,000 pairs: five would be met by chance now and then
    assert len(np.unique(bits(Key(0), (200, 500), rows=np.arange(200)))) == 100_000


@pytest.mark.parametrize("stream", STREAMS)
def test_normal_moments(stream: str) -> None:
    z = STREAMS[stream](normal)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # of z^power
        assert five_sigma(float((z**power).mean()), mean, variance / len(z)), power
    within = float((np.abs(z) < 1).mean())
    assert five_sigma(within, 0.682689, 0.682689 * 0.317311 / len(z))
    assert np.isfinite(z).all()


@pytest.mark.parametrize("high", [1, 2, 3, 10, 1000])
def test_integers_are_even(high: int) -> None:
    values = integers(Key(0), high, N)
    assert values.min() >= 0
    assert values.max() < high
    if high > 1:
        assert five_sigma(chi_square((values + 0.5) / high, high), high - 1, 2 * (high - 1))


# ---- Permutations and layer keys ----


@pytest.mark.parametrize("n", [0, 1, 2, 10, 1000])
def test_permutation_is_a_permutation(n: int) -> None:
    order = permutation(Key(1), n)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(order, permutation(Key(1), n))


def test_all_permutations_are_equally_likely() -> None:
    seen = dict.fromkeys(itertools.permutations(range(4)), 0)
    for epoch in range(2400):
        seen[tuple(permutation(Key(0).fold(epoch), 4).tolist())] += 1
    assert five_sigma(sum((s - 100) ** 2 / 100 for s in seen.values()), 23, 46)


def test_seeded_reproduces_next_key() -> None:
    with seeded(7):
        first = [next_key() for _ in range(5)]
    with seeded(7):
        assert [next_key() for _ in range(5)] == first
    with seeded(8):
        assert next_key() not in first
    assert len(set(first)) == 5


def test_seeded_leaves_the_outer_stream_where_it_was() -> None:
    with seeded(7):
        plain = [next_key() for _ in range(4)]
    with seeded(7):
        before = [next_key() for _ in range(2)]
        with suppress(RuntimeError), seeded(9):
            next_key()
            raise RuntimeError
        assert before + [next_key() for _ in range(2)] == plain


def test_threads_that_build_at_the_same_time_get_the_streams_of_their_seed() -> None:
    """As the keys say themselves: number n of a seed is Key(seed).fold(n), whatever another thread has taken since."""
    found: dict[int, list[Key]] = {}
    meet = threading.Barrier(4)

    def build(seed: int) -> None:
        with seeded(seed):
            found[seed] = []
            for _ in range(3):
                meet.wait()  # all threads are inside their blocks, and take turns
                found[seed].append(next_key())

    threads = [threading.Thread(target=build, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: [Key(seed).fold(n) for n in range(3)] for seed in range(4)}


def test_threads_without_a_seed_share_one_stream_and_no_number_comes_twice() -> None:
    taken: list[Key] = []
    threads = [threading.Thread(target=lambda: taken.extend(next_key() for _ in range(500))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 4000


def test_kinds_of_streams_are_counted_by_themselves() -> None:
    with seeded(7):
        assert [next_key(), next_key("dropout"), next_key("dropout"), next_key()] == [
            Key(7).fold(0), Key(7).fold("dropout", 0), Key(7).fold("dropout", 1), Key(7).fold(1)
        ]  # fmt: skip


@pytest.mark.parametrize("seed", [1.5, None, "1"])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(DtypeError, match=f"a seed is a whole number, got {seed!r}"):
        Key(seed)
    assert Key(np.int64(3)) == Key(3)


def test_a_stored_key_is_read_when_numbers_are_drawn(xp: Any) -> None:
    """The same numbers as of the key itself, and others once its memory has been written anew."""
    memory = xp.zeros(3, "uint64")
    stored, keys, rows = StoredKey(memory[1, ...]), [Key(3).fold("a"), Key(2**62 + 5)], np.array([5, 1, 2**40])
    for key in keys:
        memory[1] = xp.asarray(np.uint64(key.value))
        for options in ({}, {"rows": rows}):
            there = bits(stored, (3, 50), xp=xp, **options)
            np.testing.assert_array_equal(to_host(there), bits(key, (3, 50), **options))
    assert len({stored, StoredKey(memory[2, ...])}) == 2
    assert repr(stored) == "StoredKey()"
    with pytest.raises(DtypeError, match="cannot be folded by"):
        stored.fold("x")
