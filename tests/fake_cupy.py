"""A stand-in for CuPy 14 that computes with NumPy and refuses what CuPy refuses, for machines without a GPU.

It is installed as `sys.modules["cupy"]` by the fixture `xp`. Like CuPy, and unlike NumPy,

- no host array meets a device array, and nothing turns into a host array by itself: only `.get()` and `asnumpy`;
- functions, methods and keywords that CuPy lacks raise AttributeError or TypeError;
- results are in C order whatever the operands' strides are (views, `out=` and order="K" functions excepted);
- reading a value on the host waits for the device: `SYNCS` counts where;
- work on one stream says nothing of another: using an upload before its stream has been waited for is refused, and
  memory that goes back to its stream while another may still read it is noted in `RACES`;
- a CUDA graph repeats the calls that were captured, at the addresses that they were given: see fake_graph.py.

Beyond CuPy, `empty` is filled with NaN, so that reading what was never written shows; and `ufunc.at` is refused,
because minigrad promises the same bits in every run. An array here wraps a NumPy array instead of deriving from
it: `np.asarray` and C code would take a subclass for the host array that it is not.

CUDA kernels run too, compiled for the CPU: see cuda_on_cpu.py; so does cuBLAS, which minigrad calls itself: see
cublas_on_cpu.py.

What it cannot show: asynchrony, other rounding on the device, the undefined result of writing through duplicate
indices. Checked against CuPy 14.2 by test_backend.py, where CuPy is installed.
"""

from __future__ import annotations

import collections
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cublas_on_cpu
import cuda_on_cpu
import fake_graph
import numpy as np

from minigrad.kernels.cuda import cublas

__version__ = "14.2.0"  # of CuPy, what it lacks and refuses

# How often the host waited for the device, by "file.py:line" of the code that made it wait.
SYNCS: collections.Counter[str] = collections.Counter()

# What would have been overwritten too early: a sentence for each array.
RACES: list[str] = []
# How often something was started on the device: functions that compute, copies, kernels.
LAUNCHES: collections.Counter[str] = collections.Counter()

# Public names of NumPy 2.4 that CuPy 14.2 does not have; scalar types and modules of no interest here included.
_MISSING = """
    False_ ScalarType True_ asmatrix block bmat busday_count busday_offset busdaycalendar bytes_ char character
    clongdouble complex256 core ctypeslib datetime64 datetime_as_string datetime_data dtypes einsum_path emath errstate
    f2py flexible float128 frompyfunc fromregex geomspace get_include getbufsize geterr geterrcall histogram_bin_edges
    info insert is_busday isnat little_endian longdouble ma matrix matvec memmap nanpercentile nanquantile ndenumerate
    nditer nested_iters object_ polyder polydiv polyint rec recarray record sctypeDict setbufsize seterr seterrcall
    show_runtime spacing str_ strings test timedelta64 typecodes unstack vecdot vecmat void
    """
MISSING_FUNCTIONS = frozenset(_MISSING.split())
MISSING_METHODS = frozenset(["ctypes", "getfield", "resize", "setfield", "setflags", "to_device"])
MODULES = frozenset(["random", "fft", "linalg", "testing", "polynomial", "typing", "exceptions"])  # not stood in for

# Keywords of NumPy that CuPy's functions and methods of the same name do not take.
MISSING_KEYWORDS = {
    **{name: {"where"} for name in ("all", "any", "mean")},
    **{name: {"where", "initial"} for name in ("sum", "prod", "max", "min", "amax", "amin")},
    **{name: {"where", "correction", "mean"} for name in ("var", "std")},
    **{name: {"order", "stable"} for name in ("sort", "argsort")},
    "take": {"mode"},
}
MISSING_IN_UFUNCS = {"where", "order", "subok"}
MISSING_EVERYWHERE = {"device", "like"}

FROM_HOST = {"array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray"}
KEEP_STRIDES = {
    "array",
    "asarray",
    "asanyarray",
    "astype",
    "copy",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
}
WAIT = {"nonzero", "flatnonzero", "argwhere", "unique", "item", "tolist", "tobytes"}


