"""Optimizers: what a gradient does to its parameter. SGD, RMSProp and AdamW exactly as PyTorch defines them; Muon.

    optimizer = SGD(decay_groups(model, 5e-4), lr=0.1, momentum=0.9, nesterov=True)
    for step in range(total):
        optimizer.zero_grad()
        cross_entropy(model(x), labels).backward()
        optimizer.step(lr=0.1 * schedule(step))

An optimizer has no clock: learning rate and momentum of a step are handed in, as pure functions of the step
(minigrad.schedule). Parameters are updated in place, in the memory and layout that they have; besides the state,
an update needs one scratch array of the parameter's size (RMSProp with weight decay: two; Muon: five). On a GPU all
parameters are updated by one launch of a kernel that has the same formula (kernels/cuda/optim.cu), without scratch; by
Muon in two, with products in between and one array of scratch that is kept. A parameter whose gradient is None is left
alone. In the formulas g is the gradient, p the parameter, lr the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from minigrad.backend import array_module, capturing, move
from minigrad.errors import BackendError, MinigradError, StateError, differences, no_such
from minigrad.kernels import kernels
from minigrad.layout import Array, empty_images, filter_matrix, memory_order
from minigrad.threads import blas_on_one_thread

Parameter = Any  # an object with .data, an array, and .grad, an array of the same shape and dtype or None
Params = Iterable[Any]  # of parameters, or of groups: {"params": [...], "weight_decay": 0.0, "lr_scale": 2.0}
Options = dict[str, Any]  # an optimizer's keyword arguments


@dataclass
class Slot:
    """One parameter, the options of its group, and what the optimizer remembers about it."""

    param: Parameter
    lr_scale: float  # this group's learning rate over the step's
    options: Options  # the optimizer's, as this group overrides them
    updates: int = 0  # how often it has been updated
    state: dict[str, Array] = field(default_factory=dict)  # shape, dtype and memory layout of the parameter


class Optimizer:
    """What all optimizers share: groups, the walk over the parameters, and the state.

    params   parameters, or groups of them: {"params": [...], "weight_decay": 0.0, "lr_scale": 2.0}. A group
             overrides the optimizer's keyword arguments; its learning rate is lr_scale times the step's.
    lr       the learning rate of a step that is not given one
    Raises   MinigradError for an option that is unknown or negative, no parameters, or one that comes twice.

    Build it after the model is where it shall train: the state lives where the parameters do.
    """

    kernel = ""  # in kernels/cuda/optim.cu: the formula of `_update`, given p, g and the state of these names, and the
    state_names: tuple[str, ...] = ()  # numbers lr, t and the options in the order of __init__; "": there is none

    def __init__(self, params: Params, lr: float, **options: Any):
        if not isinstance(params, Iterable):
            raise self._no_parameters(params)
        entries = list(params)
        groups = entries if entries and isinstance(entries[0], Mapping) else [{"params": entries}]
        _refuse_negative({"lr": lr})
        self.lr = lr
        self.slots: list[Slot] = []
        self.together: Any = None  # the launch for all parameters, made when it is first needed
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
                xp = array_module(p.data)
                self.slots.append(Slot(p, scale, own, state={name: xp.zeros_like(p.data) for name in names}))
        if not self.slots:
            raise MinigradError(f"{type(self).__name__} got no parameters: was a generator used up before?")
        if len({id(slot.param) for slot in self.slots}) < len(self.slots):
            raise MinigradError("a parameter was given twice, in one group or in two: it would be updated twice")

    def _no_parameters(self, given: Any) -> MinigradError:
        name = type(self).__name__
        return MinigradError(f"{name} wants parameters, as model.parameters() gives them, got {type(given).__name__}")

    def _state_names(self, options: Options) -> tuple[str, ...]:
        """Name the arrays to keep for each parameter of a group; refuse options that do not go together."""
        raise NotImplementedError

    def _update(self, *args: Any, **options: Any) -> None:
        """Update p in place: `_update(p, g, slot, lr, **options)`."""
        raise NotImplementedError

    def step(self, lr: float | None = None, momentum: float | None = None) -> None:
        """Update every parameter that has a gradient; gradients are left untouched.

        lr         the learning rate of this step, instead of the optimizer's
        momentum   the momentum of this step (for AdamW β₁), in all groups, instead of theirs

        Raises MinigradError for one that is negative or NaN, and for a momentum where the optimizer was built without.
        """
        lr = float(self.lr if lr is None else lr)  # Python numbers, so that float32 stays float32
        _refuse_negative({"lr": lr} if momentum is None else {"lr": lr, "momentum": float(momentum)})
        due = {i: slot for i, slot in enumerate(self.slots) if slot.param.grad is not None}
        options = {i: self._options(slot, momentum) for i, slot in due.items()}  # which may raise, before any update
        for i, slot in due.items():
            self._check_places(i, slot)
        rows = {i: self._row(i, slot) for i, slot in due.items()}
        apart = [i for i, row in rows.items() if row is None]
        if apart and capturing(array_module(due[apart[0]].param.data)):
            raise BackendError(
                f"{type(self).__name__} has no kernel that updates parameter {apart[0]}: a graph would repeat the "
                "learning rate of the step that it was captured in"
            )
        for i in apart:
            slot = due[i]
            slot.updates += 1
            self._update(slot.param.data, slot.param.grad, slot, lr * slot.lr_scale, **options[i])
        if len(apart) < len(rows):
            self.together.place({i: row for i, row in rows.items() if row is not None})
            self.renew(lr, momentum)
            self._launch()

    def _launch(self) -> None:
        """Update, on a GPU, the parameters that were placed, by the numbers that were told."""
        self.together.launch()

    def renew(self, lr: float, momentum: float | None = None) -> None:
        """What is left for the host to do where a CUDA graph that has captured `step` is replayed: count an update of
        the same parameters, and say its numbers (`together.upload` writes them)."""
        numbers = {}
        for i in self.together.placed[0]:
            slot = self.slots[i]
            slot.updates += 1
            numbers[i] = [lr * slot.lr_scale, slot.updates, *_flat(self._options(slot, momentum).values())]
        self.together.tell(numbers)

    def _check_places(self, i: int, slot: Slot) -> None:
        """Raise BackendError where a parameter, its gradient and its state are not in one place."""
        p = slot.param.data
        for name, x in {"gradient": slot.param.grad, **slot.state}.items():
            if type(x) is not type(p) and array_module(x) is not array_module(p):
                here, there = array_module(p).__name__, array_module(x).__name__
                raise BackendError(
                    f"{type(self).__name__}: parameter {i} {p.shape} is an array of {here}, its {name} {x.shape} one "
                    f"of {there}: after a model has moved, build a new optimizer and give it this one's state_dict()"
                )

    def _options(self, slot: Slot, momentum: float | None) -> Options:
        """The options of a step: those of the group, but for the momentum that `step` is given."""
        if momentum is None:
            return slot.options
        if slot.options.get("momentum") == 0.0:
            name = type(self).__name__
            raise MinigradError(f"step got momentum={momentum}, but {name} was built without one: give it one")
        return slot.options | {"momentum": float(momentum)}

    def _row(self, i: int, slot: Slot) -> list[Array | None] | None:
        """On a GPU: the arrays of this parameter for the launch that updates all; None where they do not fit in."""
        p, g = slot.param.data, slot.param.grad
        if not hasattr(kernels(p), "Together"):
            return None
        if not vars(type(self)).get("kernel"):  # not inherited: `_update` may be another
            return None
        if self.together is None:
            self.together = kernels(p).Together(self.kernel, [slot.param.data for slot in self.slots])
        state = [slot.state.get(name) for name in self.state_names]
        if not self.together.takes(i, p, *state):
            return None
        return [p, g if self.together.takes(i, p, g) else _copied(g, p), *state]

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


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum μ and weight decay λ.

        d ← g + λ·p,   v ← μ·v + d,   p ← p − lr·v              (Nesterov: p ← p − lr·(d + μ·v))

    The velocity v starts at 0. Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum
    in deep learning, ICML 2013; in PyTorch's form, where lr is not inside v.
    Raises MinigradError for Nesterov without momentum.
    """

    kernel, state_names = "sgd", ("velocity",)

    def __init__(
        self, params: Params, lr: float, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
    ):
        super().__init__(params, lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)

    def _state_names(self, options: Options) -> tuple[str, ...]:
        if options["nesterov"] and not options["momentum"]:
            raise MinigradError("SGD: nesterov=True needs a momentum above 0, for example 0.9")
        return ("velocity",) if options["momentum"] else ()

    def _update(
        self, p: Array, g: Array, slot: Slot, lr: float, momentum: float, nesterov: bool, weight_decay: float
    ) -> None:
        d = _decayed(p, g, weight_decay)
        if "velocity" in slot.state:
            v = slot.state["velocity"]
            v *= momentum
            v += d
            if nesterov:  # lr·d and lr·μ·v are taken off one after the other, to need no second scratch array
                d *= lr
                p -= d
            array_module(p).multiply(v, lr * momentum if nesterov else lr, out=d)
        else:
            d *= lr
        p -= d


