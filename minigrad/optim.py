"""Optimizers: what a gradient does to its parameter. SGD, RMSProp and AdamW exactly as PyTorch defines them; Muon.

    optimizer = SGD(decay_groups(model, 5e-4), lr=0.1, momentum=0.9, nesterov=True)
    for step in range(total):
        optimizer.zero_grad()
        cross_entropy(model(x), labels).backward()
        optimizer.step(lr=0.1 * schedule(step))

An optimizer has no clock: learning rate and momentum of a step are handed in, as pure functions of the step
(minigrad.schedule). A parameter whose gradient is None keeps its value and its state. What all optimizers share is in
minigrad.optimizer.

In the formulas g is the gradient, p the parameter, lr the learning rate. Each class has its formula as the paper has
it, and in `_update` as code on arrays, which hold the values of many parameters. The numbers in that code, `n`, come
from `_numbers`, in double precision; on a GPU they lie in its memory, where a CUDA graph finds those of each step.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np

from minigrad.arena import BLOCK, Layout, clip, spread
from minigrad.backend import array_module
from minigrad.errors import MinigradError
from minigrad.kernels import kernels
from minigrad.layout import Array
from minigrad.optimizer import Optimizer, Options, Parameter, Params, Slot, State


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum μ and weight decay λ.

        d ← g + λ·p,   v ← μ·v + d,   p ← p − lr·v              (Nesterov: p ← p − lr·(d + μ·v))

    The velocity v starts at 0. Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum
    in deep learning, ICML 2013; in PyTorch's form, where lr is not inside v.
    Raises MinigradError for Nesterov without momentum.
    """

    def __init__(
        self, params: Params, lr: float, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
    ):
        super().__init__(params, lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)

    def _state_names(self, options: Options) -> tuple[str, ...]:
        if options["nesterov"] and not options["momentum"]:
            raise MinigradError("SGD: nesterov=True needs a momentum above 0, for example 0.9")
        return ("velocity",) if options["momentum"] else ()

    def _numbers(self, lr: float, t: int, *, momentum: float, nesterov: bool, weight_decay: float) -> dict[str, float]:
        return {"lr": lr, "mu": momentum, "lr_mu": lr * momentum, "decay": weight_decay}

    def _update(self, p: Array, g: Array, state: State, n: Any, options: Options) -> None:
        if options["weight_decay"]:
            g += n.decay * p  # d
        if not options["momentum"]:
            p -= n.lr * g
            return
        v = state["velocity"]
        v *= n.mu
        v += g
        if options["nesterov"]:
            p -= n.lr * g
            p -= n.lr_mu * v
        else:
            p -= n.lr * v


class RMSProp(Optimizer):
    """Gradients divided by a running root mean square, with decay α, momentum μ and weight decay λ.

        d ← g + λ·p,   s ← α·s + (1 − α)·d²,   v ← μ·v + d / (√s + ε),   p ← p − lr·v

    Tieleman, Hinton: Lecture 6.5, Coursera 2012; in PyTorch's form: ε is added outside the root, s starts at 0. The
    Inception papers (arXiv:1512.00567, 8: α 0.9, ε 1.0) used TensorFlow's: √(s + ε), s starts at 1, lr inside v.
    """

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

    def _numbers(self, lr: float, t: int, *, decay: float, eps: float, momentum: float, weight_decay: float) -> Any:
        return {"lr": lr, "alpha": decay, "rest": 1.0 - decay, "eps": eps, "mu": momentum, "decay": weight_decay}

    def _update(self, p: Array, g: Array, state: State, n: Any, options: Options) -> None:
        if options["weight_decay"]:
            g += n.decay * p  # d
        s = state["mean_square"]
        s *= n.alpha
        s += n.rest * (g * g)
        g /= array_module(s).sqrt(s) + n.eps
        if not options["momentum"]:
            p -= n.lr * g
            return
        v = state["velocity"]
        v *= n.mu
        v += g
        p -= n.lr * v


class AdamW(Optimizer):
    """Adam with decoupled weight decay λ; t counts the parameter's updates, from 1.

        m ← β₁·m + (1 − β₁)·g,   s ← β₂·s + (1 − β₂)·g²
        p ← (1 − lr·λ)·p − lr · m / (1 − β₁ᵗ) / (√(s / (1 − β₂ᵗ)) + ε)

    Kingma, Ba: Adam, arXiv:1412.6980; Loshchilov, Hutter: Decoupled weight decay regularization, arXiv:1711.05101.
    """

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

    def _numbers(self, lr: float, t: int, *, betas: tuple[float, float], eps: float, weight_decay: float) -> Any:
        beta1, beta2 = betas
        return {
            "rest1": 1.0 - beta1,
            "beta2": beta2,
            "rest2": 1.0 - beta2,
            "unbiased": (1.0 - beta2**t) ** -0.5,  # of √s
            "eps": eps,
            "kept": 1.0 - lr * weight_decay,
            "rate": lr / (1.0 - beta1**t),
        }

    def _update(self, p: Array, g: Array, state: State, n: Any, options: Options) -> None:
        m, s = state["mean"], state["mean_square"]
        m += n.rest1 * (g - m)
        s *= n.beta2
        s += n.rest2 * (g * g)
        p *= n.kept
        p -= n.rate * (m / (n.unbiased * array_module(s).sqrt(s) + n.eps))


