"""Parameters and FLOPs of RaysUp's guidance encoders, exactly, in a second: nothing is run.

    python benchmarks/raysup_claims.py

FLOPs are counted as the paper's 10.17 and 40.67 G are: 2 x (multiply-adds + biases) of the encoder's
convolutions, for an image of 224 and of 448 pixels. Normalisations, positions and attention are in none of
these numbers; `upbench profile --methods raysup,anyup` counts (as MACs) and times the whole method.
"""

from __future__ import annotations

import sys

from torch import nn

from upbench.cli.inventory.listing import as_text
from upbench.weights.load import load_method

VARIANTS = (
    *({"encoder": name} for name in ("decoupled", "parallel", "multi", "dual", "single")),
    *({"position": name} for name in ("rope", "sinrays", "none")),
)
SIZES = (224, 448)


def main() -> int:
    """Prints the table."""
    anyup = sum(p.numel() for p in load_method("anyup", "none").parameters())
    rows = []
    for options in VARIANTS:
        method = load_method("raysup", "none", **options)
        parameters = sum(p.numel() for p in method.parameters())
        convolutions = [m for m in method.encoder.modules() if isinstance(m, nn.Conv2d)]
        per_pixel = sum(c.weight.numel() + c.out_channels for c in convolutions)
        flops = {f"GFLOPs at {n}": f"{2 * per_pixel * n * n / 1e9:.2f}" for n in SIZES}
        variant = ", ".join(f"{name}={value}" for name, value in options.items())
        share = f"{100 * parameters / anyup:.1f} %"
        rows.append(
            {"raysup": variant, "parameters": f"{parameters:,}", f"of AnyUp's {anyup:,}": share, **flops}
        )
    print(as_text(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
