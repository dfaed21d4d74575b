"""The training room: from a model and batches to trained weights."""

from inception.training.loop import Epoch, Evaluation, Recipe, evaluate, to_tensor, train
from inception.training.run import Run, run

__all__ = ["Epoch", "Evaluation", "Recipe", "Run", "evaluate", "run", "to_tensor", "train"]