class Muon(Optimizer):
    """Momentum μ made orthogonal: the filters of a layer all move equally far, each in a direction of its own.

        v ← μ·v + g,   d ← g + μ·v,   p ← (1 − lr·λ)·p − lr · max(1, √(O / K)) · orthogonal(d)

    orthogonal(d) is the nearest matrix to d, as (O, K) with K = I·KH·KW, whose singular values are all 1: a few strong
    directions, in which gradients are much alike, drown the others in plain momentum. What is no matrix (biases, gamma,
    beta) moves by p ← (1 − lr·λ)·p − lr·d. The step's length depends on lr only, not on the gradient. A typical lr is
    0.05.

    costs    9 products, with matrices of min(O, K) rows, for every weight: far below those of a step on a batch. On a
             GPU weights of one shape share them
    source   Jordan et al.: Muon, an optimizer for hidden layers in neural networks, 2024; with the weight decay of
             Liu et al., arXiv:2502.16982
    """

    def __init__(self, params: Params, lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay)

    def _state_names(self, options: Options) -> tuple[str, ...]:
        return ("velocity",)

    def _numbers(self, lr: float, t: int, *, momentum: float, weight_decay: float) -> dict[str, float]:
        return {"lr": lr, "mu": momentum, "kept": 1.0 - lr * weight_decay}

    def _apply(self) -> None:
        self._over_blocks(self._look_ahead)
        spread(self.banks[0].arena.xp, _turn, self._matrices())
        self._over_blocks(self._update)

    def _look_ahead(self, p: Array, g: Array, state: State, n: Any, options: Options) -> None:
        v = state["velocity"]
        v *= n.mu
        v += g
        g += n.mu * v  # d

    def _update(self, p: Array, g: Array, state: State, n: Any, options: Options) -> None:
        if options["weight_decay"]:
            p *= n.kept
        p -= n.lr * g  # which is d by now, for matrices max(1, √(O / K)) · orthogonal(d)

    def _matrices(self) -> list[Array]:
        """All d that are matrices, as views (S, O, …): those of one shape together, on the host in blocks."""
        found = []
        for run in self.runs:
            arena, d = run.bank.arena, run.bank.gradients.flat
            for shape, neighbours in groupby(range(run.first, run.last), key=arena.shapes.__getitem__):
                numbers = list(neighbours)
                if len(shape) > 1:
                    first, end = numbers[0], numbers[-1] + 1
                    count = len(numbers) if arena.xp is not np else BLOCK // max(arena.sizes[first], 1) or 1
                    found += [arena.stack(d, i, min(i + count, end)) for i in range(first, end, count)]
        return found


def _turn(d: Array) -> None:
    """Replace matrices (S, O, …) by their directions."""
    d[...] = direction(d.reshape(*d.shape[:2], -1)).reshape(d.shape)


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
    without being read, so that the host does not wait for the device. Where it is NaN or infinite the gradients stay as
    they are: a factor of 0 would make NaN of the infinite ones and erase all others. Gradients are replaced, not
    changed in place. Raises MinigradError if max_norm is not above 0.
    Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, arXiv:1211.5063.
    """
    kinds: dict[Any, list[Parameter]] = {}
    for p in params:
        if p.grad is not None:
            kinds.setdefault(p.grad.dtype, []).append(p)
    blocks = []
    for its in kinds.values():
        layout = Layout([p.grad for p in its])
        copies = layout.zeros()
        layout.check([p.grad for p in its])
        layout.gather([p.grad for p in its], copies)
        for p, copy in zip(its, copies.views, strict=True):
            p.grad = copy
        blocks += [copies.flat[block.values] for block in layout.blocks()]
    return clip(blocks, max_norm)


def _refuse_one(optimizer: type, **options: float) -> None:
    """Raise MinigradError for what must be below 1: the sum of what it weights would never settle."""
    for name, value in options.items():
        if not value < 1:
            raise MinigradError(f"{optimizer.__name__}: {name} must be below 1, got {value!r}")
