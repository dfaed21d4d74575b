"""Threads that share the blocks of a kernel.

A kernel is compiled code that runs without the interpreter's lock, or NumPy calls that release it. Each thread takes
the next block until none is left. The blocks follow from shapes alone, never from the number of threads: results are
bit-identical for any number.
"""

from __future__ import annotations

import atexit
import contextvars
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import TypeVar

from minigrad.errors import BackendError

Item = TypeVar("Item")

_lock = threading.RLock()
_count = 0  # 0: not yet asked for
_helpers: Helpers | None = None  # for so many threads, made when they are first needed
_local = threading.local()


def set_num_threads(n: int) -> None:
    """Use n threads from now on, the calling one included. Changes speed, never a result."""
    global _count, _helpers
    if not isinstance(n, int) or n < 1:
        raise BackendError(f"the number of threads must be an int of at least 1, got {n!r}")
    with _lock:
        old, _count, _helpers = _helpers, n, None
    if old is not None:
        old.stop()


def num_threads() -> int:
    """The number of threads in use: MINIGRAD_NUM_THREADS, or all cores this process may run on."""
    if not _count:
        text = os.environ.get("MINIGRAD_NUM_THREADS", "")
        if text and not (text.isdecimal() and int(text) > 0):
            raise BackendError(f"MINIGRAD_NUM_THREADS must be a whole number of at least 1, got {text!r}")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        set_num_threads(int(text) if text else cores)
    return _count


def each(work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Call work(item) for every item, spread over the threads; returns when all are done.

    The calling thread takes part. Called from inside `work`, it runs the items in place. The first exception is
    raised here, after the items already begun.
    """
    queue = deque(items)

    def drain() -> None:
        try:
            while queue:
                try:
                    item = queue.popleft()  # atomic, in a Python without the interpreter lock too
                except IndexError:
                    return
                work(item)
        except BaseException:
            queue.clear()  # leave nothing to the others
            raise

    together(drain, len(queue))


def together(work: Callable[[], None], most: int) -> None:
    """Call work() on this thread, and at the same time on others, `most` in all; returns when all are done.

    Called from inside `work`, it runs on the calling thread alone, which must therefore do all that the others leave.
    The first exception is raised here.
    """
    helpers = min(num_threads(), most) - 1
    if helpers < 1 or getattr(_local, "is_worker", False):
        work()
        return
    tasks = [Task(work) for _ in range(helpers)]
    _the_helpers().take(tasks)
    try:
        _local.is_worker = True  # this thread works too: what it meets inside runs in place
        work()
    finally:
        _local.is_worker = False
        begun = [task for task in tasks if not task.claim()]
        for task in begun:
            task.done.acquire()
    errors = [task.error for task in begun if task.error is not None]
    if errors:
        try:
            raise errors[0]
        finally:  # what is raised holds the names of this call, and must not be held by them
            del tasks, begun, task, errors


class Task:
    """What a helper is asked to do, in a copy of the asking thread's context, so that np.errstate holds there too."""

    def __init__(self, work: Callable[[], None]):
        self.work, self.context = work, contextvars.copy_context()
        self.ticket = deque(
            [None]
        )  # a helper takes it to run the task; the asking thread takes it to call the task off
        self.error: BaseException | None = None
        self.done = threading.Lock()  # released when the task has been run
        self.done.acquire()

    def claim(self) -> bool:
        """Whether nobody has claimed the task before."""
        try:
            self.ticket.pop()
        except IndexError:
            return False
        return True

    def run(self) -> None:
        """Do it; what it raises is kept for who asked."""
        task, done = self, self.done
        del self  # for the same reason as in `each`
        try:
            task.context.run(task.work)
        except BaseException as error:
            task.error = error
        finally:
            del task
        done.release()


class Helpers:
    """Threads that wait for tasks. A ThreadPoolExecutor takes three times as long to have a task begun and ended, which
    is longer than a small block takes."""

    def __init__(self, count: int):
        self.tasks: SimpleQueue[Task | None] = SimpleQueue()
        self.threads = [threading.Thread(target=self._help, name="minigrad", daemon=True) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def take(self, tasks: list[Task]) -> None:
        """Let whoever is free begin these."""
        for task in tasks:
            self.tasks.put(task)

    def stop(self) -> None:
        """End the threads, when they have done what they were asked to before."""
        for _ in self.threads:
            self.tasks.put(None)
        for thread in self.threads:
            thread.join()

    def _help(self) -> None:
        _local.is_worker = True
        while (task := self.tasks.get()) is not None:
            if task.claim():
                task.run()
            task = None  # it holds arrays


@atexit.register
def _stop_helpers() -> None:
    """Stop the helpers before the interpreter unloads libraries that they may still be using."""
    if _helpers is not None:
        _helpers.stop()


def _the_helpers() -> Helpers:
    global _helpers
    with _lock:
        if _helpers is None:
            _helpers = Helpers(num_threads() - 1)
        return _helpers


def _after_fork_in_child() -> None:
    """A forked child has none of the parent's threads and may have copied a lock that was held."""
    global _lock, _helpers
    _lock, _helpers = threading.RLock(), None
    _local.__dict__.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
