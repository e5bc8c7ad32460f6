"""Reads the furniture libraries: zip archives with a catalogue, models and pictures."""

from __future__ import annotations

import fnmatch
import re
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from upbench.errors import UpbenchError

LIBRARIES = {"A": "BlendSwap-CC-0", "B": "BlendSwap-CC-BY", "K": "KatorLegaz", "S": "Scopia"}
"""Letter of a model code -> name of the library's file, without `.sh3f`."""


@dataclass(frozen=True)
class Entry:
    """A model as the catalogue lists it; lengths in metres.

    Attributes:
        code: Letter of the library and number in it.
        name, creator: In the catalogue's words.
        path: Of the OBJ file in the archive.
        size: Width, depth, height.
        rotation: `[3, 3]`, applied to the model's own axes (y up) first.
        top: Height of the surface that carries things.
    """

    code: str
    name: str
    creator: str
    path: str
    size: tuple[float, float, float]
    rotation: np.ndarray
    top: float


class Library:
    """One `.sh3f` file."""

    def __init__(self, letter: str, folder: Path) -> None:
        self.letter = letter
        path = folder / f"{LIBRARIES[letter]}.sh3f"
        if not path.is_file():
            raise UpbenchError(f"{path} is missing: it belongs to the Debian package sweethome3d-furniture")
        self.archive = zipfile.ZipFile(path)
        self.members = frozenset(self.archive.namelist())

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every model, by its code."""
        text = self.archive.read("PluginFurnitureCatalog.properties").decode("latin1")
        fields: dict[int, dict[str, str]] = {}
        for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.MULTILINE):
            fields.setdefault(int(number), {})[key] = value.strip()
        return {
            f"{self.letter}{number}": self._entry(number, found) for number, found in sorted(fields.items())
        }

    def _entry(self, number: int, fields: dict[str, str]) -> Entry:
        width, depth, height = (float(fields[key]) / 100 for key in ("width", "depth", "height"))
        rotation = np.eye(3)
        if "modelRotation" in fields:
            rotation = np.array([float(x) for x in fields["modelRotation"].split()]).reshape(3, 3)
        return Entry(
            code=f"{self.letter}{number}",
            name=fields["name"],
            creator=fields.get("creator", ""),
            path=fields["model"].lstrip("/"),
            size=(width, depth, height),
            rotation=rotation,
            top=float(fields["dropOnTopElevation"]) / 100 if "dropOnTopElevation" in fields else height,
        )

    def read(self, path: str) -> bytes:
        """A member of the archive."""
        return self.archive.read(path)

    def find(self, pattern: str) -> str:
        """Path of the first member whose file name matches `pattern` (case ignored)."""
        names = sorted(
            m for m in self.members if fnmatch.fnmatch(PurePosixPath(m).name.lower(), pattern.lower())
        )
        if not names:
            raise UpbenchError(f"{LIBRARIES[self.letter]}.sh3f has no file '{pattern}'")
        return names[0]

    def beside(self, model_path: str, name: str) -> str | None:
        """The picture that a material of `model_path` means by `name`.

        Authors left absolute paths of their own machines: only the last part counts, and where no picture of
        that name is beside the model but exactly one other is, it is that one.
        """
        folder = PurePosixPath(model_path).parent
        wanted = str(folder / name.replace("\\", "/").split("/")[-1])
        if wanted in self.members:
            return wanted
        pictures = [
            member
            for member in self.members
            if PurePosixPath(member).parent == folder and member.lower().endswith((".jpg", ".jpeg", ".png"))
        ]
        return pictures[0] if len(pictures) == 1 else None


class Catalogue:
    """All libraries."""

    def __init__(self, folder: Path) -> None:
        self.libraries = {letter: Library(letter, folder) for letter in LIBRARIES}

    def entry(self, code: str) -> Entry:
        """The catalogue's entry of a model code.

        Raises:
            UpbenchError: no library has it.
        """
        try:
            return self.libraries[code[0]].entries[code]
        except KeyError:
            raise UpbenchError(f"the furniture libraries have no model '{code}'") from None
