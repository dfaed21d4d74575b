"""What all commands have in common: how they are parsed and run, and how their errors become sentences."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import minigrad
from inception import console
from inception.training import Stopped
from minigrad.backend import BACKENDS, PRECISIONS, memory_report
from minigrad.backend import backend as current_backend
from minigrad.errors import MinigradError, did_you_mean, no_such

Command = Callable[..., int]

EXIT_CODES = """exit codes:
  0    done; train: the training has finished and its weights are written
  1    an error, told in one sentence on standard error; predict: also if one of the pictures could not be read
  2    the command line cannot be understood
  130  stopped by Ctrl-C (SIGINT), 143 by SIGTERM, 129 by SIGHUP: training is saved, and the last line says how to go on
"""

FORMAT: dict[str, Any] = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "argument_default": argparse.SUPPRESS,  # only what was given is passed on: the rest is the recipe's, or Run's
    "allow_abbrev": False,
}


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse the command line, run its command, and return the exit code.

    Beside its options the parser sets `command`, and may set

    smaller   what to lower when the memory is not enough, as a function of the options
    on_disk   the result is a file: that nothing could be printed is no failure
    """
    console.begin()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # names and bars, where the output is not in UTF-8
    given: dict[str, Any] = {}
    try:
        given = vars(parser.parse_args(argv))
        smaller, on_disk = given.pop("smaller", _smaller), given.pop("on_disk", False)
        code = _run(**given)
        if on_disk:
            return code
        if sys.stdout is not None:
            sys.stdout.flush()
        if not console.output.lost or console.is_unread():
            return code
        _report("error: standard output could not be written", None)
    except BrokenPipeError as error:  # of a command that prints without the console
        if console.is_unread():  # its reader has seen enough, as `| head` has
            return 0
        _report(f"error: {error}", error)
    except Stopped as stop:
        console.warn(str(stop))
        return 128 + stop.signal
    except KeyboardInterrupt:
        console.warn("stopped")
        return 128 + signal.SIGINT
    except (MinigradError, OSError) as error:
        _report(f"error: {error}", error)
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # CuPy's
            raise
        _report(f"error: out of memory ({error}; {memory_report()}): {smaller(given)}", error)
    finally:
        console.end(json=bool(given.get("json")))
    return 1


def _run(command: Command, backend: str | None = None, device: int | None = None, precision: str | None = None,
         threads: int | None = None, **options: Any) -> int:  # fmt: skip
    if backend is not None or device is not None:
        minigrad.set_backend(backend or os.environ.get("MINIGRAD_BACKEND", "numpy"), device)
    if precision is not None:
        minigrad.set_precision(precision)
    current_backend()  # what the environment says is wrong is told here, not in the middle of something
    if threads is not None:
        minigrad.set_num_threads(threads)
    with np.errstate(all="ignore"):  # what is not finite is told in a sentence, not in NumPy's warnings
        return int(command(**options))


def _smaller(given: Mapping[str, Any]) -> str:
    return "lower --batch-size" if "batch_size" in given else "choose a smaller network"


def _report(sentence: str, error: BaseException | None) -> None:
    """What went wrong, and on the last line how to go on, if there is something to go on with."""
    for line in (sentence, *getattr(error, "__notes__", ())):
        console.warn(line)


def add_machine(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options that every command has."""
    group = parser.add_argument_group("machine and output")
    group.add_argument("--backend", choices=BACKENDS, help="(default: MINIGRAD_BACKEND, or numpy)")
    group.add_argument("--device", type=int, metavar="N", help="which GPU, from 0 (default: MINIGRAD_DEVICE, or 0)")
    group.add_argument("--precision", choices=PRECISIONS,
                       help="of products on a GPU; tf32 keeps three digits (default: MINIGRAD_PRECISION, "
                       "or float32)")  # fmt: skip
    group.add_argument("--threads", type=int, metavar="N", help="(default: MINIGRAD_NUM_THREADS, or all cores)")
    group.add_argument("--quiet", action="store_true", help="no progress bar; train: nothing but errors")
    group.add_argument("--json", action="store_true", help="print JSON, one object a line, and nothing else")
    return group


def path(text: str) -> Path:
    """A path of the command line; ~ is the home directory, also in --out=~/runs, which shells leave as it is."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name: name a file or a directory")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~nobody
        raise argparse.ArgumentTypeError(f"{text}: there is no such home directory") from None


class Parser(argparse.ArgumentParser):
    """Says of what is misspelt what may have been meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option, options = unknown[0].partition("=")[0], self._option_string_actions
            if option.startswith("-"):
                self.error(f"there is no option {option}{did_you_mean(option, options) or ': see --help'}")
            self.error(f"{option!r} belongs to no option: see --help")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = str(action.metavar or action.dest).lower()
            raise argparse.ArgumentError(action, no_such(kind, value, action.choices))
