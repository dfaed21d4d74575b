#!/usr/bin/env python3
"""What is in these pictures? Prints the most likely classes of each, by a model that train_cifar.py has saved.

python examples/predict.py runs/weights.npz picture.png directory/

It is `python -m inception predict`, all its options included.
"""

import sys

from inception.__main__ import main as inception


def main() -> int:
    return inception(["predict", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
