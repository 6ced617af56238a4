"""Averages the weights of two checkpoints of one network: a point between them, to train on from.

    python tools/average.py FIRST.safetensors SECOND.safetensors BETWEEN.safetensors --share 0.75 --data DIR

With ``--data``, BatchNorm's statistics are estimated on its training pictures: those of neither network are right for
the weights between them.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from efficientformer.data.sources import open_source
from efficientformer.models.network import EfficientFormer
from efficientformer.slimming.judge import Pictures, estimate_statistics
from efficientformer.spec.errors import UsageError
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.weights.checkpoint import load_checkpoint, save_native
from efficientformer.weights.pretrained import build

PICTURES = 16_384


def average(first: Path, second: Path, share: float, output: Path, data: Path | None) -> None:
    """Write ``share`` of the first checkpoint plus the rest of the second; all else is the first's.

    Raises:
        UsageError: If they hold different networks.
    """
    one, other = load_checkpoint(first), load_checkpoint(second)
    if one.manifest is None or one.spec != other.spec:
        raise UsageError("Cannot average", expected="two checkpoints of this package of one network", found=str(second))
    network = build(one.spec, one)
    mixed = {
        name: (share * value.double() + (1 - share) * other.state[name].double()).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in network.state_dict().items()
    }
    network.load_state_dict(mixed)
    if data is not None:
        estimate(network, one.manifest.preprocess, data)
    # the figures of the first are not those of the average
    save_native(output, network.state_dict(), dataclasses.replace(one.manifest, metrics={}))


def estimate(network: EfficientFormer, preprocess: PreprocessSpec, data: Path) -> None:
    """Estimate BatchNorm's statistics on training pictures, drawn at random (seed 0)."""
    source = open_source(data, "train")
    chosen = np.random.default_rng(0).permutation(len(source))[:PICTURES]
    images = [source.image(int(index), preprocess) for index in chosen]
    estimate_statistics(network, Pictures(images, source.labels[chosen], preprocess), torch.device("cpu"))


def main() -> None:
    """Average two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the first")
    parser.add_argument("--data", type=Path, help="a data set whose training pictures BatchNorm's statistics are of")
    options = parser.parse_args()
    average(options.first, options.second, options.share, options.output, options.data)


if __name__ == "__main__":
    main()
