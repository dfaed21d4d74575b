#!/usr/bin/env python3
"""A network of your own: Inception modules for 64×64 pictures and 5 classes, trained on a folder of pictures, saved,
loaded again, used.

python examples/own_network.py                # on pictures drawn here, in a temporary folder
python examples/own_network.py --data DIR     # on yours: DIR/train/CLASS/PICTURE and DIR/test/CLASS/PICTURE
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np
from subject import near_chance, told

from inception.data import DataError, Loader, load_shapes, mean_and_std, normalise, open_data
from inception.models import create_model, register
from inception.models.blocks import conv, max_pool
from inception.models.googlenet import POOL, Row, rows
from inception.models.network import Form, InputSize, Step
from inception.training import RECIPES, evaluate, to_tensor, train
from inception.weights import load_model, save_weights
from minigrad import no_grad

# fmt: off
TABLE: list[Row | str] = [  # halved to 32×32 by the stem, to 16×16 before 4a
    #   name  1×1  r3×3  3×3  r5×5  5×5  pool  out
    Row("3a",  8,   8,   16,   4,    8,   8,   40),
    POOL,
    Row("4a", 16,  16,   32,   8,   16,  16,   80),
    Row("4b", 16,  16,   32,   8,   16,  16,   80),
]
# fmt: on
MINE = Form(
    name="mine",
    about="three Inception modules for pictures of 64×64",
    size=InputSize(64, least=16),
    steps=rows([Step("conv1", conv(16, 3, 2), 16)], TABLE, max_pool(3, 2)),
    classes=5,
)
register(MINE)  # from here on create_model, load_model and the command line called from this program know "mine"


def draw(folder: Path, pictures: int) -> None:
    """Shapes of five classes, told apart by outline alone, enlarged to 64×64: folder/train/disc/0.png and so on."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise DataError("pictures need Pillow: pip install pillow") from None
    for part, data in zip(("train", "test"), load_shapes(pictures, 200), strict=True):
        for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
            path = folder / part / data.classes[label].split()[1] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder of pictures, or as for training (default: shapes are drawn into one)")
    parser.add_argument("--pictures", type=int, default=3000, help="to draw for training, without --data (%(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over them (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/own_network/mine.npz"), help="weights (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or temporary
        if options.data is None:
            draw(Path(folder), options.pictures)
            print(f"{options.pictures:,} pictures drawn")
        train_set, test_set = open_data(folder, size=64)
        mean, std = mean_and_std(train_set)
        model = create_model("mine", num_classes=len(train_set.classes))
        print(f"mine: {sum(p.size for p in model.parameters()):,} parameters, classes {', '.join(train_set.classes)}")
        recipe = dataclasses.replace(
            RECIPES["shapes"], epochs=options.epochs, batch_size=32, optimizer="adamw", lr=0.01
        )
        train(model, Loader(train_set, 32, mean=mean, std=std, shuffle=True, drop_last=True), recipe)
        size = list(train_set.images.shape[1:3])
        about = {"model": "mine", "options": {"num_classes": len(train_set.classes)}, "size": size,
                 "classes": list(train_set.classes), "mean": mean.tolist(), "std": std.tolist()}  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save_weights(options.out, model, about)

        loaded, about = load_model(options.out)  # as another program would, after it has registered the same form
        accuracy = evaluate(loaded, Loader(test_set, 100, mean=mean, std=std), quiet=True).accuracy
        print(f"saved as {options.out}, loaded again: {accuracy:.1%} of {len(test_set)} test pictures recognised"
              + near_chance(accuracy, len(train_set.classes), len(test_set)))  # fmt: skip
        for row in np.linspace(0, len(test_set) - 1, 5).astype(int):  # five of them, from the first to the last
            with no_grad():
                logits = loaded(to_tensor(normalise(test_set.images[row][None], mean, std))).data
            said, right = (about["classes"][k] for k in (int(np.argmax(logits)), test_set.labels[row]))
            print(f"  test picture {row}, {right}: {said}")


if __name__ == "__main__":
    sys.exit(told(main))