class RMSProp(Optimizer):
    """Gradients divided by a running root mean square, with decay α, momentum μ and weight decay λ.

        d ← g + λ·p,   s ← α·s + (1 − α)·d²,   v ← μ·v + d / (√s + ε),   p ← p − lr·v

    Tieleman, Hinton: Lecture 6.5, Coursera 2012; in PyTorch's form: ε is added outside the root, s starts at 0. The
    Inception papers (arXiv:1512.00567, 8: α 0.9, ε 1.0) used TensorFlow's: √(s + ε), s starts at 1, lr inside v.
    """

    kernel, state_names = "rmsprop", ("mean_square", "velocity")

    def __init__(
        self,
        params: Params,
        lr: float,
        *,
        decay: float = 0.9,
        eps: float = 1e-8,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, lr, decay=decay, eps=eps, momentum=momentum, weight_decay=weight_decay)

    def _state_names(self, options: Options) -> tuple[str, ...]:
        if options["decay"] > 1:
            raise MinigradError(f"RMSProp: decay must be at most 1, got {options['decay']!r}")
        return ("mean_square", "velocity") if options["momentum"] else ("mean_square",)

    def _update(
        self, p: Array, g: Array, slot: Slot, lr: float, decay: float, eps: float, momentum: float, weight_decay: float
    ) -> None:
        xp = array_module(p)
        d = _decayed(p, g, weight_decay) if weight_decay else g  # g itself is only read below
        s = slot.state["mean_square"]
        scratch = xp.multiply(d, d, out=xp.empty_like(p))
        scratch *= 1.0 - decay
        s *= decay
        s += scratch
        xp.sqrt(s, out=scratch)
        scratch += eps
        xp.divide(d, scratch, out=scratch)
        if "velocity" in slot.state:
            v = slot.state["velocity"]
            v *= momentum
            v += scratch
            xp.multiply(v, lr, out=scratch)
        else:
            scratch *= lr
        p -= scratch


