"""How the pictures of a batch get to where the model is: prepared ahead by any thread, delivered to the reader."""

from __future__ import annotations

from typing import Any

import numpy as np

from inception.data.augment import Augment, Changes, normalise
from inception.data.dataset import Dataset
from minigrad import backend
from minigrad.kernels import kernels
from minigrad.layout import Array, pixels

_SHARE = 0.25  # of the GPU's free memory: more pictures than that do not stay there, the network needs the rest


class Feed:
    """On the host everything is prepared, and delivered as it is."""

    where = ""  # what to tell a user of it

    def __init__(self, dataset: Dataset, augment: Augment | None, mean: np.ndarray, std: np.ndarray, seed: int):
        self.dataset, self.augment, self.mean, self.std, self.seed = dataset, augment, mean, std, seed
        self.fill = np.rint(255 * np.asarray(mean)).clip(0, 255)  # what cutout leaves: about zero once normalised

    def prepare(self, rows: np.ndarray, epoch: int) -> Any:
        """All that can be done ahead for the batch of the pictures `rows`; it depends on the arguments alone."""
        return normalise(self.changed(rows, epoch), self.mean, self.std)

    def deliver(self, prepared: Any) -> Array:
        """The batch (N, 3, H, W) float32, normalised, channels-last, in the memory where the model is."""
        return prepared

    def changed(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """The pictures `rows` as `epoch` shows them, (N, H, W, 3) uint8."""
        images = self.dataset.images[rows]
        if self.augment:
            images = self.augment(images, rows, seed=self.seed, epoch=epoch, fill=self.fill)
        return images


def open_feed(dataset: Dataset, augment: Augment | None, mean: np.ndarray, std: np.ndarray, seed: int) -> Feed:
    """The feed for the default backend; with CuPy the fastest for these pictures. All deliver the same bits."""
    if backend.backend() == "numpy":
        return Feed(dataset, augment, mean, std, seed)
    if reason := _why_not_resident(dataset, augment):
        return Uploaded(dataset, augment, mean, std, seed, reason)
    return Resident(dataset, augment, mean, std, seed)


# ---- On a GPU. Pixels are uploaded as bytes, and one kernel, `augment`, makes a batch of them. ----


class OnGpu(Feed):
    """What both ways have in common: the call of the kernel."""

    def __init__(self, *about: Any):
        super().__init__(*about)
        # There are 256 levels, so the host works out what each becomes; what cutout leaves is one more.
        levels = np.concatenate([np.repeat(np.arange(256)[:, None], 3, axis=1), [self.fill]]).astype(np.uint8)
        self.table = backend.asarray(pixels(normalise(levels[:, None, None], self.mean, self.std)))  # (257, 3)

    def make(self, pictures: Array, rows: np.ndarray, changes: Changes) -> Array:
        """The batch of these rows of `pictures`, which are on the GPU, (P, H, W, 3) uint8."""
        numbers = np.zeros((len(rows), 6), np.int32)
        numbers[:, 0] = rows
        for columns, drawn in ((slice(1, 3), changes.shift), (3, changes.mirrored), (slice(4, 6), changes.corners)):
            if drawn is not None:
                numbers[:, columns] = drawn
        side = 0 if self.augment is None or changes.corners is None else self.augment.cutout
        return kernels(self.table).augment(pictures, backend.asarray(numbers), side, self.table)


class Resident(OnGpu):
    """All pictures stay on the GPU: of a batch only row numbers and what was drawn for them are uploaded."""

    def __init__(self, *about: Any):
        super().__init__(*about)
        images = self.dataset.images
        self.pictures = backend.default_module().empty(images.shape, np.uint8)
        self.pictures.set(images)  # asarray would keep as much pinned memory
        augmented = ", augmented there" if self.augment else ""
        self.where = f"pictures: {self.pictures.nbytes / 1e6:,.0f} MB on the GPU{augmented}"

    def prepare(self, rows: np.ndarray, epoch: int) -> tuple[np.ndarray, Changes]:
        if self.augment is None:
            return rows, Changes()
        h, w = self.pictures.shape[1:3]
        return rows, self.augment.draw(rows, (h, w), seed=self.seed, epoch=epoch)

    def deliver(self, prepared: tuple[np.ndarray, Changes]) -> Array:
        return self.make(self.pictures, *prepared)


class Uploaded(OnGpu):
    """Every batch is changed on the host and uploaded, on a stream of its own, while the GPU is at earlier ones."""

    def __init__(self, dataset: Dataset, augment: Augment | None, mean: Any, std: Any, seed: int, reason: str):
        super().__init__(dataset, augment, mean, std, seed)
        self.where = f"pictures: uploaded batch by batch: {reason}"
        self.cupy: Any = backend.default_module()
        self.device, self.uploads = self.cupy.cuda.Device(), self.cupy.cuda.Stream(non_blocking=True)

    def prepare(self, rows: np.ndarray, epoch: int) -> tuple[Array, Any]:
        images = self.changed(rows, epoch)
        with self.device, self.uploads:
            there = self.cupy.asarray(images)  # which copies by way of pinned memory, which it holds until that is done
            return there, self.uploads.record()

    def deliver(self, prepared: tuple[Array, Any]) -> Array:
        there, arrived = prepared
        here = self.cupy.cuda.get_current_stream()
        here.wait_event(arrived)
        images = self.make(there, np.arange(len(there)), Changes())
        # CuPy gives the memory of `there` to the next upload as soon as nothing refers to it: not before it was read.
        self.uploads.wait_event(here.record())
        return images


def _why_not_resident(dataset: Dataset, augment: Augment | None) -> str:
    """Why the pictures cannot stay on the GPU and be augmented there; empty if they can."""
    if not isinstance(dataset.images, np.ndarray):
        return "they are decoded from files as they are asked for"
    if augment and (augment.resized_crop or augment.jitter):
        return "resized crops and jitter are made on the host"
    cupy: Any = backend.default_module()
    room = _SHARE * (cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes())
    if dataset.images.nbytes > room:
        return (
            f"their {dataset.images.nbytes / 1e6:,.0f} MB are more than {room / 1e6:,.0f} MB, "
            f"{_SHARE:.0%} of the GPU's free memory"
        )
    return ""
