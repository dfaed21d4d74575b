"""The data room: pictures from files or drawn here, and the way from them to batches a network can read."""

from inception.data.augment import crop_and_flip, normalise
from inception.data.cifar import load_cifar10
from inception.data.dataset import DataError, Dataset, mean_and_std, split
from inception.data.loader import Batch, Loader
from inception.data.pictures import find_pictures, read_picture
from inception.data.shapes import load_shapes

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "Loader",
    "crop_and_flip",
    "find_pictures",
    "load_cifar10",
    "load_shapes",
    "mean_and_std",
    "normalise",
    "read_picture",
    "split",
]
