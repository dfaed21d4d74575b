"""Recipes: every option of a training in one record, and those of the papers by name.

recipe = dataclasses.replace(RECIPES["cifar_small"], epochs=8, seed=3)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from inception.data.augment import FLIPS
from inception.training.fields import check, option
from minigrad import optim, schedule
from minigrad.errors import MinigradError
from minigrad.nn import Module
from minigrad.schedule import Schedule

OPTIMIZERS = ("sgd", "rmsprop", "adamw", "muon")
SCHEDULES = ("constant", "step", "poly", "cosine", "one_cycle")


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those of the small GoogLeNet on CIFAR-10.

    SGD with Nesterov momentum and weight decay on all parameters; the learning rate rises to `lr` and falls to
    nearly zero along half a cosine each, momentum mirrors it from 0.95 to 0.85 and back
    (Smith, Topin: Super-convergence, arXiv:1708.07120).

    Raises MinigradError naming the option that is of another kind, not finite or out of range.
    """

    epochs: int = option(4, "passes over the training pictures", least=1)
    batch_size: int = option(128, "pictures in a step; an incomplete last batch is left out", least=1)
    lr: float = option(0.1, "learning rate: the schedule's highest")
    optimizer: str = option("sgd", "what a gradient does to its parameter", choices=OPTIMIZERS)
    momentum: float = option(0.9, "sgd, rmsprop, muon: share of the last update kept; one_cycle moves it", most=0.9999)
    nesterov: bool = option(True, "sgd: look ahead along the momentum")
    rms_decay: float = option(0.9, "rmsprop: decay of the mean square", most=1)
    beta1: float = option(0.9, "adamw: decay of the mean; one_cycle moves it", most=0.9999)
    beta2: float = option(0.999, "adamw: decay of the mean square", most=0.999999)
    eps: float = option(1e-8, "rmsprop, adamw: added to the root")
    weight_decay: float = option(5e-4, "pull of the weights towards zero")
    spare_norms: bool = option(False, "no weight decay on batch norm and biases")
    clip_norm: float = option(0.0, "longest gradient, all parameters together; 0: not clipped")

    schedule: str = option("one_cycle", "how the learning rate moves", choices=SCHEDULES)
    warm_up: float = option(0.0, "epochs in which the learning rate rises linearly, whatever the schedule")
    peak_at: float = option(0.3, "one_cycle: share of the run before the peak", most=1)
    lr_start: float = option(1 / 25, "one_cycle: learning rate at the start, as a share of lr", most=1)
    lr_end: float = option(1 / 25e4, "one_cycle, cosine: learning rate at the end, as a share of lr", most=1)
    momentum_high: float = option(0.95, "one_cycle: momentum (adamw: beta1) at both ends", most=0.9999)
    momentum_low: float = option(0.85, "one_cycle: momentum at the peak", most=0.9999)
    step_every: float = option(1.0, "step: epochs between two steps down", least=1e-3)
    step_at: tuple[float, ...] = option((), "step: epochs after which to step down, instead of at equal distances")
    step_factor: float = option(0.1, "step: factor of each step down", most=1)
    power: float = option(1.0, "poly: (1 − share of the run) to this power")

    label_smoothing: float = option(0.0, "share of the target spread over all classes", most=0.9999)
    head_weight: float = option(0.3, "of each auxiliary head's loss")  # arXiv:1409.4842, section 5
    ema: float = option(0.0, "decay per step of the average of the weights; 0: no average", most=0.999999)
    ema_every: int = option(1, "steps between two updates of the average", least=1)

    augment: bool = option(True, "change the training pictures at random, as the following options say")
    padding: int = option(4, "random shift by up to so many pixels")
    flip: str = option("random", "mirror half of the pictures, or each in every other epoch", choices=FLIPS)
    cutout: int = option(0, "side of a square blanked at a random place, pixels; 0: none")
    jitter: float = option(0.0, "random change of brightness, contrast and saturation; 0: none", most=1)
    resized_crop: tuple[float, ...] = option((), "random crop: smallest and largest share of the area", most=1)

    seed: int = option(0, "of weights, order, augmentation and dropout", least=-(2**63), most=2**63 - 1)
    name: str = option("cifar_small", "the recipe that this one began as")

    def __post_init__(self) -> None:
        check(self)
        if self.nesterov and self.optimizer == "sgd" and not self.momentum:
            raise MinigradError("nesterov needs a momentum above 0: set one, or leave it out (--no-nesterov)")
        if self.resized_crop and not (len(self.resized_crop) == 2 and 0 < self.resized_crop[0] <= self.resized_crop[1]):
            raise MinigradError(f"resized_crop must be two shares, 0 < low ≤ high ≤ 1, got {self.resized_crop}")
        if list(self.step_at) != sorted(self.step_at):
            raise MinigradError(f"step_at must be in ascending order, got {self.step_at}")

    def check_momentum(self) -> None:
        """Raise MinigradError for a momentum in whose place one_cycle would put its own. (A run that was begun with one
        may go on.)"""
        moved, still = ("beta1", ()) if self.optimizer == "adamw" else ("momentum", (0,))
        if self.schedule == "one_cycle" and getattr(self, moved) not in (getattr(Recipe, moved), *still):
            raise MinigradError(
                f"one_cycle moves {moved} from momentum_high to momentum_low and back: set these in its place, or "
                f"another schedule, got {moved} {getattr(self, moved):g}"
            )

    def make_optimizer(self, model: Module) -> optim.Optimizer:
        """The optimizer of all parameters of `model`."""
        params = optim.decay_groups(model, self.weight_decay) if self.spare_norms else model.parameters()
        common: dict[str, Any] = {"weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            return optim.SGD(params, self.lr, momentum=self.momentum, nesterov=self.nesterov, **common)
        if self.optimizer == "muon":
            return optim.Muon(params, self.lr, momentum=self.momentum, **common)
        if self.optimizer == "rmsprop":
            return optim.RMSProp(params, self.lr, decay=self.rms_decay, eps=self.eps, momentum=self.momentum, **common)
        return optim.AdamW(params, self.lr, betas=(self.beta1, self.beta2), eps=self.eps, **common)

    def make_schedules(self, steps_per_epoch: int) -> tuple[Schedule, Schedule | None]:
        """Learning rate and momentum of each step; None for a momentum that stays the optimizer's."""

        def steps(epochs: float) -> int:
            return max(1, round(epochs * steps_per_epoch))

        total = self.epochs * steps_per_epoch
        momentum = None
        if self.schedule == "one_cycle":
            factor = schedule.one_cycle(total, self.peak_at, self.lr_start, self.lr_end)
            if self.optimizer == "adamw" or self.momentum:
                momentum = schedule.one_cycle_momentum(total, self.peak_at, self.momentum_high, self.momentum_low)
        elif self.schedule == "cosine":
            factor = schedule.cosine(total, self.lr_end)
        elif self.schedule == "poly":
            factor = schedule.poly(total, self.power)
        elif self.schedule == "step" and self.step_at:
            factor = schedule.milestones([steps(epochs) for epochs in self.step_at], self.step_factor)
        elif self.schedule == "step":
            factor = schedule.step_decay(steps(self.step_every), self.step_factor)
        else:
            factor = schedule.constant()
        if self.warm_up:
            factor = schedule.warm_up(factor, steps(self.warm_up))
        return lambda step: self.lr * factor(step), momentum

    def to_json(self) -> dict[str, Any]:
        """Every option, as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_json`. Raises MinigradError if options are missing, unknown or out of range."""
        own = {option.name for option in fields(cls)}
        if not isinstance(options, Mapping) or own != options.keys():
            raise MinigradError(f"a recipe has the options {', '.join(sorted(own))}; these are others")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        return cls(**values)


# What the papers leave open is taken from the Caffe model of the same network (BVLC) or TF-slim, and said here.

# arXiv:1409.4842, section 6: momentum 0.9, −4 % every 8 epochs, Polyak averaging, heads 0.3, crops of 8 to 100 % of
# the picture. From Caffe: learning rate, batch, decay 2e-4 (none on biases), 250 epochs. Its SGD was asynchronous.
_GOOGLENET = Recipe(
    name="googlenet_2014",
    epochs=250,
    batch_size=32,
    lr=0.01,
    nesterov=False,
    weight_decay=2e-4,
    spare_norms=True,
    schedule="step",
    step_every=8.0,
    step_factor=0.96,
    ema=0.9999,
    padding=0,
    resized_crop=(0.08, 1.0),
)

_RECIPES = [
    Recipe(name="cifar_small"),
    # The built-in shapes are easily learnt: one pass.
    Recipe(name="shapes", epochs=1, batch_size=64),
    # Eight passes: Muon, whose step is as long as lr says, so that lr falls in a straight line; little augmentation, as
    # a run this short does not learn pictures by heart.
    Recipe(
        name="cifar_fast",
        epochs=8,
        optimizer="muon",
        lr=0.05,
        weight_decay=0.01,
        spare_norms=True,
        schedule="poly",
        warm_up=0.5,
        label_smoothing=0.05,
        padding=2,
        flip="alternate",
    ),
    # The UvA deep-learning tutorial 5: 89.70 % with googlenet_small on the original CIFAR-10. Its crops are of shapes
    # from 9:10 to 10:9, those here from 3:4 to 4:3.
    Recipe(
        name="cifar_uva",
        epochs=180,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=1e-4,
        schedule="step",
        step_at=(100.0, 150.0),
        step_factor=0.1,
        padding=0,
        resized_crop=(0.8, 1.0),
    ),
    _GOOGLENET,
    # The same in 60 epochs: Caffe's "quick" solver.
    replace(_GOOGLENET, name="googlenet_quick", epochs=60, schedule="poly", power=0.5),
    # arXiv:1512.00567, section 8: RMSProp with decay 0.9 and ε 1, −6 % every 2 epochs, clipping at 2, smoothing 0.1,
    # average of the weights. From TF-slim: momentum, weight decay. Theirs had ε inside the root and 50 replicas.
    Recipe(
        name="inception_v3_2015",
        epochs=100,
        batch_size=32,
        optimizer="rmsprop",
        lr=0.045,
        momentum=0.9,
        rms_decay=0.9,
        eps=1.0,
        weight_decay=4e-5,
        spare_norms=True,
        clip_norm=2.0,
        schedule="step",
        step_every=2.0,
        step_factor=0.94,
        label_smoothing=0.1,
        head_weight=0.4,
        ema=0.9999,
        padding=0,
        resized_crop=(0.08, 1.0),
    ),
]
RECIPES = {recipe.name: recipe for recipe in _RECIPES}
