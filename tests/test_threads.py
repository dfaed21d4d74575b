"""Threads: any number gives the same bits, errors arrive, and a fork survives."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from inception.models import create_model
from minigrad import Tensor, num_threads, ops, set_num_threads, threads
from minigrad.errors import BackendError
from minigrad.random import Key, integers, normal
from minigrad.threads import each


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = num_threads()
    yield
    set_num_threads(before)


# ---- How many ----


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None])
def test_a_number_of_threads_is_a_positive_int(n: Any) -> None:
    with pytest.raises(BackendError, match="must be an int of at least 1, got"):
        set_num_threads(n)


@pytest.mark.parametrize(("text", "n"), [("3", 3), ("1", 1)])
def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch, text: str, n: int) -> None:
    monkeypatch.setattr(threads, "_count", 0)
    monkeypatch.setenv("MINIGRAD_NUM_THREADS", text)
    assert num_threads() == n


@pytest.mark.parametrize("text", [None, ""])
def test_without_it_all_cores_are_used(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    """Those that this process may run on, which in a container are fewer than the machine has."""
    monkeypatch.setattr(threads, "_count", 0)
    monkeypatch.delenv("MINIGRAD_NUM_THREADS", raising=False)
    if text is not None:
        monkeypatch.setenv("MINIGRAD_NUM_THREADS", text)
    assert num_threads() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "²"])
def test_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(threads, "_count", 0)
    monkeypatch.setenv("MINIGRAD_NUM_THREADS", text)
    with pytest.raises(BackendError, match=f"MINIGRAD_NUM_THREADS must be a whole number of at least 1, got '{text}'"):
        num_threads()


def test_the_number_can_change_between_calls() -> None:
    for n in (1, 4, 2):
        set_num_threads(n)
        assert num_threads() == n
        done: list[int] = []
        each(done.append, range(20))
        assert sorted(done) == list(range(20))


# ---- each ----


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("items", [0, 1, 2, 100])
def test_every_item_is_done_once(n: int, items: int) -> None:
    set_num_threads(n)
    done: list[int] = []
    each(done.append, iter(range(items)))
    assert sorted(done) == list(range(items))


def test_the_calling_thread_works_too() -> None:
    """With two threads, two items that wait for each other; one helper alone would wait for ever."""
    set_num_threads(2)
    meeting = threading.Barrier(2, timeout=10)
    workers: set[int] = set()

    def work(_: int) -> None:
        meeting.wait()
        workers.add(threading.get_ident())

    each(work, range(2))
    assert threading.get_ident() in workers
    assert len(workers) == 2


@pytest.mark.parametrize("culprit", ["caller", "helper"])
def test_an_exception_arrives_and_the_pool_survives(culprit: str) -> None:
    """Swallowed in a worker, it would leave a block of the result uninitialised."""
    set_num_threads(2)
    meeting, main = threading.Barrier(2, timeout=10), threading.get_ident()

    def work(_: int) -> None:
        meeting.wait()
        if (threading.get_ident() == main) == (culprit == "caller"):
            raise KeyError(culprit)

    with pytest.raises(KeyError, match=culprit):
        each(work, range(2))
    done: list[int] = []
    each(done.append, range(10))
    assert sorted(done) == list(range(10))


@pytest.mark.parametrize("culprit", ["caller", "helper"])
def test_after_an_exception_no_further_item_is_begun(culprit: str) -> None:
    """The user would wait for the rest of a step that has failed."""
    set_num_threads(2)
    meeting, main = threading.Barrier(2, timeout=10), threading.get_ident()
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item < 2:
            meeting.wait()
            if (threading.get_ident() == main) == (culprit == "caller"):
                raise KeyError(culprit)
        time.sleep(0.001)

    with pytest.raises(KeyError):
        each(work, range(500))
    assert len(begun) < 250


@pytest.mark.parametrize("culprits", [("caller",), ("helper",), ("caller", "helper")], ids="+".join)
def test_what_failed_keeps_nothing_alive(culprits: tuple[str, ...]) -> None:
    """What is raised holds the frames that it came through; their names must not hold it."""
    set_num_threads(2)
    main, meeting = threading.get_ident(), threading.Barrier(2, timeout=10)

    def fails() -> weakref.ref[Any]:
        array = np.zeros(3)

        def work(_: int) -> None:
            meeting.wait()
            if ("caller" if threading.get_ident() == main else "helper") in culprits:
                raise ValueError(array.sum())

        with pytest.raises(ValueError, match="0"):
            each(work, range(2))
        return weakref.ref(array)

    gc.collect()
    gc.disable()
    try:
        kept = fails()
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            gc.collect()  # without the interpreter's lock it alone frees functions
        assert kept() is None
    finally:
        gc.enable()


INTERRUPTED = """
    import signal, threading, time
    from minigrad import set_num_threads
    from minigrad.threads import each

    begun, interrupted, main = threading.Event(), threading.Event(), threading.main_thread()

    def interrupt(*_):
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    def work(_):
        if threading.current_thread() is main:
            begun.wait(30)
            return
        begun.set()
        while not interrupted.wait(0.3):  # by then it waits for this thread
            signal.pthread_kill(main.ident, signal.SIGINT)
        time.sleep(0.5)
        print("done", flush=True)

    signal.signal(signal.SIGINT, interrupt)
    set_num_threads(2)
    try:
        each(work, range(2))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_a_process_does_not_end_under_its_helpers() -> None:
    """Who is interrupted while waiting does not wait on; the end of the process does."""
    code = [sys.executable, "-c", textwrap.dedent(INTERRUPTED)]
    done = subprocess.run(code, timeout=60, capture_output=True, text=True, check=False)
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["done", "interrupted"]), done.stderr


