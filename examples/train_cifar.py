#!/usr/bin/env python3
"""Train a GoogLeNet on small pictures: on CIFAR-10, or on shapes drawn by the project itself.

python examples/train_cifar.py                          # shapes: one pass over 15,000 pictures, minutes
python examples/train_cifar.py --data DIR --epochs 4    # CIFAR-10, unpacked in DIR (python or binary version)
python examples/train_cifar.py --backend cupy           # on an NVIDIA GPU

It is `python -m inception train`, all its options included, with the weights in runs/weights.npz.
"""

import sys

from inception.__main__ import main as inception


def main() -> int:
    return inception(["train", "--weights", "runs/weights.npz", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
