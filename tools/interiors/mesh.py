"""Furniture models to meshes that Mitsuba reads: metres, z up, front to -y, base at z = 0, centred."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .assets import write_atomic
from .catalogue import Catalogue, Entry, Library

CREASE_DEGREES = 40.0
"""Faces that meet at less than this share a smooth normal. The files' own normals are often averaged over
sharp edges, which bends flat boards."""

MAX_SHARED_CORNERS = 64
"""Where more triangles meet in a point (the tip of a cone), they stay flat: the comparison is quadratic."""

MAX_TEXTURE_COORDINATE = 200.0
"""Some files have texture coordinates of 3e9; a look-up there reads pixels of 1e16."""

_VERSION = "1"
_TO_Z_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])


@dataclass(frozen=True)
class Part:
    """Triangles of one material: its mesh file, and what the model's material file says."""

    ply: Path
    material: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A converted model: parts, size (width, depth, height in metres), height of its top, share of glass."""

    code: str
    parts: tuple[Part, ...]
    size: tuple[float, float, float]
    top: float
    transparent_share: float


class ModelStore:
    """Converts models on first use and keeps the meshes in a cache folder."""

    def __init__(self, catalogue: Catalogue, cache: Path) -> None:
        self.catalogue = catalogue
        self.folder = cache / "models"
        self._loaded: dict[str, Model] = {}

    def load(self, code: str) -> Model:
        """The model of a code."""
        if code not in self._loaded:
            entry = self.catalogue.entry(code)
            key = hashlib.sha256(f"{_VERSION}/{entry.code}/{entry.path}".encode()).hexdigest()[:12]
            path = self.folder / f"{code}-{key}.json"
            if not path.is_file():
                description = _convert(entry, self.catalogue.libraries[code[0]], self.folder, f"{code}-{key}")
                write_atomic(path, json.dumps(description).encode())
            self._loaded[code] = self._model(entry, json.loads(path.read_text()))
        return self._loaded[code]

    def _model(self, entry: Entry, description: dict[str, Any]) -> Model:
        parts = tuple(Part(self.folder / p["ply"], p["material"]) for p in description["parts"])
        return Model(entry.code, parts, entry.size, entry.top, description["transparent_share"])


def _convert(entry: Entry, library: Library, folder: Path, stem: str) -> dict[str, Any]:
    obj = parse_obj(library.read(entry.path).decode("latin1"))
    materials: dict[str, dict[str, Any]] = {}
    for name in obj.material_files:
        path = str(PurePosixPath(entry.path).parent / name)
        if path in library.members:
            materials.update(parse_mtl(library.read(path).decode("latin1")))
    points = _place(obj, entry)
    parts = []
    area = transparent = 0.0
    for number, (name, faces) in enumerate(sorted(obj.faces.items())):
        triangles = points[faces[:, :, 0]]
        sizes = np.linalg.norm(
            np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1
        )
        faces, triangles, sizes = faces[sizes > 1e-14], triangles[sizes > 1e-14], sizes[sizes > 1e-14]
        if not len(faces):
            continue
        material = {**materials.get(name, {}), "name": name}
        picture = library.beside(entry.path, material.pop("map_kd")) if "map_kd" in material else None
        if picture is not None:
            material["texture"] = f"{library.letter}:{picture}"
        uv = _texture_coordinates(obj, faces) if picture and len(obj.uv) else box_map(triangles)
        data = ply_bytes(triangles, crease_normals(triangles), uv)
        if data is None:
            continue
        write_atomic(folder / f"{stem}-{number}.ply", data)
        parts.append({"ply": f"{stem}-{number}.ply", "material": material})
        area += sizes.sum()
        transparent += sizes.sum() if material.get("d", 1.0) < 0.95 else 0.0
    return {"parts": parts, "transparent_share": transparent / max(area, 1e-9)}


def _place(obj: ObjFile, entry: Entry) -> np.ndarray:
    """The model's points, turned and stretched to the catalogue's size, as Sweet Home 3D does it."""
    points = obj.points @ entry.rotation.T
    used = np.unique(np.concatenate([faces[:, :, 0].ravel() for faces in obj.faces.values()]))
    low, high = points[used].min(0), points[used].max(0)
    width, depth, height = entry.size
    points = (points - (low + high) / 2) * np.array([width, height, depth]) / np.maximum(high - low, 1e-9)
    placed: np.ndarray = points @ _TO_Z_UP.T
    placed[:, 2] += height / 2
    return placed


@dataclass
class ObjFile:
    """A parsed Wavefront OBJ: points, texture coordinates, triangles (`[T, 3 corners, (point, uv)]`) by
    material."""

    points: np.ndarray
    uv: np.ndarray
    faces: dict[str, np.ndarray]
    material_files: list[str]


def parse_obj(text: str) -> ObjFile:
    """Reads an OBJ file; polygons are cut into fans, negative indices count from the end, normals are
    ignored."""
    points: list[list[str]] = []
    uv: list[list[str]] = []
    faces: dict[str, list[tuple[tuple[int, int], ...]]] = {}
    material_files: list[str] = []
    material = "default"
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "v":
            points.append(words[1:4])
        elif words[0] == "vt":
            uv.append([*words[1:3], "0"][:2])
        elif words[0] == "usemtl":
            material = line.split(None, 1)[1].strip() if len(words) > 1 else "default"
        elif words[0] == "mtllib":
            material_files.append(line.split(None, 1)[1].strip())
        elif words[0] == "f":
            corners = [_corner(word, len(points), len(uv)) for word in words[1:]]
            fan = faces.setdefault(material, [])
            fan.extend((corners[0], corners[i], corners[i + 1]) for i in range(1, len(corners) - 1))
    return ObjFile(
        points=np.array(points, dtype=np.float64).reshape(-1, 3),
        uv=np.array(uv, dtype=np.float64).reshape(-1, 2),
        faces={name: np.array(fan, dtype=np.int64) for name, fan in faces.items() if fan},
        material_files=material_files,
    )


def _corner(word: str, n_points: int, n_uv: int) -> tuple[int, int]:
    parts = word.split("/")
    point = int(parts[0])
    uv = int(parts[1]) if len(parts) > 1 and parts[1] else 0
    return (point - 1 if point > 0 else n_points + point), (uv - 1 if uv > 0 else n_uv + uv if uv < 0 else -1)


def parse_mtl(text: str) -> dict[str, dict[str, Any]]:
    """Materials of an MTL file: kd, ks, ke (three numbers), ns, d (numbers), map_kd (a path), by name."""
    materials: dict[str, dict[str, Any]] = {}
    current: dict[str, Any] = {}
    for line in text.splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key = words[0].lower()
        if key == "newmtl":
            current = materials.setdefault(line.split(None, 1)[1].strip(), {})
        elif key in ("kd", "ks", "ke") and len(words) >= 4:
            current[key] = [float(x) for x in words[1:4]]
        elif key in ("ns", "d") and len(words) >= 2:
            try:
                current[key] = float(words[1].split("#")[0])
            except ValueError:
                continue
        elif key == "map_kd" and len(words) >= 2:
            current[key] = line.split(None, 1)[1].strip()
    return materials


def _texture_coordinates(obj: ObjFile, faces: np.ndarray) -> np.ndarray:
    index = faces[:, :, 1]
    uv = np.where(index[..., None] >= 0, obj.uv[np.maximum(index, 0)], 0.0)
    uv[..., 1] = 1 - uv[..., 1]
    broken = (np.abs(uv) >= MAX_TEXTURE_COORDINATE).any(axis=(1, 2), keepdims=True)
    return np.where(broken, 0.0, uv)


def box_map(triangles: np.ndarray) -> np.ndarray:
    """Texture coordinates in metres, each triangle projected along the axis that it faces most: `[T, 3,
    2]`."""
    normal = np.abs(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]))
    axis = normal.argmax(1)
    u, v = np.array([1, 0, 0])[axis], np.array([2, 2, 1])[axis]
    rows = np.arange(len(triangles))[:, None]
    corners = np.arange(3)[None]
    return np.stack([triangles[rows, corners, u[:, None]], triangles[rows, corners, v[:, None]]], axis=-1)


def crease_normals(triangles: np.ndarray, degrees: float = CREASE_DEGREES) -> np.ndarray:
    """Corner normals `[T, 3, 3]`: area-weighted over the faces around a point that are within the crease
    angle."""
    face = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    unit = face / np.maximum(np.linalg.norm(face, axis=1, keepdims=True), 1e-20)
    _, point = np.unique(
        np.round(triangles.reshape(-1, 3) * 1e5).astype(np.int64), axis=0, return_inverse=True
    )
    order = np.argsort(point.ravel(), kind="stable")
    counts = np.bincount(point.ravel())
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    face_of = np.repeat(np.arange(len(triangles)), 3)
    normals: np.ndarray = unit[face_of].copy()
    cosine = np.cos(np.radians(degrees))
    for count in np.unique(counts):  # all points with the same number of corners at once
        if not 1 < count <= MAX_SHARED_CORNERS:
            continue
        corners = order[starts[counts == count][:, None] + np.arange(count)]
        units, faces = unit[face_of[corners]], face[face_of[corners]]
        near = units @ units.transpose(0, 2, 1) > cosine
        total = near @ faces
        length = np.linalg.norm(total, axis=-1, keepdims=True)
        normals[corners] = np.where(length > 1e-20, total / np.maximum(length, 1e-20), units)
    return normals.reshape(-1, 3, 3)


def ply_bytes(triangles: np.ndarray, normals: np.ndarray, uv: np.ndarray) -> bytes | None:
    """A binary PLY file with identical corners welded; None where no triangle is left."""
    corners = np.concatenate([triangles.reshape(-1, 3), normals.reshape(-1, 3), uv.reshape(-1, 2)], axis=1)
    vertices, index = np.unique(corners.astype("<f4"), axis=0, return_inverse=True)
    faces = index.reshape(-1, 3)
    a, b, c = faces.T
    faces = faces[(a != b) & (b != c) & (a != c)]
    if not len(faces):
        return None
    rows = np.empty(len(faces), dtype=[("count", "u1"), ("index", "<i4", 3)])
    rows["count"], rows["index"] = 3, faces
    properties = "".join(f"property float {name}\n" for name in ("x", "y", "z", "nx", "ny", "nz", "u", "v"))
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\n{properties}"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    out = io.BytesIO()
    for block in (header.encode(), vertices.tobytes(), rows.tobytes()):
        out.write(block)
    return out.getvalue()