def test_a_nested_call_runs_in_place() -> None:
    """On the calling thread as well as on a helper: workers that wait for work of their own pool can deadlock."""
    set_num_threads(3)  # so that one helper is free to take what it should not
    meeting = threading.Barrier(2, timeout=10)
    elsewhere: list[bool] = []

    def work(_: int) -> None:
        meeting.wait()
        me = threading.get_ident()

        def inner(_: int) -> None:
            time.sleep(0.002)
            elsewhere.append(threading.get_ident() != me)

        each(inner, range(5))
        meeting.wait()

    each(work, range(2))
    assert elsewhere == [False] * 10


def test_after_nesting_work_is_shared_again() -> None:
    set_num_threads(2)
    each(lambda _: each(lambda _: None, range(3)), range(3))
    test_the_calling_thread_works_too()


def test_two_user_threads_at_once() -> None:
    """A validation beside a training run: no deadlock, no item lost, each error to its own caller."""
    set_num_threads(3)
    results: dict[str, list[Any]] = {"one": [], "two": []}

    def user(name: str) -> None:
        for i in range(50):
            done: list[int] = []
            each(done.append, range(20))
            results[name].append(sorted(done) == list(range(20)))
            try:
                each(lambda item, name=name: [][item] if item == 7 else None, range(20))
            except IndexError:
                results[name].append(True)
            if i % 10 == 0:
                x = Tensor(normal(Key(i), (4, 3, 8, 8)), requires_grad=True)
                ops.max_pool2d(x, 2).sum().backward()

    users = [threading.Thread(target=user, args=(name,)) for name in results]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join(30)
    assert results == {"one": [True] * 100, "two": [True] * 100}


def test_np_errstate_holds_in_the_workers() -> None:
    """NumPy keeps it per context: without the caller's, a helper would warn where the caller asked to raise."""
    set_num_threads(2)
    meeting = threading.Barrier(2, timeout=10)
    raised: list[bool] = []

    def work(_: int) -> None:
        meeting.wait()
        try:
            np.ones(1) / np.zeros(1)
            raised.append(False)
        except FloatingPointError:
            raised.append(True)

    with np.errstate(divide="raise"):
        each(work, range(2))
    assert raised == [True, True]


# ---- The same bits ----


def gradients(n: int) -> dict[str, bytes]:
    """One training step of the small GoogLeNet with n threads: the loss, every gradient, every buffer."""
    set_num_threads(n)
    model = create_model("googlenet_small", aux_logits=True, dropout=0.3)
    model.set_key(Key(1))
    x, labels = Tensor(normal(Key(2), (8, 3, 32, 32)).astype("float32")), integers(Key(3), 10, 8)
    aux1, aux2, logits = model(x)
    loss = ops.cross_entropy(logits, labels) + ops.cross_entropy(aux1, labels) * 0.3
    loss = loss + ops.cross_entropy(aux2, labels) * 0.3
    loss.backward()
    found = {name: parameter.grad.tobytes() for name, parameter in model.named_parameters()}
    return {"loss": loss.data.tobytes(), **found, **{name: b.data.tobytes() for name, b in model.named_buffers()}}


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """A run on another machine, or beside another job, must be the same run."""
    one = gradients(1)
    for n in (2, 5):
        other = gradients(n)
        assert [name for name in one if one[name] != other[name]] == []


# ---- Fork ----

FORK = """
    import os, sys, threading
    import numpy as np
    from minigrad import Tensor, ops, set_num_threads
    from minigrad.threads import each

    def meet():
        meeting = threading.Barrier(3, timeout=10)
        each(lambda item: meeting.wait(), range(3))

    set_num_threads(3)
    meet()  # the pool is full
    child = os.fork()
    if not child:
        meet()  # in a pool of its own
        x = Tensor(np.ones((4, 3, 8, 8)), requires_grad=True)
        ops.max_pool2d(x, 2).sum().backward()
        os._exit(7)
    meet()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_works() -> None:
    """It has none of the parent's threads, and waiting for them would take for ever."""
    code = [sys.executable, "-c", textwrap.dedent(FORK)]
    done = subprocess.run(code, timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
