"""The training room: from a model and batches to trained weights.

Reading order: step (forward, backward, update), loop (epochs), recipes and options, run (from names to weights),
directory, checkpoint and log.
"""

from inception.evaluate import Evaluation, evaluate, tally, to_tensor
from inception.training.checkpoint import open_checkpoint
from inception.training.loop import Epoch, Stopped, Training, train
from inception.training.options import Run, resumed
from inception.training.recipes import RECIPES, Recipe
from inception.training.run import run

__all__ = [
    "RECIPES",
    "Epoch",
    "Evaluation",
    "Recipe",
    "Run",
    "Stopped",
    "Training",
    "evaluate",
    "open_checkpoint",
    "resumed",
    "run",
    "tally",
    "to_tensor",
    "train",
]
