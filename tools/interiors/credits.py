"""Writes `NOTICE.md`: whose models are in the packed scenes.

python -m tools.interiors.credits > upbench/datasets/interiors/NOTICE.md
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from upbench.datasets.interiors.files import DATA_DIR, SPLITS
from upbench.errors import UpbenchError

from .assets import locate
from .catalogue import LIBRARIES, Catalogue

LICENCES = {
    "A": "CC0 1.0, https://creativecommons.org/publicdomain/zero/1.0/ (credit is not required)",
    "B": "CC BY 3.0, https://creativecommons.org/licenses/by/3.0/",
    "K": "CC BY 3.0 US, https://creativecommons.org/licenses/by/3.0/us/",
    "S": "CC BY 3.0, https://creativecommons.org/licenses/by/3.0/",
}
OWNERS = {
    "A": "models by the contributors below, published on Blend Swap; converted by Emmanuel Puybaret / eTeks",
    "B": "models by the contributors below, published on Blend Swap; converted by Emmanuel Puybaret / eTeks",
    "K": "Andrew Kator and Jennifer Legaz",
    "S": "Emmanuel Puybaret / eTeks (info@eteks.com) and Scopia Visual Interfaces Systems, s.l. "
    "(http://www.scopia.es)",
}
HEAD = """# Credits of the dataset `interiors`

The images, labels, depth and normals in `data/` are renderings made by `tools.interiors`.
They show three-dimensional models and textures by the people below. The models were scaled, recoloured, given
other textures and placed into rooms; nobody named here endorses the result. Neither models nor textures are
redistributed. The renderings may be used under CC BY 3.0, naming the upbench developers and the authors
below.

## Furniture and objects

From the furniture libraries of Sweet Home 3D (Debian package `sweethome3d-furniture`); wood, fabric, stone
and wallpaper on walls, floors and furniture are pictures that come with the same libraries.
"""
TAIL = """
## Light and pictures

- Environments: the HDR images of the npm package `@pmndrs/assets` (CC0 1.0), which come from Poly Haven (CC0
1.0). - Brick: scikit-image's `brick`, from CC0Textures (CC0 1.0).
- Framed pictures: scikit-image's `coffee` (Rachel Michetti, CC0), `chelsea` (Stefan van der Walt, CC0),
  `rocket` (SpaceX, public domain), `astronaut` and `hubble_deep_field` (NASA, public domain).
"""


def used_codes(data: Path = DATA_DIR) -> list[str]:
    """Codes of all library models in the packed scenes, sorted by library and number."""
    codes = {
        code
        for split in SPLITS
        for line in (data / f"{split}.jsonl").read_text().splitlines()
        for code in json.loads(line)["models"]
        if ":" not in code
    }
    return sorted(codes, key=lambda code: (code[0], int(code[1:])))


def notice(catalogue: Catalogue, codes: list[str]) -> str:
    """The text of `NOTICE.md` for the models of `codes`."""
    sections = [HEAD]
    for letter, library in LIBRARIES.items():
        entries = [catalogue.entry(code) for code in codes if code[0] == letter]
        by_creator: dict[str, list[str]] = defaultdict(list)
        for entry in entries:
            by_creator[entry.creator or "unnamed"].append(f"{entry.name} ({entry.code})")
        sections.append(f"\n### {library}\n\n{LICENCES[letter]}; {OWNERS[letter]}.\n\n")
        sections += [
            f"- {name}: {', '.join(by_creator[name])}\n" for name in sorted(by_creator, key=str.lower)
        ]
    return "".join([*sections, TAIL])


def main() -> int:
    """Prints the notice; exit code 2 if the libraries are missing."""
    try:
        sys.stdout.write(notice(Catalogue(locate().furniture), used_codes()))
    except (UpbenchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
