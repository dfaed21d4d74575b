#!/usr/bin/env python3
"""What is in these pictures? Prints the most likely classes of each, by a model that train_cifar.py has saved.

python examples/predict.py runs/weights.npz picture.png directory/
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from inception.data import DataError, find_pictures, normalise, read_picture
from inception.training import to_tensor
from inception.weights import load_model
from minigrad import no_grad, ops
from minigrad.backend import to_host
from minigrad.errors import MinigradError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="an .npz that training has written")
    parser.add_argument("pictures", type=Path, nargs="+", help="picture files, or directories of them")
    parser.add_argument("--top", type=int, default=3, help="classes to print (default: %(default)s)")
    args = parser.parse_args()
    if args.top < 1:
        parser.error(f"--top must be at least 1, got {args.top}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the bars, and names, where the output is not in UTF-8
    unreadable = 0
    try:
        model, about = load_model(args.weights)
        for path in find_pictures(args.pictures):
            try:
                picture = read_picture(path, tuple(about["size"]))
            except DataError as error:
                print(f"error: {error}", file=sys.stderr)
                unreadable += 1
                continue
            batch = normalise(picture[None], np.array(about["mean"]), np.array(about["std"]))
            with no_grad():
                probabilities = to_host(ops.softmax(model(to_tensor(batch))).data)[0]
            print(path)
            for k in probabilities.argsort()[::-1][: args.top]:
                bar = "█" * round(20 * float(probabilities[k]))
                print(f"  {probabilities[k]:6.1%} {bar:20} {about['classes'][k]}")
    except MinigradError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
