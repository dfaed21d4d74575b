"""The log of a run: one row an epoch, in `log.jsonl` and `log.csv`, and on request as TensorBoard events."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from inception.files import FileError, replace_file
from inception.training.loop import Epoch
from minigrad.errors import MinigradError

Row = dict[str, int | float | None]


def row_of(epoch: Epoch, *, watched: str = "test", average: bool = False) -> Row:
    """What the log says of an epoch: losses in nats, shares from 0 to 1, seconds. The keys are those of every epoch.

    watched   the pictures evaluated on: "test" or "validation"
    average   with the averaged weights' results (None after an epoch without), their names beginning with "ema_"
    """
    row: Row = {"epoch": epoch.number, "step": epoch.step, "lr": epoch.lr}
    row |= epoch.losses
    row["accuracy"] = epoch.accuracy
    for prefix, result in (("", epoch.test), ("ema_", epoch.average))[: 2 if average else 1]:
        row[f"{prefix}{watched}_loss"] = result.loss if result else None
        row[f"{prefix}{watched}_accuracy"] = result.accuracy if result else None
    row["seconds"], row["pictures_per_second"] = epoch.seconds, epoch.pictures_per_second
    return row


def as_json(row: dict[str, Any]) -> str:
    """One line; a number that is none (NaN, infinity) is null there, for JSON has no word for it."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})


class Log:
    """Writes the log of a run, always as a whole: it never holds half a line, and a lost file comes back.

    directory     of the run
    tensorboard   write events as well, of epochs that end after `step`; any that are there after it are void
    warn          told in one sentence if a file is gone or cannot be written; the rows are not lost by that

    Raises MinigradError if TensorBoard is asked for and not installed.
    """

    def __init__(self, directory: Path, warn: Callable[[str], None], *, tensorboard: bool = False, step: int = 0):
        self.directory, self.warn = directory, warn
        self.step, self.written = step, 0  # rows
        self.events = _event_writer(directory, step + 1) if tensorboard else None

    def write(self, rows: list[Row]) -> None:
        """Make the files those of `rows`, all epochs until now."""
        table = io.StringIO()
        if rows:
            writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        for name, text in (("log.jsonl", "".join(f"{as_json(row)}\n" for row in rows)), ("log.csv", table.getvalue())):
            path, content = self.directory / name, text.encode()
            if self.written and not path.exists():
                self.warn(f"{path} was gone and has been written anew, with all its {len(rows)} rows")
            try:
                replace_file(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
            except FileError as error:
                self.warn(f"{error}; its rows are kept, and written with those of the next epoch")
        self._write_events(rows[self.written :])
        self.written = len(rows)

    def _write_events(self, rows: list[Row]) -> None:
        if self.events is None:
            return
        try:
            for row in rows:
                step = row["step"] or 0
                for name, value in row.items() if step > self.step else ():
                    if value is not None and name not in ("epoch", "step"):
                        self.events.add_scalar(name, value, step)
            self.events.flush()
        except Exception as error:  # another project's package: it must not end a training
            self.warn(f"TensorBoard's events could not be written ({error}), and no more are")
            self.events = None

    def close(self) -> None:
        with suppress(Exception):
            if self.events is not None:
                self.events.close()


def _event_writer(directory: Path, first: int) -> Any:
    for module in ("tensorboardX", "torch.utils.tensorboard"):
        try:
            return import_module(module).SummaryWriter(str(directory / "events"), purge_step=first)
        except ImportError:
            continue
    raise MinigradError("--tensorboard needs a package that writes its events: pip install tensorboardX")
