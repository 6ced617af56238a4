"""Int8 files with weights of 7 and of 8 bits: top-1 in every engine on this processor, and of the graph itself.

    python benchmarks/int8_range.py --data cifar10

The graph is ONNX Runtime with its optimisations switched off, which computes with the int8 values in float: what
engines give where nothing overflows. Quantises the network in the package as ``efficientformer quantize`` does, on 300
training pictures, and measures on the test pictures. Writes the figures into benchmarks/results.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from common import save

from efficientformer.export.calibration import Pictures, gather_pictures
from efficientformer.export.deployable import deployable
from efficientformer.export.qdq import Quantiser
from efficientformer.runtime.engines import installed_engines, open_engine
from efficientformer.spec.zoo import EMBEDDED

BATCH = 50


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 in class folders, train/ and test/")
    parser.add_argument("--holdout", type=int, default=10_000)
    options = parser.parse_args()
    source = deployable(EMBEDDED)
    reference = open_engine(source, "onnxruntime", precision="fp32")
    pictures = gather_pictures(options.data, reference.manifest, 300, options.holdout, 0, None)
    figures: dict[str, object] = {"single precision": top1(reference.run, pictures)}
    for bits, signed in itertools.product((7, 8), (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantiser = Quantiser(source, pictures.calibration, signed=signed, weight_bits=bits)
            quantiser.write(path, reference.manifest)
            found = {"graph": top1(graph(path), pictures)}
            found |= {name: top1(open_engine(path, name).run, pictures) for name in installed_engines()}
        name = f"{bits} bits{', for OpenVINO' if signed else ''}"
        figures[name] = found
        print(name, found)
    print(save("int8-range", figures, ("efficientformer", "onnxruntime", "openvino")))


def graph(path: Path) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    """Return what runs a file's graph as it is written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})[0]


def top1(run: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]], pictures: Pictures) -> float:
    """Return top-1 on the held-out pictures in percent."""
    x = pictures.held_out
    said = np.concatenate([run(x[i : i + BATCH]).argmax(1) for i in range(0, len(x), BATCH)])
    return round(100 * float((said == pictures.labels).mean()), 2)


if __name__ == "__main__":
    main()
