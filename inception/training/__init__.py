"""The training room: from a model and batches to trained weights.

Reading order: loop (a step, an epoch), recipes (every option), run (from names to weights), checkpoint and log.
"""

from inception.training.checkpoint import open_checkpoint
from inception.training.loop import Epoch, Evaluation, Stopped, Training, evaluate, tally, to_tensor, train
from inception.training.recipes import RECIPES, Recipe
from inception.training.run import Run, resumed, run

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
