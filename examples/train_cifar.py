#!/usr/bin/env python3
"""Train a GoogLeNet on small pictures, the whole loop in sight: CIFAR-10, or shapes drawn by the project itself.

python examples/train_cifar.py                          # shapes: one pass over 15,000 pictures, minutes
python examples/train_cifar.py --data DIR --epochs 4    # CIFAR-10, unpacked in DIR (python or binary version)
python examples/train_cifar.py --backend cupy           # on an NVIDIA GPU

`python -m inception train` takes the same steps, and can be stopped and resumed. Its other options are left out here.
"""

import sys
from itertools import count
from pathlib import Path

from inception import console
from inception.commands.line import FORMAT, Parser, add_machine, path, run_command
from inception.data import Augment, Loader, mean_and_std, open_data
from inception.evaluate import evaluate, to_tensor
from inception.files import FileError, check_place
from inception.models import create_model
from inception.weights import save_weights
from minigrad import backend, ops, optim, schedule
from minigrad.random import Key


def train(data="shapes", model="googlenet_small", epochs=None, batch_size=None, lr=0.1, save=None, quiet=False,
          json=False):  # fmt: skip
    epochs, batch_size = epochs or (1 if data == "shapes" else 4), batch_size or (64 if data == "shapes" else 128)
    save = save or next(file for file in names("runs/weights.npz") if not file.exists())
    if save.exists():
        raise FileError(f"{save} exists already: name another file (--save)")
    check_place(save)

    pictures, tests = open_data(data, quiet=quiet)
    mean, std = mean_and_std(pictures)
    batches = Loader(pictures, batch_size, mean=mean, std=std, augment=Augment(), shuffle=True, drop_last=True,
                     prefetch=2)  # fmt: skip
    network = create_model(model, num_classes=len(pictures.classes), aux_logits=False, seed=0)
    optimizer = optim.SGD(network.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * len(batches)
    rate, momentum = schedule.one_cycle(steps), schedule.one_cycle_momentum(steps)
    say = console.say if not quiet else lambda line: None
    say(f"{model} on {pictures.name}: {len(pictures):,} pictures of {len(pictures.classes)} classes, {steps:,} steps")

    for epoch in range(epochs):
        network.train()
        with console.progress(f"epoch {epoch + 1}", len(batches), unit="step", quiet=quiet) as bar:
            for step, batch in enumerate(batches.batches(epoch), epoch * len(batches)):
                network.set_key(Key(0).fold("dropout").fold(step), batch.rows)  # random numbers of this step
                logits = network(to_tensor(batch.images))
                loss = ops.cross_entropy(logits, backend.asarray(batch.labels))
                loss.backward()
                optimizer.step(lr=lr * rate(step), momentum=momentum(step))
                optimizer.zero_grad()
                if bar.update():  # drawn now: only then wait for a GPU
                    bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        result = evaluate(network, Loader(tests, batch_size, mean=mean, std=std), quiet=quiet)
        say(f"epoch {epoch + 1}: test accuracy {result.accuracy:.2%}, loss {result.loss:.4f}")

    about = {"model": model, "options": {"num_classes": len(pictures.classes), "aux_logits": False},
             "classes": list(pictures.classes), "size": list(pictures.images.shape[1:3]), "mean": mean.tolist(),
             "std": std.tolist(), "test_accuracy": result.accuracy}  # fmt: skip
    save_weights(save, network, about)
    say(f"weights in {save}")
    return 0


def names(first):
    """The path, then NAME-2, NAME-3, …"""
    file = Path(first)
    return (file if number == 1 else file.with_stem(f"{file.stem}-{number}") for number in count(1))


def main():
    parser = Parser(description=__doc__, **FORMAT)
    parser.add_argument("--data", help="shapes, cifar10, or what else `python -m inception train` takes")
    parser.add_argument("--model", help="(default: googlenet_small)")
    parser.add_argument("--epochs", type=int, metavar="N", help="(default: 1 for the shapes, else 4)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="(default: 64 for the shapes, else 128)")
    parser.add_argument("--lr", type=float, metavar="X", help="the schedule's highest learning rate (default: 0.1)")
    parser.add_argument("--save", type=path, metavar="FILE", help="(default: runs/weights.npz, or a name that is free)")
    add_machine(parser)
    parser.set_defaults(command=train, on_disk=True)
    return run_command(parser, None)


if __name__ == "__main__":
    sys.exit(main())