def _wait() -> None:
    """Count one synchronisation for the nearest caller that is neither this file nor backend.py's `to_host`."""
    fake_graph.refuse("the host waits for the device")
    frame = sys._getframe(1)
    while Path(frame.f_code.co_filename).name in ("fake_cupy.py", "backend.py") and frame.f_back:
        frame = frame.f_back
    SYNCS[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1


def _memory(x: Any, *, host_arrays: bool = False) -> Any:
    """The NumPy arrays behind the device arrays of one argument; host arrays are refused unless allowed."""
    if isinstance(x, ndarray):
        return x._memory
    if isinstance(x, np.ndarray) and not host_arrays:
        raise TypeError(f"Unsupported type {type(x)}: a host array meets the device")
    if type(x) in (list, tuple):
        return type(x)(_memory(item, host_arrays=host_arrays) for item in x)
    return x


def _arrays(x: Any) -> Iterator[ndarray]:
    """The device arrays among nested arguments."""
    if isinstance(x, ndarray):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from _arrays(item)


def _on_device(result: Any, sources: list[ndarray], keep_strides: bool = False) -> Any:
    """A NumPy result as a device array: a source itself, a view of one, or fresh memory, in C order as CuPy's."""
    if isinstance(result, (list, tuple)):
        return type(result)([_on_device(item, sources, keep_strides) for item in result])
    if not isinstance(result, (np.ndarray, np.generic)):
        return result
    result = np.asarray(result)
    for source in sources:
        if result is source._memory:
            return source
    for source in sources:
        if np.may_share_memory(result, source._memory):
            return _wrap(result, source._upload, source.device)
    return _fresh(result, keep_strides)


def _fresh(result: np.ndarray, keep_strides: bool) -> ndarray:
    """A result in memory of its own, from the pool that is in use."""
    memory = fake_graph.taken_like(result, keep_strides)
    if memory is None:
        return _wrap(result if keep_strides else np.asarray(result, order="C"))
    memory[...] = result
    return _wrap(memory)


def _wrap(memory: np.ndarray, upload: _Upload | None = None, device: _Device | None = None) -> ndarray:
    array = object.__new__(ndarray)
    array._memory, array._upload, array.device = memory, upload, device or _Device()
    fake_graph.allocated(memory)
    return array


def _call(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a NumPy function or method on device arrays, if CuPy would."""
    missing = MISSING_EVERYWHERE | MISSING_KEYWORDS.get(name, set())
    if isinstance(function, np.ufunc):
        missing = missing | MISSING_IN_UFUNCS
    if refused := missing & kwargs.keys():
        raise TypeError(f"cupy.{name}() got an unexpected keyword argument {refused.pop()!r}")
    out = kwargs.get("out")
    if isinstance(out, tuple):  # NumPy's own ufuncs hand it over like this
        (out,) = out
    if out is not None and name in ("matmul", "dot") and not out.flags.c_contiguous:
        raise ValueError(f"cupy.{name}: out must be C-contiguous")
    if name in WAIT:
        _wait()
    _use(args, list(kwargs.values()))
    LAUNCHES[name] += 1
    given = _memory(args, host_arrays=name in FROM_HOST)
    if name in ("matmul", "dot", "tensordot", "einsum", "inner"):
        fake_graph.refuse(f"cupy.{name} (CuPy's own product)", NotImplementedError)
    if name in ("concatenate", "stack") and len(args[0]) > 8:
        fake_graph.refuse(f"cupy.{name} of more than 8 arrays, which uploads their addresses")
    if name in FROM_HOST and not isinstance(args[0], ndarray):
        fake_graph.refuse("a copy from the host")
        given = (np.array(given[0], copy=True, order="K"), *given[1:])  # device memory is never host memory
    named = {key: _memory(value) for key, value in kwargs.items()}
    if out is not None:
        fake_graph.do(name, function, given, named)
        return out
    with fake_graph.only_to_see(given, named):
        result = function(*given, **named)
    if isinstance(result, bool) and name in ("array_equal", "allclose", "array_equiv"):
        result = np.asarray(result)  # to be waited for in its turn
    sources = list(_arrays((args, list(kwargs.values()))))
    result = _on_device(result, sources, name in KEEP_STRIDES)
    views = [x for x in _arrays(result) if any(np.may_share_memory(x._memory, s._memory) for s in sources)]
    if len(views) < len(list(_arrays(result))) or result is None:  # a view is a name for memory: nothing is done
        fake_graph.record(name, function, given, named, _memory(result))
    if name in FROM_HOST and isinstance(args[0], np.ndarray) and get_current_stream() is not Stream.null:
        result._upload = _Upload(get_current_stream())
    return result


class ndarray:
    """A device array: the memory of a NumPy array that the host cannot reach except by `get`."""

    _memory: np.ndarray
    _upload: _Upload | None = None
    device: _Device  # where it was made
    __hash__ = None  # type: ignore[assignment]
    __module__ = "cupy"

    def __init__(self, shape: Any, dtype: Any = float) -> None:
        self._memory = fake_graph.taken(shape, np.dtype(dtype))
        self._memory[...] = np.nan if self._memory.dtype.kind in "fc" else 77
        self.device = _Device()
        fake_graph.allocated(self._memory)

    # Crossing between host and device

    def get(self, stream: Any = None, order: Any = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        _wait()
        _use(self)
        if out is None:
            return np.array(self._memory, order=order)
        out[...] = self._memory
        return out

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.shape != self.shape or arr.dtype != self.dtype:
            raise ValueError("Shape or dtype mismatch")
        if not (self._memory.flags.c_contiguous or self._memory.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        fake_graph.refuse("a copy from the host")
        _use(self)
        LAUNCHES["set"] += 1
        self._memory[...] = arr

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented if method != "__call__" else _call(ufunc.__name__, ufunc, args, kwargs)

    def __array_function__(self, function: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
        name = function.__name__
        return NotImplemented if name in MISSING_FUNCTIONS else _call(name, function, args, kwargs)

    def __bool__(self) -> bool:
        _wait()
        return bool(self._memory)

    def __int__(self) -> int:
        _wait()
        return int(self._memory)

    def __float__(self) -> float:
        _wait()
        return float(self._memory)

    def __repr__(self) -> str:
        _wait()
        return f"fake_cupy.{self._memory!r}"

    # Indexing: CuPy takes host arrays as indices (and copies them over), but not as values

    def __getitem__(self, index: Any) -> Any:
        index = _memory(index, host_arrays=True)
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, np.ndarray) and part.dtype == bool and part.ndim:
                _wait()  # the shape of the result depends on values
        result = self._memory[index]
        if isinstance(result, np.generic):  # of CuPy a single value is a view too
            result = self._memory[(*(index if isinstance(index, tuple) else (index,)), ...)]
        result = _on_device(result, [self])
        if not np.may_share_memory(result._memory, self._memory):
            fake_graph.record("getitem", lambda memory: memory[index], (self._memory,), {}, result._memory)
        return result

    def __setitem__(self, index: Any, value: Any) -> None:
        LAUNCHES["setitem"] += 1
        _use(self, value)
        index = _memory(index, host_arrays=True)

        def write(memory: np.ndarray, value: Any) -> None:
            memory[index] = value

        fake_graph.do("setitem", write, (self._memory, _memory(value)))

    def __len__(self) -> int:
        return len(self._memory)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    # Everything else is NumPy's, through the checks of `_call`

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in MISSING_METHODS or not hasattr(np.ndarray, name):
            raise AttributeError(f"'cupy.ndarray' object has no attribute {name!r}")
        method = getattr(np.ndarray, name)
        if callable(method):
            return lambda *args, **kwargs: _call(name, method, (self, *args), kwargs)
        return _on_device(getattr(self._memory, name), [self])

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self._memory.ctypes.data)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._memory.shape

    @shape.setter
    def shape(self, shape: tuple[int, ...]) -> None:
        self._memory = self._memory.reshape(shape, copy=False)


UNARY: dict[str, Any] = {"neg": np.negative, "pos": np.positive, "abs": np.absolute, "invert": np.invert}
COMPARISONS: dict[str, Any] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
ARITHMETIC: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "pow": np.power,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _define_operators() -> None:
    def define(operator: str, call: Callable[..., Any]) -> None:
        setattr(ndarray, f"__{operator}__", call)

    for name, ufunc in UNARY.items():
        define(name, lambda a, f=ufunc: _call(f.__name__, f, (a,), {}))
    for name, ufunc in {**COMPARISONS, **ARITHMETIC, "matmul": np.matmul}.items():
        define(name, lambda a, b, f=ufunc: _call(f.__name__, f, (a, b), {}))
    for name, ufunc in {**ARITHMETIC, "matmul": np.matmul}.items():
        define(f"r{name}", lambda a, b, f=ufunc: _call(f.__name__, f, (b, a), {}))
    for name, ufunc in ARITHMETIC.items():  # CuPy has no @=
        define(f"i{name}", lambda a, b, f=ufunc: _call(f.__name__, f, (a, b), {"out": a}))


_define_operators()


# ---- The module's functions ----


def __getattr__(name: str) -> Any:
    """Any other name of NumPy that CuPy has: types and constants as they are, functions through `_call`."""
    if name.startswith("_") or name in MISSING_FUNCTIONS | MODULES or not hasattr(np, name):
        raise AttributeError(f"module 'cupy' has no attribute {name!r}")
    function = getattr(np, name)
    if isinstance(function, type) or not callable(function):
        return function
    return lambda *args, **kwargs: _call(name, function, args, kwargs)


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype)


def empty_like(
    prototype: ndarray, dtype: Any = None, order: Any = "K", subok: Any = None, shape: Any = None
) -> ndarray:
    array = _fresh(np.empty_like(_memory(prototype), dtype, order, shape=shape), True)
    array._memory[...] = np.nan if array._memory.dtype.kind in "fc" else 77
    return array


def asnumpy(a: Any) -> np.ndarray:
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def get_array_module(*args: Any) -> Any:
    return sys.modules[__name__] if any(_arrays(args)) else np


def _as_strided(x: ndarray, shape: Any = None, strides: Any = None) -> ndarray:
    return _wrap(np.lib.stride_tricks.as_strided(x._memory, shape, strides), x._upload)


lib = types.SimpleNamespace(stride_tricks=types.SimpleNamespace(as_strided=_as_strided))


class RawModule:
    """cupy.RawModule: kernels compiled for the CPU, which run on the current stream."""

    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        self.code = code

    def get_function(self, name: str) -> Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]:
        fake_graph.refuse(f"the kernel {name} is loaded")

        def launch(grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
            if any(isinstance(arg, np.ndarray) for arg in args):
                raise TypeError(f"{name}: a host array as an argument")
            _use(args)
            LAUNCHES[name] += 1
            fake_graph.do(name, lambda *args: cuda_on_cpu.run(self.code, name, grid, block, args), _memory(args))

        return launch


# ---- Streams. Nothing here is late; but who has waited for whom is kept, and what would come too early is found. ----

Clock = dict[Any, int]  # how much of the work of each stream is known to be done


class Event:
    """cupy.cuda.Event: a copy of a stream's clock, and when it was made, as all that came before it is done then."""

    clock: Clock
    seconds: float

    def record(self, stream: Stream | None = None) -> None:
        (stream or get_current_stream()).record(self)

    def synchronize(self) -> None:
        _wait()


def get_elapsed_time(start: Event, end: Event) -> float:
    """Milliseconds."""
    return (end.seconds - start.seconds) * 1e3


class Stream:
    """cupy.cuda.Stream. `clock` has what is done, of this stream and of others, before what it is given next."""

    null: Stream

    def __init__(self, *, non_blocking: bool = False) -> None:
        if not non_blocking:
            raise NotImplementedError("a blocking stream, which takes turns with the null stream, is not stood in for")
        self.clock: Clock = {}
        self.ptr = id(self)

    def __enter__(self) -> Stream:
        _streams().append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _streams().pop()

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.clock, event.seconds = dict(self.clock), time.perf_counter()
        return event

    def wait_event(self, event: Event) -> None:
        for stream, moment in event.clock.items():
            self.clock[stream] = max(moment, self.clock.get(stream, 0))

    def synchronize(self) -> None:
        _wait()

    # A capture: what this stream is given in between is recorded.

    def begin_capture(self) -> None:
        if self is Stream.null:
            raise CUDARuntimeError(900)
        fake_graph.begin(self)

    def is_capturing(self) -> bool:
        return fake_graph.capturing(self)

    def end_capture(self) -> Graph:
        return Graph(fake_graph.end(self))


class Graph:
    """cupy.cuda.Graph"""

    def __init__(self, recording: Any) -> None:
        self.recording = recording

    def upload(self) -> None: ...

    def launch(self) -> None:
        _use()
        LAUNCHES["graph"] += 1
        self.recording.replay()


Stream.null = Stream(non_blocking=True)
Stream.null.ptr = 0
_of_thread = threading.local()


def _streams() -> list[Stream]:
    """The current stream of this thread, last, over those that it will go back to."""
    if not hasattr(_of_thread, "streams"):
        _of_thread.streams = [Stream.null]
    return _of_thread.streams


def get_current_stream() -> Stream:
    return _streams()[-1]


class _Upload:
    """Memory that was filled on a stream of its own, where it goes back to when nothing refers to it any more."""

    def __init__(self, home: Stream) -> None:
        self.home, self.uses = home, {home: home.clock[home]}

    def __del__(self) -> None:
        if any(self.home.clock.get(stream, 0) < moment for stream, moment in self.uses.items()):
            RACES.append("an upload was given back to its stream before another stream has read it")


def _use(*args: Any) -> None:
    """Something is done with the device arrays among `args` on the current stream."""
    stream = get_current_stream()
    fake_graph.check_stream(stream)
    stream.clock[stream] = stream.clock.get(stream, 0) + 1
    for upload in {array._upload for array in _arrays(args) if array._upload is not None}:
        if stream.clock.get(upload.home, 0) < upload.uses[upload.home]:
            raise RuntimeError("an upload is used before it has arrived: wait for its stream")
        upload.uses[stream] = stream.clock[stream]


# ---- The device: what minigrad.backend.cupy_status asks. Tests of it overwrite these attributes. ----


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"cudaErrorStandIn{status}: staged by fake_cupy")
        self.status = status


class _Runtime:
    """cupy.cuda.runtime. Versions as CUDA writes them: 13020 is 13.2."""

    CUDARuntimeError = CUDARuntimeError
    driver = 13020
    needed = 13020
    devices = 1
    is_hip = False
    free = 79 * 10**9  # bytes
    current = 0
    error: int | None = None  # the status with which getDeviceCount fails

    def driverGetVersion(self) -> int:
        return self.driver

    def runtimeGetVersion(self) -> int:
        return self.needed

    def getDeviceCount(self) -> int:
        if self.error is not None:
            raise CUDARuntimeError(self.error)
        return self.devices

    def memGetInfo(self) -> tuple[int, int]:
        return self.free, 80 * 10**9

    def getDevice(self) -> int:
        return self.current

    def getDeviceProperties(self, device: int) -> dict[str, Any]:
        return {"name": b"Pretend GPU", "major": 9, "minor": 0}


_runtime = _Runtime()


class _Device:
    """cupy.cuda.Device"""

    def __init__(self, device: int | None = None) -> None:
        self.id = _runtime.current if device is None else device

    def use(self) -> None:
        if not 0 <= self.id < _runtime.devices:
            raise CUDARuntimeError(101)
        _runtime.current = self.id

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def synchronize(self) -> None:
        _wait()


class Memory:
    """cupy.cuda.Memory: so many bytes of the device."""

    def __init__(self, size: int) -> None:
        if size > _runtime.free:
            raise CUDARuntimeError(2)
        self.size, self.bytes = size, np.empty(size, np.uint8)


cuda = types.SimpleNamespace(
    runtime=_runtime,
    Device=_Device,
    Event=Event,
    Stream=Stream,
    get_current_stream=get_current_stream,
    get_elapsed_time=get_elapsed_time,
    Memory=Memory,
    MemoryPointer=lambda memory, offset: memory,
    MemoryPool=fake_graph.MemoryPool,
    using_allocator=fake_graph.using_allocator,
    set_allocator=lambda allocator: None,  # each array is an allocation of NumPy's as it is
)


def _load_cublas(xp: Any, load: Callable[[Any], Any] = cublas.load) -> Any:
    return cublas_on_cpu.library if xp is sys.modules[__name__] else load(xp)


cublas.load = _load_cublas


def get_default_memory_pool() -> Any:
    return types.SimpleNamespace(
        used_bytes=lambda: 0, total_bytes=lambda: 2**20, free_bytes=lambda: 0, free_all_blocks=lambda: None
    )
