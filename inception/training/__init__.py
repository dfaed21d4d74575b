"""The training room: from a model and batches to trained weights."""

from inception.training.loop import Epoch, Evaluation, Recipe, evaluate, train
from inception.training.run import Run, run

__all__ = ["Epoch", "Evaluation", "Recipe", "Run", "evaluate", "run", "train"]
