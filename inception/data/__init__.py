"""The data room: pictures from files or drawn here, and the way from them to batches a network can read."""

from inception.data.arrays import load_arrays
from inception.data.augment import Augment, normalise
from inception.data.cifar import load_cifar10, load_cifar100
from inception.data.dataset import DataError, Dataset, mean_and_std, split
from inception.data.folders import find_pictures, load_folders
from inception.data.loader import Batch, Loader
from inception.data.pictures import Preprocessing, check_preparation, read_picture
from inception.data.shapes import load_shapes
from inception.data.sources import open_data

__all__ = [
    "Augment",
    "Batch",
    "DataError",
    "Dataset",
    "Loader",
    "Preprocessing",
    "check_preparation",
    "find_pictures",
    "load_arrays",
    "load_cifar10",
    "load_cifar100",
    "load_folders",
    "load_shapes",
    "mean_and_std",
    "normalise",
    "open_data",
    "read_picture",
    "split",
]
