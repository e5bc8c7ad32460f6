"""Packs rendered scenes into what the repository ships: a few zip files and an index for each split.

    python -m tools.interiors.pack RENDERED [--out DIR]

`RENDERED` is a folder that `tools.interiors` wrote: `<split>.jsonl` and, in `<split>/`,
four files a scene.
The result has the same indices, with the zip file of each scene in them, and can be read in its place.
Zip files, because some 600 small files make a slow checkout and a slow installation; stored, because JPEG and
PNG are compressed already; in shards, because one changed scene should not replace twenty megabytes of
history. Scenes that were looked at and found faulty (`dropped.json`) are left out. The same input gives the
same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upbench.datasets.interiors.files import DATA_DIR, SPLITS, SUFFIXES
from upbench.errors import UpbenchError

DROPPED_FILE = Path(__file__).parent / "dropped.json"
"""Seeds that were rendered and found faulty, each with its reason."""

SHARD_BYTES = 4_500_000
INDEX_KEYS = (
    "seed", "kind", "environment", "fov_deg", "intrinsics", "size", "spp", "models", "classes", "void",
    "depth",
)  # fmt: skip
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed time, so that the same scenes give the same zip file


def dropped_seeds(path: Path = DROPPED_FILE) -> dict[int, str]:
    """Seeds that were rendered and found faulty, each with its reason."""
    return {int(seed): reason for seed, reason in json.loads(path.read_text()).items()}


def read_index(root: Path, split: str) -> list[dict[str, Any]]:
    """The index lines of a rendered split, in the order of their seeds; a seed's last line counts."""
    path = root / f"{split}.jsonl"
    if not path.is_file():
        raise UpbenchError(f"no rendered split '{split}' in {root}: {path} is missing")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    by_seed = {line["seed"]: line for line in lines}
    return [by_seed[seed] for seed in sorted(by_seed)]


def pack_split(root: Path, split: str, out: Path, limit: int | None = None) -> dict[str, int]:
    """Writes `<split>.jsonl` and `<split>-NN.zip` into `out`; returns the number of scenes, shards and
    bytes."""
    dropped = dropped_seeds()
    scenes = [scene for scene in read_index(root, split) if scene["seed"] not in dropped][:limit]
    index: list[dict[str, Any]] = []
    shards = list(_shards(root / split, scenes))
    for number, shard in enumerate(shards):
        name = f"{split}-{number:02d}.zip"
        with zipfile.ZipFile(out / name, "w", zipfile.ZIP_STORED) as archive:
            for scene in shard:
                for suffix in SUFFIXES:
                    data = (root / split / f"{scene['seed']}{suffix}").read_bytes()
                    archive.writestr(zipfile.ZipInfo(f"{scene['seed']}{suffix}", _EPOCH), data)
                    if suffix == ".jpg":
                        digest = hashlib.sha256(data).hexdigest()
                line = {key: scene[key] for key in INDEX_KEYS}
                index.append({**line, "shard": name, "image_sha256": digest})
    (out / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in index))
    size = sum(path.stat().st_size for path in out.glob(f"{split}[.-]*"))
    return {"scenes": len(index), "shards": len(shards), "bytes": size}


def _shards(folder: Path, scenes: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Cuts scenes into runs of about equal size, each of about `SHARD_BYTES` or less."""
    sizes = [
        sum((folder / f"{scene['seed']}{suffix}").stat().st_size for suffix in SUFFIXES) for scene in scenes
    ]
    count = max(1, math.ceil(sum(sizes) / SHARD_BYTES))
    shards: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    before = 0
    for scene, size in zip(scenes, sizes, strict=True):
        shards[min(count - 1, before * count // sum(sizes))].append(scene)
        before += size
    yield from (shard for shard in shards if shard)


def pack(root: Path, out: Path, limits: dict[str, int] | None = None) -> dict[str, dict[str, int]]:
    """Packs every split of `root` and puts the result in the place of `out`, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".pack-", dir=out.parent))
    try:
        sums = {}
        for split in SPLITS:
            sums[split] = pack_split(root, split, staging, (limits or {}).get(split))
        os.chmod(staging, 0o755)
        if out.exists():
            shutil.rmtree(out)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sums


def main(argv: list[str] | None = None) -> int:
    """Command line: packs a rendered folder and prints what it made."""
    parser = argparse.ArgumentParser(prog="python -m tools.interiors.pack", description=__doc__)
    parser.add_argument("rendered", type=Path, help="folder that the renderer wrote")
    parser.add_argument(
        "--out", type=Path, default=DATA_DIR, help="folder to replace (default: the package's data)"
    )
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="SPLIT=N",
        help="take only the first N scenes of a split",
    )
    args = parser.parse_args(argv)
    limits = {split: int(count) for split, _, count in (item.partition("=") for item in args.limit)}
    try:
        sums = pack(args.rendered, args.out, limits)
    except (UpbenchError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for split, numbers in sums.items():
        megabytes = numbers["bytes"] / 1e6
        print(f"{split}: {numbers['scenes']} scenes, {numbers['shards']} shards, {megabytes:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
