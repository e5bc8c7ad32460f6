"""Peak memory of one forward on the CPU, output included, in a fresh process per row.

    python benchmarks/forward_memory.py [--methods raysup,anyup] [--large]

The sizes are those of the project's promises: 448 to 448 pixels (the output alone is 308 MB), and with
`--large` 224 pixels of image to 1024 x 1024 (1.6 GB of output), each with 384 channels and one image.
"""

from __future__ import annotations

import argparse

import torch

from upbench.contracts.upsampler import Sizes
from upbench.cost.peakmemory import cpu_peak_memory
from upbench.weights.load import load_method

STANDARD = Sizes(384, (448, 448), (32, 32), (448, 448))
LARGE = Sizes(384, (224, 224), (16, 16), (1024, 1024))


def main() -> None:
    """Prints one line per method and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", default="raysup,anyup")
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.methods.split(","):
        method = load_method(name, weights="none")
        for sizes in (STANDARD, LARGE)[: 1 + arguments.large]:
            peak = cpu_peak_memory(method, sizes, torch.float32)
            shown = "none" if peak.bytes is None else f"{peak.bytes / 1e9:.2f} GB"
            image, output = ("x".join(map(str, size)) for size in (sizes.image_size, sizes.output_size))
            print(f"{name:8s} {image} -> {output}: {shown}  ({peak.how})", flush=True)


if __name__ == "__main__":
    main()
