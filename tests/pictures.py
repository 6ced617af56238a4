"""Small labelled pictures made up for tests: each class has a colour, so that a network can learn them."""

import numpy as np
from PIL import Image

COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def write_folders(root, per_class=12, size=16, seed=0, suffix=".png"):
    """Write ROOT/CLASS/n.png: noise around the colour of the class; returns ``root``."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            noise = rng.integers(-40, 40, (size, size, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:03d}{suffix}")
    return root