class AdamW(Optimizer):
    """Adam with decoupled weight decay λ; t counts the parameter's updates, from 1.

        m ← β₁·m + (1 − β₁)·g,   s ← β₂·s + (1 − β₂)·g²
        p ← (1 − lr·λ)·p − lr · m / (1 − β₁ᵗ) / (√(s / (1 − β₂ᵗ)) + ε)

    Kingma, Ba: Adam, arXiv:1412.6980; Loshchilov, Hutter: Decoupled weight decay regularization, arXiv:1711.05101.
    """

    kernel, state_names = "adamw", ("mean", "mean_square")

    def __init__(
        self,
        params: Params,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _state_names(self, options: Options) -> tuple[str, ...]:
        if not isinstance(options["betas"], (tuple, list)) or len(options["betas"]) != 2:
            raise MinigradError(f"AdamW: betas must be two numbers, (beta1, beta2), got {options['betas']!r}")
        _refuse_one(AdamW, beta1=options["betas"][0], beta2=options["betas"][1])
        return ("mean", "mean_square")

    def _options(self, slot: Slot, momentum: float | None) -> Options:
        """The momentum of a step is β₁."""
        _, beta2 = slot.options["betas"]
        if momentum is not None:
            _refuse_one(AdamW, momentum=momentum)
        return slot.options if momentum is None else slot.options | {"betas": (float(momentum), beta2)}

    def _update(
        self,
        p: Array,
        g: Array,
        slot: Slot,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        xp, (beta1, beta2) = array_module(p), betas
        m, s = slot.state["mean"], slot.state["mean_square"]
        scratch = xp.subtract(g, m, out=xp.empty_like(p))
        scratch *= 1.0 - beta1
        m += scratch
        xp.multiply(g, g, out=scratch)
        scratch *= 1.0 - beta2
        s *= beta2
        s += scratch
        xp.sqrt(s, out=scratch)
        scratch *= (1.0 - beta2**slot.updates) ** -0.5
        scratch += eps
        xp.divide(m, scratch, out=scratch)
        scratch *= lr / (1.0 - beta1**slot.updates)
        p *= 1.0 - lr * weight_decay
        p -= scratch


class Muon(Optimizer):
    """Momentum μ made orthogonal: the filters of a layer all move equally far, each in a direction of its own.

        v ← μ·v + g,   d ← g + μ·v,   p ← (1 − lr·λ)·p − lr · max(1, √(O / K)) · orthogonal(d)

    orthogonal(d) is the nearest matrix to d, as (O, K) with K = KH·KW·I, whose singular values are all 1: a few strong
    directions, in which gradients are much alike, drown the others in plain momentum. What is no matrix (biases, gamma,
    beta) moves by p ← (1 − lr·λ)·p − lr·d. The step's length hangs on lr alone, not on the gradient's: about 0.05.

    costs    9 products, with matrices of min(O, K) rows, for every weight: far below those of a step on a batch. On a
             GPU weights of one shape share them
    source   Jordan et al.: Muon, an optimizer for hidden layers in neural networks, 2024; with the weight decay of
             Liu et al., arXiv:2502.16982
    """

    kernel, state_names = "muon", ("velocity",)

    def __init__(self, params: Params, lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay)
        self.directions: list[Array] = []  # d of every parameter on a GPU, made when it is first needed:
        self.stacks: list[Array] = []  # those that are matrices again, (S, O, K) for each shape that they have

    def _state_names(self, options: Options) -> tuple[str, ...]:
        return ("velocity",)

    def _update(self, p: Array, g: Array, slot: Slot, lr: float, momentum: float, weight_decay: float) -> None:
        v = slot.state["velocity"]
        v *= momentum
        v += g
        d = array_module(p).multiply(v, momentum, out=array_module(p).empty_like(p))
        d += g
        if weight_decay:
            p *= 1.0 - lr * weight_decay
        if p.ndim > 1:
            d = direction(d.reshape(len(d), -1)).reshape(p.shape)
        d *= lr
        p -= d

    def _row(self, i: int, slot: Slot) -> list[Array | None] | None:
        row = super()._row(i, slot)
        if row is None:
            return None
        if not self.directions:
            self._make_directions()
        d = self.directions[i]
        return [*row, d] if self.together.takes(i, slot.param.data, d) else None

    def _make_directions(self) -> None:
        """Matrices of one shape lie on each other, filters channels-last as parameters are."""
        alike: dict[Any, list[int]] = {}
        for i, slot in enumerate(self.slots):
            alike.setdefault((slot.param.data.dtype, slot.param.data.shape), []).append(i)
        found: dict[int, Array] = {}
        for (dtype, shape), numbers in alike.items():
            joined = empty_images(array_module(self.slots[0].param.data), (len(numbers) * shape[0], *shape[1:]), dtype)
            joined[...] = 0.0  # also where a parameter never gets a gradient
            found |= {i: joined[n * shape[0] : (n + 1) * shape[0]] for n, i in enumerate(numbers)}
            if len(shape) > 1:
                rows = filter_matrix(joined) if len(shape) == 4 else joined.reshape(len(joined), -1)
                self.stacks.append(rows.reshape(len(numbers), shape[0], -1))
        self.directions = [found[i] for i in range(len(self.slots))]

    def _launch(self) -> None:
        self.together.launch("muon_momentum")
        for stack in self.stacks:
            stack[...] = direction(stack)
        self.together.launch()


def direction(matrices: Array) -> Array:
    """What Muon makes of matrices (…, O, K): orthogonal, and longer if there are more rows than columns."""
    rows, columns = matrices.shape[-2:]
    return orthogonal(matrices) * max(1.0, rows / columns) ** 0.5


def orthogonal(matrices: Array) -> Array:
    """About the nearest matrices to these (…, O, K) with singular values of 1, by Newton and Schulz's iteration.

        X ← (a·I + b·XXᵀ + c·(XXᵀ)²)·X,      three times from X = matrix / ‖matrix‖

    sends each singular value s to a·s + b·s³ + c·s⁵. With Jordan's coefficients small values grow 3.4-fold a step and
    large ones end between 0.7 and 1.2, which is near enough. For more rows than columns it is X·(a·I + b·XᵀX + …), the
    same by smaller products.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    xp, matmul, wide = array_module(matrices), kernels(matrices).matmul, matrices.shape[-2] <= matrices.shape[-1]
    x = matrices / (xp.sqrt(xp.sum(matrices * matrices, axis=(-2, -1), keepdims=True)) + 1e-7)
    with blas_on_one_thread():
        for _ in range(3):
            turned = x.swapaxes(-2, -1)
            square = matmul(x, turned, None) if wide else matmul(turned, x, None)
            factor = matmul(square, square, None)
            factor *= c
            square *= b
            factor += square
            diagonal = factor.reshape(*factor.shape[:-2], -1)[..., :: factor.shape[-1] + 1]
            diagonal += a
            x = matmul(factor, x, None) if wide else matmul(x, factor, None)
    return x


def decay_groups(module: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: the weights of convolutions and linear layers with weight decay, all else without.

    All else has at most one axis: biases, and gamma and beta of batch norm, whose scale the loss does not see.

    module   a module, or its named parameters: pairs (name, parameter)
    """
    named = list(module.named_parameters() if hasattr(module, "named_parameters") else module)
    if any(hasattr(entry, "grad") for entry in named):
        raise MinigradError("decay_groups wants a module, or its named_parameters(), got parameters without names")
    params = [p for _, p in named]
    return [
        {"params": [p for p in params if p.data.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.data.ndim <= 1], "weight_decay": 0.0},
    ]


def clip_by_norm(params: Iterable[Parameter], max_norm: float) -> Array:
    """Scale all gradients by one factor, so that their joint norm is at most `max_norm`.

        norm = √(Σ g²) over all parameters,     g ← g · min(1, max_norm / (norm + 1e-6))

    returns the norm before clipping, a float64 array () where the gradients are. It is summed in float64, and used
    without being read, so that the host does not wait for the device; NaN or infinity comes back as it is.
    Gradients are replaced, not changed in place. Raises MinigradError if max_norm is not above 0.
    Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, arXiv:1211.5063.
    """
    return ClipByNorm(max_norm)(params)


class ClipByNorm:
    """`clip_by_norm` step after step: on a GPU its tables are made once, as a CUDA graph demands."""

    def __init__(self, max_norm: float):
        if not max_norm > 0.0:
            raise MinigradError(f"max_norm must be above 0, got {max_norm}")
        self.max_norm = float(max_norm)
        self.together: Any = None  # on a GPU: the launch for all gradients, made when it is first needed

    def __call__(self, params: Iterable[Parameter]) -> Array:
        """Clip the gradients of these parameters, and return their norm before."""
        params = [p for p in params if p.grad is not None]
        if not params:
            return np.zeros(())
        xp = array_module(params[0].grad)
        if hasattr(kernels(params[0].grad), "clip") and len({p.grad.dtype for p in params}) == 1:
            return self._at_once(params)
        if capturing(xp):
            raise BackendError("the gradients are of several dtypes, and no kernel clips these together")
        squares = [xp.sum(xp.square(p.grad, dtype=xp.float64)) for p in params]
        norm = xp.sqrt(xp.sum(xp.stack(squares)))
        factor = xp.minimum(1.0, self.max_norm / (norm + 1e-6))
        for p in params:
            p.grad = xp.multiply(p.grad, factor.astype(p.grad.dtype), out=xp.empty_like(p.data))
        return xp.asarray(norm)

    def _at_once(self, params: list[Parameter]) -> Array:
        """The same on a GPU, in two launches for all gradients of one dtype."""
        into = [array_module(p.grad).empty_like(p.data) for p in params]
        gradients = [
            p.grad if _alike(p.grad, new) else _copied(p.grad, new) for p, new in zip(params, into, strict=True)
        ]
        kind = into[0].dtype, [new.size for new in into]
        if self.together is None or (self.together.like.dtype, self.together.sizes) != kind:
            self.together = kernels(into[0]).Together("clip", into)
        norm = kernels(into[0]).clip(self.together, gradients, into, self.max_norm)
        for p, new in zip(params, into, strict=True):
            p.grad = new
        return norm[0]


def _alike(a: Array, b: Array) -> bool:
    """Whether the values of both lie in memory in the same order, without gaps."""
    first, second = (memory_order(x.shape, x.strides, x.itemsize) for x in (a, b))
    return first == second and first is not None


def _copied(x: Array, like: Array) -> Array:
    """x in the memory layout of another array."""
    y = array_module(like).empty_like(like)
    y[...] = x
    return y


def _decayed(p: Array, g: Array, weight_decay: float) -> Array:
    """g + weight_decay·p, in a new array of p's layout."""
    d = array_module(p).empty_like(p)
    if weight_decay:
        array_module(p).multiply(p, weight_decay, out=d)
        d += g
    else:
        d[...] = g
    return d


def _flat(values: Iterable[Any]) -> list[Any]:
    """Numbers, and those in tuples, one after the other."""
    return [number for value in values for number in (value if isinstance(value, (tuple, list)) else (value,))]


def _refuse_negative(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if not all(isinstance(number, Real) and float(number) >= 0.0 for number in _flat([value])):  # NaN fails too
            raise MinigradError(f"{name} must be a number of at least 0, got {value!r}")


def _refuse_one(optimizer: type, **options: float) -> None:
    """Raise MinigradError for what must be below 1: the sum of what it weights would never settle."""
    for name, value in options.items():
        if not value < 1:
            raise MinigradError(f"{optimizer.__name__}: {name} must be below 1, got {value!r}")
