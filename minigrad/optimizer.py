"""What all optimizers share: groups of parameters, the arenas in which these lie, the step, and the state.

An optimizer moves its parameters into one array for each dtype, an arena (minigrad.arena), groups and equal shapes side
by side: each `parameter.data` is a view of it from then on. A step copies the gradients into a second array like it
and applies the optimizer's formula to both: on the host to blocks that fit the cache, spread over the threads, on a GPU
to the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Real
from types import SimpleNamespace
from typing import Any

import numpy as np

from minigrad.arena import Arena, Block, Values, arenas, clip, spread
from minigrad.backend import array_module, capturing, move
from minigrad.errors import MinigradError, StateError, differences, no_such
from minigrad.layout import Array
from minigrad.tensor import Tensor

Parameter = Any  # an object with .data, an array, and .grad, an array of the same shape and dtype or None
Params = Iterable[Any]  # of parameters, or of groups: {"params": [...], "weight_decay": 0.0, "lr_scale": 2.0}
Options = dict[str, Any]  # an optimizer's keyword arguments
State = dict[str, Array]  # what it remembers, by name


@dataclass
class Slot:
    """One parameter, the options of its group, and what the optimizer remembers about it."""

    param: Parameter
    group: int
    lr_scale: float  # this group's learning rate over the step's
    options: Options  # the optimizer's, as this group overrides them
    updates: int = 0  # how often it has been updated
    state: State = field(default_factory=dict)  # arrays of the parameter's shape, dtype and memory layout


class Bank:
    """An arena of parameters, and what their optimizer has beside it in the same layout."""

    def __init__(self, arena: Arena, slots: list[Slot]):
        self.arena, self.slots = arena, slots
        self.gradients = arena.zeros()
        self.given: list[Array | None] | None = None  # those of a step that are not yet in `gradients`
        names = dict.fromkeys(name for slot in slots for name in slot.state)
        self.state: dict[str, Values] = {name: arena.zeros() for name in names}
        self.numbers: Array = None  # on a GPU: those of each run, a row each; made by the first step

    def gather(self) -> None:
        """Bring all gradients of the step to where they belong."""
        if self.given is not None:
            self.arena.gather(self.given, self.gradients)
            self.given = None

    def runs(self) -> list[Run]:
        """What a step is to update."""
        runs, first = [], 0
        alike = groupby(self.slots, key=lambda slot: (slot.param.grad is not None, slot.group, slot.updates))
        for (due, *_), slots in alike:
            last = first + len(list(slots))
            if due:
                runs.append(Run(self, first, last))
            first = last
        return runs


@dataclass
class Run:
    """Neighbours first … last − 1 in a bank that are updated alike: in one group, and equally often so far."""

    bank: Bank
    first: int
    last: int
    numbers: Any = None  # of the step: floats; on a GPU arrays () of the parameters' dtype

    @property
    def slots(self) -> list[Slot]:
        return self.bank.slots[self.first : self.last]


class Optimizer:
    """The base of all optimizers.

    params   parameters, or groups of them: {"params": [...], "weight_decay": 0.0, "lr_scale": 2.0}. A group
             overrides the optimizer's keyword arguments; its learning rate is lr_scale times the step's.
    lr       the learning rate of a step that is not given one
    Raises   MinigradError for an option that is unknown or negative, no parameters, one that comes twice, or two that
             share their memory; BackendError for parameters on two backends.

    Build it after the model is where it shall train: parameters and state stay on that backend. An array that is set
    as a parameter's .data later is copied into the arena by the next step. Several optimizers over one parameter
    therefore work, at the price of a copy in each step.
    """

    def __init__(self, params: Params, lr: float, **options: Any):
        if not isinstance(params, Iterable):
            raise self._no_parameters(params)
        entries = list(params)
        groups = entries if entries and isinstance(entries[0], Mapping) else [{"params": entries}]
        _refuse_negative({"lr": lr})
        self.lr = lr
        self.slots: list[Slot] = []  # in the order given
        for number, group in enumerate(groups):
            known = {"params", "lr_scale", *options}
            for name in group:
                if name not in known:
                    raise MinigradError(f"group {number}: {no_such('option', name, sorted(known))}")
            if "params" not in group:
                raise MinigradError(f"group {number} has no 'params': a group is {{'params': [...], ...}}")
            own = options | {name: value for name, value in group.items() if name in options}
            scale = group.get("lr_scale", 1.0)
            _refuse_negative(own | {"lr_scale": scale})
            names = self._state_names(own)
            if hasattr(group["params"], "grad"):
                raise MinigradError(f"group {number}: 'params' must be a list of parameters, got a single one")
            for p in group["params"]:
                if not hasattr(p, "grad"):
                    raise self._no_parameters(p)
                self.slots.append(Slot(p, number, scale, own, state=dict.fromkeys(names)))
        if not self.slots:
            raise MinigradError(f"{type(self).__name__} got no parameters: was a generator used up before?")
        if len({id(slot.param) for slot in self.slots}) < len(self.slots):
            raise MinigradError("a parameter was given twice, in one group or in two: it would be updated twice")
        self._settle()

    def _no_parameters(self, given: Any) -> MinigradError:
        name = type(self).__name__
        return MinigradError(f"{name} wants parameters, as model.parameters() gives them, got {type(given).__name__}")

    def _settle(self) -> None:
        """Move the parameters, and the state that they have, into arenas."""
        ordered = sorted(self.slots, key=lambda slot: (slot.group, slot.param.data.shape))
        slot_of = {id(slot.param): slot for slot in ordered}
        self.runs: list[Run] = []  # of the last step
        self.banks = [Bank(x, [slot_of[id(p)] for p in x.tensors]) for x in arenas(slot.param for slot in ordered)]
        for bank in self.banks:
            for i, slot in enumerate(bank.slots):
                for name, before in slot.state.items():
                    slot.state[name] = bank.state[name].views[i]
                    if before is not None:
                        slot.state[name][...] = before

    def __getstate__(self) -> dict[str, Any]:
        # What deepcopy and pickle take along. Copied together with its model, the optimizer is that of the copy.
        return {name: value for name, value in vars(self).items() if name not in ("banks", "runs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._settle()

    def __copy__(self) -> Optimizer:
        raise MinigradError("two optimizers cannot share their state: copy.deepcopy((model, optimizer)) copies both")

    @property
    def arenas(self) -> list[Arena]:
        """The arenas in which the parameters lie, one for each dtype."""
        return [bank.arena for bank in self.banks]

    # ---- What an optimizer defines ----

    def _state_names(self, options: Options) -> tuple[str, ...]:
        """Name the arrays to keep for each parameter of a group; refuse options that do not go together."""
        raise NotImplementedError

    def _numbers(self, *lr_and_t: Any, **options: Any) -> dict[str, float]:
        """The numbers in the formula, for a learning rate, the t-th update, from 1, and these options."""
        raise NotImplementedError

    def _update(self, p: Array, g: Array, state: State, n: Any, options: Options) -> None:
        """The formula: update p and its state in place, element by element. g is a copy and may be overwritten.

        n        `_numbers` as attributes: floats, on a GPU arrays (), whose values change from step to step
        options  of the group, for whatever stays the same in all steps
        """
        raise NotImplementedError

    # ---- A step ----

    def step(self, lr: float | None = None, momentum: float | None = None, max_norm: float | None = None) -> None:
        """Update every parameter that has a gradient; gradients are left untouched.

        lr         the learning rate of this step, instead of the optimizer's
        momentum   the momentum of this step (for AdamW β₁), in all groups, instead of theirs
        max_norm   clip the gradients to this joint norm, as by `clip_by_norm`; None: do not

        Raises MinigradError for one that is negative or NaN, and for a momentum where the optimizer was built without.
        """
        for bank in self.banks:
            bank.arena.refresh(type(self).__name__)
        self.runs = [run for bank in self.banks for run in bank.runs()]
        for bank in self.banks:
            bank.given = [slot.param.grad for slot in bank.slots]
            bank.arena.check(bank.given)
            if max_norm is not None or bank.arena.xp is not np:  # else every block is gathered just before its update
                bank.gather()
        if max_norm is not None:
            clip([run.bank.gradients.flat[block.values] for run, block in self._blocks()], max_norm)
        self.tell(lr, momentum)
        self._apply()

    def tell(self, lr: float | None = None, momentum: float | None = None) -> None:
        """Count an update of the parameters of `runs`, and say its numbers.

        It is all that the host does for a step that a CUDA graph repeats: see `finish_capture`.
        """
        lr = float(self.lr if lr is None else lr)  # Python numbers, so that float32 stays float32
        _refuse_negative({"lr": lr} if momentum is None else {"lr": lr, "momentum": float(momentum)})
        found = []
        for run in self.runs:
            slot = run.slots[0]
            found.append(self._numbers(lr * slot.lr_scale, slot.updates + 1, **self._options(slot, momentum)))
        for run, numbers in zip(self.runs, found, strict=True):
            run.numbers = SimpleNamespace(**numbers)
            for slot in run.slots:
                slot.updates += 1
                if isinstance(slot.param, Tensor):
                    slot.param.changed(f"{type(self).__name__}.step()")
        for bank in self.banks:
            if bank.arena.xp is not np:
                _bring_numbers(bank, [run for run in self.runs if run.bank is bank])

    def finish_capture(self) -> tuple[list[Run], Any]:
        """Complete the CUDA graph in which `step` has just been captured.

        returns  `runs`, to be set before `tell` and a replay; and memory that must live as long as the graph
        """
        return self.runs, [bank.arena.finish_capture() for bank in self.banks]

    def _apply(self) -> None:
        """Update the runs by the gradients in their banks."""
        self._over_blocks(self._update)

    def _over_blocks(self, formula: Any) -> None:
        """Call a function with the arguments of `_update` on all blocks."""

        def work(item: tuple[Run, Block]) -> None:
            run, block = item
            bank, slot, own = run.bank, run.slots[0], block.values
            if bank.given is not None:
                bank.arena.gather_block(bank.given, bank.gradients, block)
            state = {name: bank.state[name].flat[own] for name in slot.state}
            formula(bank.arena.data[own], bank.gradients.flat[own], state, run.numbers, slot.options)

        with np.errstate(invalid="ignore"):  # 0 / 0 between two parameters, where eps is 0
            spread(self.banks[0].arena.xp, work, self._blocks())
        for bank in self.banks:
            bank.given = None

    def _blocks(self) -> list[tuple[Run, Block]]:
        return [(run, block) for run in self.runs for block in run.bank.arena.blocks(run.first, run.last)]

    def _options(self, slot: Slot, momentum: float | None) -> Options:
        """The options of a step: those of the group, but for the momentum that `step` is given."""
        if momentum is None:
            return slot.options
        if slot.options.get("momentum") == 0.0:
            name = type(self).__name__
            raise MinigradError(f"step got momentum={momentum}, but {name} was built without one: give it one")
        return slot.options | {"momentum": float(momentum)}

    # ---- Gradients and state ----

    def zero_grad(self) -> None:
        """Forget the gradients: they become None, and their memory is free."""
        for slot in self.slots:
            slot.param.grad = None

    def state_dict(self) -> dict[str, Array]:
        """A copy of the state: "updates" (P,) int64 on the host, and arrays by name and position: "velocity.0", …

        Options and learning rate are not in it: they come from the code that builds the optimizer.
        """
        updates = np.array([slot.updates for slot in self.slots], np.int64)
        return {"updates": updates} | {name: x.copy(order="K") for name, x in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Continue from a `state_dict`, bit for bit; its arrays may come from another backend.

        Raises StateError, with all that is missing, unexpected or misshapen, before anything is changed.
        """
        own, state = self._state(), dict(state)  # dict: an .npz file reads an array each time it is asked for one
        wanted = {name: (x.shape, x.dtype) for name, x in own.items()}
        wanted["updates"] = ((len(self.slots),), np.dtype(np.int64))
        troubles = {
            "missing": [name for name in wanted if name not in state],
            "unexpected": [name for name in state if name not in wanted],
            "of another kind": [
                f"{name} is {state[name].dtype} {state[name].shape} instead of {dtype} {shape}"
                for name, (shape, dtype) in wanted.items()
                if name in state and (state[name].shape, state[name].dtype) != (shape, dtype)
            ],
        }
        if any(troubles.values()):
            raise StateError(f"this state is not that of this {type(self).__name__}: {differences(troubles)}")
        for name, x in own.items():
            x[...] = move(state[name], array_module(x))
        for slot, updates in zip(self.slots, state["updates"], strict=True):
            slot.updates = int(updates)

    def _state(self) -> dict[str, Array]:
        return {f"{name}.{i}": x for i, slot in enumerate(self.slots) for name, x in slot.state.items()}


def _bring_numbers(bank: Bank, runs: list[Run]) -> None:
    """Write the numbers of runs to the device, always to the same memory, and let the runs have them there."""
    if not runs:
        return
    xp, dtype, names = bank.arena.xp, bank.arena.like.dtype, list(vars(runs[0].numbers))
    if bank.numbers is None:
        bank.numbers = xp.empty((len(bank.slots), len(names)), dtype)
    if not capturing(xp):  # a graph would write the numbers of this step in every replay
        bank.numbers[: len(runs)].set(np.array([list(vars(run.numbers).values()) for run in runs], dtype))
    for run, row in zip(runs, bank.numbers, strict=False):
        run.numbers = SimpleNamespace(**dict(zip(names, row, strict=True)))


def _flat(values: Iterable[Any]) -> list[Any]:
    """Numbers, and those in tuples, one after the other."""
    return [number for value in values for number in (value if isinstance(value, (tuple, list)) else (value,))]


def _refuse_negative(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if not all(isinstance(number, Real) and float(number) >= 0.0 for number in _flat([value])):  # NaN fails too
            raise MinigradError(f"{name} must be a number of at least 0, got {value!r}")
