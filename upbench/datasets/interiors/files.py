"""Names of the files that the renderer writes, the packer packs and the loader reads."""

from __future__ import annotations

from pathlib import Path

SPLITS = ("train", "val", "val_heldout")
SUFFIXES = (".jpg", "_label.png", "_depth.png", "_normal.png")
"""Files of a scene, after its seed: image, raw labels, depth in millimetres, normals as `127 n + 128`."""

DATA_DIR = Path(__file__).parent / "data"
"""The packed scenes that come with the package."""
