#!/usr/bin/env python3
"""Train a GoogLeNet on small pictures: on CIFAR-10, or on shapes drawn by the project itself.

python examples/train_cifar.py                          # shapes: one pass over 15,000 pictures, minutes
python examples/train_cifar.py --data DIR --epochs 4    # CIFAR-10, unpacked in DIR (python or binary version)
python examples/train_cifar.py --backend cupy           # on an NVIDIA GPU
"""

import argparse
import sys
from pathlib import Path

import minigrad
from inception.models import list_models
from inception.training import Recipe, Run, run
from minigrad.errors import MinigradError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="shapes", metavar="shapes|DIR", help="built-in shapes, or a directory with CIFAR-10")
    add("--model", default="googlenet_small", choices=list_models())
    add("--aux", action="store_true", help="with auxiliary heads")
    add("--epochs", type=int, help="passes over the training pictures (default: 1 for shapes, else 4)")
    add("--batch-size", type=int, help="pictures in a step (default: 64 for shapes, else 128)")
    add("--lr", type=float, default=Recipe.lr, help="peak learning rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order, augmentation, dropout (default: %(default)s)")
    add("--validation", type=float, default=0.0, metavar="SHARE", help="of the training pictures, to evaluate on")
    add("--backend", choices=["numpy", "cupy"], help="where to compute (default: MINIGRAD_BACKEND, or numpy)")
    add("--threads", type=int, help="CPU threads (default: MINIGRAD_NUM_THREADS, or all cores)")
    add("--weights", type=Path, default=Path("runs/weights.npz"), help="file to write (default: %(default)s)")
    add("--quiet", action="store_true", help="print nothing but errors")
    args = parser.parse_args()

    small = args.data == "shapes"
    epochs = (1 if small else 4) if args.epochs is None else args.epochs
    batch_size = (64 if small else 128) if args.batch_size is None else args.batch_size
    try:
        recipe = Recipe(epochs, batch_size, args.lr, seed=args.seed)
        if args.backend:
            minigrad.set_backend(args.backend)
        if args.threads is not None:
            minigrad.set_num_threads(args.threads)
        run(Run(args.data, args.model, args.aux or None, args.validation, args.weights, recipe, args.quiet))
    except (MinigradError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: nothing was saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
