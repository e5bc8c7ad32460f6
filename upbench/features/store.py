"""Low-resolution features of a split: computed once, kept in shards on disk, read image by image.

    store = FeatureStore(backbone, images, device="cuda")
    store.prepare()                     # computes what is not on disk yet
    features = store.batch([3, 1, 4])   # [3, C, h, w]
    store.moments().covariance          # summed while the features were written; reads none of them

A store is a folder of the cache: `store.json`, shards of consecutive images (`00000.safetensors`, ...; see
`upbench.features.shards`) and `moments.safetensors`. Memory holds a batch while features are computed, and
what is asked for when they are read. A process that is killed leaves whole shards, and the next one goes on
after the last of them. Several processes may use a store at once: one computes, the others wait for it.
Images come in order, so a store of a split serves each of its prefixes (`--limit`), and a short store grows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path
from typing import TypeVar

import timm
import torch
from torch import Tensor

from upbench.contracts.backbone import Backbone
from upbench.errors import UpbenchError, unknown
from upbench.features.arena import Arena
from upbench.features.backbones import load_backbone
from upbench.features.extraction import Extractor, Images
from upbench.features.moments import Moments, RunningMoments, chained
from upbench.features.shards import DTYPES, Damaged, Format, Layout, Shape, Shard, ShardWriter, alone
from upbench.system.cache import cache_dir, replacing, safe_name
from upbench.system.progress import Bar, bar, say
from upbench.system.sources import code_digest

VERSION = 2
"""Rises with every change of this module that changes features or files."""

RESERVE = 1_000_000_000
"""Bytes of disk that are left free."""

T = TypeVar("T")


class FeatureStore:
    """Features of a split by a backbone.

    All that reads features or moments computes first what is missing, as `prepare` does. Features that are
    found to be damaged are said to be and computed again.

    Attributes:
        names: Names of the images.
        folder: Where the files are.
        device: Where features are computed and given.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        *,
        dtype: str = "float32",
        cls_token: bool = False,
        device: str | torch.device = "cpu",
        batch_size: int = 8,
        memory: float = 512e6,
        workers: int | None = None,
    ) -> None:
        """
        Args:
            backbone: It is moved to `device` when features are computed.
            images: Where the images come from.
            dtype: What features are stored as, "float32" or "float16"; they are computed in float32.
            cls_token: Whether class tokens are kept, too; the backbone must have `with_token`.
            device: Where to compute, and where features are given.
            batch_size: Images at a time.
            memory: Features of at most so many bytes, all images together, are kept once they are read.
            workers: Threads that read images; 0 for none. By default one a core, at most four.

        Raises:
            UpbenchError: An unknown dtype, no images, a backbone without class tokens, or a cache folder
                that cannot be created.
        """
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        if cls_token and not callable(getattr(backbone, "with_token", None)):
            raise UpbenchError(f"backbone '{backbone.name}' gives no class token")
        self.names = tuple(images.name(index) for index in range(len(images)))
        if not self.names:
            raise UpbenchError(f"{images.title} has no images")
        self.device = torch.device(device)
        self._memory, self._channels = memory, backbone.channels
        self._arena = Arena(memory)
        self._what = f"features of {images.title} by {backbone.name}"
        about = {
            "format": f"upbench features {VERSION}",
            "backbone": backbone.name,
            "fingerprint": backbone.fingerprint,
            "stride": str(backbone.stride),
            "images": images.key,
            "code": code_digest(type(backbone), load_backbone, Extractor, RunningMoments),
            "device": self.device.type,
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
        parts = [*about.values(), dtype, str(cls_token)]
        store = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        self._format = Format(store, dtype, cls_token, about)
        self._extractor = Extractor(backbone, images, self._format, self.device, batch_size, workers)
        readable = safe_name(f"{backbone.name}-{images.title}-{dtype}")[:150]
        self.folder = cache_dir("features", f"{readable}-{store}")
        exact = self.device.type in ("cpu", "cuda")  # others know no float64
        self._sums_device = self.device if exact else torch.device("cpu")
        self._per_shard = 0
        self._shards: list[Shard] = []
        self._nbytes = 0
        self._kept: dict[int, Tensor] = {}
        self._moments: Moments | None = None

    def __len__(self) -> int:
        return len(self.names)

    def prepare(self) -> None:
        """Computes the features that are not on disk yet, and says before how large all will be.

        Where nothing is missing, it reads headers only. Another process that is computing them is waited for.

        Raises:
            UpbenchError: A disk that is too small or read-only, or features that are not finite, or too
                large for float16. What the images' reader raises comes as it is.
        """
        if self._shards:
            return
        layout = Layout.load(self._layout_path, self._format)
        if layout is not None:
            self._per_shard = layout.per_shard
            shards = self._scan()
            if not self._missing(shards):
                self._use(shards)
                return
        self._fill()

    def on_disk(self) -> int:
        """How many of these images are there already; nothing is computed."""
        layout = Layout.load(self._layout_path, self._format)
        if layout is None:
            return 0
        self._per_shard = layout.per_shard
        return len(self) - sum(len(missing) for missing in self._missing(self._scan()).values())

    @property
    def nbytes(self) -> int:
        """Bytes of the features (and class tokens) of these images on disk."""
        self.prepare()
        return self._nbytes

    def shape(self, index: int) -> Shape:
        """(C, h, w) of an image, without reading its features."""
        number, position = self._place(index)
        return self._shards[number].shapes[position]

    def features(self, index: int) -> Tensor:
        """Features of an image: `[C, h, w]` float32 on `device`, the caller's own.

        Raises:
            UpbenchError: As `prepare`, and a disk that does not keep what is written.
        """
        return self.batch([index])[0]

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Features of images of one size: `[B, C, h, w]` float32 on `device`, the caller's own.

        Raises:
            UpbenchError: No images, or images of several sizes; else as `features`.
        """
        shapes = {self.shape(index): index for index in reversed(indices)}
        if len(shapes) != 1:
            sizes = ", ".join(f"'{self.names[index]}' {list(shape)}" for shape, index in shapes.items())
            raise UpbenchError(f"no batch of features of several sizes: {sizes or 'no images'}")
        (shape,) = shapes
        pinned = self.device.type == "cuda"
        out = torch.empty(len(indices), *shape, dtype=DTYPES[self._format.dtype], pin_memory=pinned)
        for one, index in zip(out, indices, strict=True):
            self._into(one, index)
        return out.to(self.device, non_blocking=True).float()

    def token(self, index: int) -> Tensor:
        """Class token of an image: `[C]` float32 on `device`.

        Raises:
            UpbenchError: The store has none; else as `features`.
        """
        if not self._format.token:
            raise UpbenchError(f"{self._what} are stored without class tokens")
        return self._reading(index, Shard.token).to(self.device).float()

    def moments(self) -> Moments:
        """Sums over exactly these images' features as they are stored, on the CPU, the caller's own.

        They were summed while the features were written. Only where the store on disk holds more images than
        this one, or its sums are damaged, features are read, once.

        Raises:
            UpbenchError: As `features`.
        """
        if self._moments is None:
            self.prepare()
            saved = self._saved_moments(self._shards, len(self))
            running = saved or self._no_moments()
            if running.images < len(self):
                with bar(f"moments of {self._what}", len(self), running.images) as progress:
                    for index in range(running.images, len(self)):
                        running.add(*self._reading(index, _stored))
                        progress.advance()
                if saved is not None:
                    with suppress(UpbenchError):  # a read-only cache: they are right, and not kept
                        running.save(self._moments_path, self._format.store)
            self._moments = running.moments()
        return self._moments.copy()

    # Reading

    def _into(self, out: Tensor, index: int) -> None:
        """Puts an image's features into a part of a batch."""
        kept = self._kept.get(index)
        if kept is not None:
            out.copy_(kept)
            return
        self._reading(index, lambda shard, position: shard.read(position, out))
        if self._nbytes <= self._memory and (copies := self._arena.keep([out])) is not None:
            (self._kept[index],) = copies

    def _place(self, index: int) -> tuple[int, int]:
        """Number of an image's shard, and the image's position in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        self.prepare()
        return divmod(index, self._per_shard)

    def _reading(self, index: int, read: Callable[[Shard, int], T]) -> T:
        """What `read` gives for an image: its shard is checked before, and computed again if need be."""
        number, position = self._place(index)
        for _ in range(3):
            shard = self._shards[number]
            try:
                shard.verify()
                return read(shard, position)
            except Damaged:
                self._refresh(number)
        raise UpbenchError(f"{self._path(number)} cannot be read although it was just written: failing disk?")

    def _refresh(self, number: int) -> None:
        """Finds a good shard where one has turned out to be bad: another process's, or a new one."""
        with suppress(Damaged, FileNotFoundError):
            shard = self._open(number)
            shard.verify()
            if len(shard) >= len(self._wanted(number)):
                self._shards[number] = shard
                return
        self._fill(suspect=number)

    def _wanted(self, number: int) -> range:
        """Indices of this store's images in a shard."""
        return range(len(self))[number * self._per_shard : (number + 1) * self._per_shard]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def _open(self, number: int) -> Shard:
        """Reads a shard's header. Raises `Damaged` and `FileNotFoundError`."""
        shard = Shard.open(self._path(number), self._format, number * self._per_shard)
        names = self.names[shard.first : shard.first + self._per_shard]
        if len(shard) > self._per_shard or shard.names[: len(names)] != names[: len(shard)]:
            raise Damaged("it holds other images")
        return shard

    def _scan(self, discard: bool = False) -> list[Shard | None]:
        """The headers of all shards of this store; None where there is none, or a damaged one.

        Args:
            discard: Whether damaged ones are said to be and removed.
        """
        found: list[Shard | None] = []
        for number in range(-(-len(self) // self._per_shard)):
            shard = None
            try:
                shard = self._open(number)
            except FileNotFoundError:
                pass
            except Damaged as error:
                if discard:
                    self._discard(number, error)
            found.append(shard)
        return found

    def _discard(self, number: int, error: Damaged) -> None:
        path = self._path(number)
        say(f"{self._what}: {path} is damaged ({error}) and is computed again")
        try:
            path.unlink(missing_ok=True)
        except OSError as cause:
            raise UpbenchError(f"cannot remove damaged {path}: {cause.strerror}") from cause

    def _sound(self, number: int, shard: Shard) -> Shard | None:
        """The shard if its checksums are right; else it is discarded."""
        try:
            shard.verify()
        except Damaged as error:
            self._discard(number, error)
            return None
        return shard

    # Computing

    def _use(self, shards: Iterable[Shard | None]) -> None:
        """From now on these are read: they hold all images."""
        self._shards = [shard for shard in shards if shard is not None]
        self._nbytes = sum(shard.nbytes(len(self) - shard.first) for shard in self._shards)

    def _missing(self, shards: Sequence[Shard | None]) -> dict[int, range]:
        """Indices of the images that each shard lacks, without those that lack none."""
        lacking = {
            number: self._wanted(number)[len(shard) if shard else 0 :] for number, shard in enumerate(shards)
        }
        return {number: indices for number, indices in lacking.items() if indices}

    @property
    def _layout_path(self) -> Path:
        return self.folder / "store.json"

    @property
    def _moments_path(self) -> Path:
        return self.folder / "moments.safetensors"

    def _fill(self, suspect: int | None = None) -> None:
        """Computes what is missing, while no other process does.

        Args:
            suspect: A shard to check before.
        """
        with alone(self.folder / "lock", f"{self._what}: another process computes them; waiting for it"):
            known = Layout.load(self._layout_path, self._format)
            layout = known or Layout.of(self._extractor.first_size())
            self._per_shard = layout.per_shard
            shards = self._scan(discard=True)
            for number, shard in enumerate(shards):
                if shard is not None and (number == suspect or number in self._missing(shards)):
                    shards[number] = self._sound(number, shard)  # short ones are copied
            missing = self._missing(shards)
            if missing:
                self._announce(shards, missing, layout.image_size)
            if known is None:
                layout.save(self._layout_path, self._format)
            if missing:
                try:
                    self._compute(shards, missing)
                except Damaged as error:  # it was sound a moment ago
                    raise UpbenchError(f"{self._what}: a file in {self.folder} changed: {error}") from error
            self._use(shards)

    def _announce(self, shards: Sequence[Shard | None], missing: dict[int, range], size: int) -> None:
        """Says how large the features will be.

        Raises:
            UpbenchError: The disk has not room enough.
        """
        held = [shard for shard in shards if shard is not None]
        there = len(self) - sum(map(len, missing.values()))
        there_size = sum(shard.nbytes(len(self) - shard.first) for shard in held)
        if there:
            size = there_size // there
        new = size * (len(self) - there)
        text = f"{self._what}: {len(self)} images, {amount(there_size + new)} in {self.folder}"
        say(text + (f"; {there} are there" if there else ""))
        need = new + sum(shard.nbytes() for shard in held if shard.first // self._per_shard in missing)
        free = max(0, shutil.disk_usage(self.folder).free - RESERVE)
        if need > free:
            raise UpbenchError(
                f"{self._what} need {amount(need)}, but the disk of {self.folder} has {amount(free)} free "
                f"({amount(RESERVE)} are kept in reserve): set UPBENCH_CACHE to a folder on a larger disk"
            )

    def _compute(self, shards: list[Shard | None], missing: dict[int, range]) -> None:
        """Writes shards, and puts them into the list."""
        indices = list(chain.from_iterable(missing.values()))
        images = self._extractor.read(indices)
        running = None
        with bar(self._what, len(self), len(self) - len(indices)) as progress, closing(images):
            for number, fresh in missing.items():
                running = self._continued(running, shards, fresh.start)
                self._write(number, shards[number], fresh, images, running, progress)
                shards[number] = self._open(number)
                if running is not None:
                    running.save(self._moments_path, self._format.store)

    def _write(
        self,
        number: int,
        short: Shard | None,
        fresh: range,
        images: Iterator[Tensor],
        running: RunningMoments | None,
        progress: Bar,
    ) -> None:
        """Writes a shard.

        Args:
            number: Of the shard.
            short: The shard as it is, whose images are copied.
            fresh: Indices of the images to compute.
            images: Gives these.
            running: Where to add their features.
            progress: Counts them.
        """
        first = number * self._per_shard
        with replacing(self._path(number)) as temporary, temporary.open("wb") as file:
            writer = ShardWriter(file, self._format, first, self.names[first : fresh.stop])
            for position in range(len(short) if short else 0):
                assert short is not None
                writer.add(short.read(position), short.token(position) if self._format.token else None)
            for indices, features, tokens in self._extractor.batches(fresh, images):
                stored, stored_tokens = features.cpu(), None if tokens is None else tokens.cpu()
                summed = features if self._sums_device == self.device else stored
                for position in range(len(indices)):
                    token = None if stored_tokens is None else stored_tokens[position]
                    checksum = writer.add(stored[position], token)
                    if running is not None:
                        running.add(summed[position], checksum)
                progress.advance(len(indices))
            writer.finish()

    # Moments

    def _no_moments(self) -> RunningMoments:
        return RunningMoments(self._channels, self._sums_device)

    def _saved_moments(self, shards: Sequence[Shard | None], limit: int) -> RunningMoments | None:
        """What has been summed of the first `limit` images, maybe nothing; None where it is of more."""
        channels, device = self._channels, self._sums_device
        saved = RunningMoments.load(self._moments_path, self._format.store, channels, device)
        if saved is None:
            return self._no_moments()
        if saved.images > limit:
            return None
        expected = 0
        for index in range(saved.images):
            number, position = divmod(index, self._per_shard)
            shard = shards[number]
            expected = chained(expected, shard.checksums[position] if shard else 0)
        return saved if saved.chain == expected else self._no_moments()

    def _continued(
        self, running: RunningMoments | None, shards: Sequence[Shard | None], count: int
    ) -> RunningMoments | None:
        """Moments of the first `count` images, or None where that is left to `moments`.

        After a kill between a shard and its moments, that shard is read.
        """
        if running is not None and running.images == count:
            return running
        running = self._saved_moments(shards, count)
        if running is None:
            return None
        try:
            for index in range(running.images, count):
                number, position = divmod(index, self._per_shard)
                shard = shards[number]
                assert shard is not None
                shard.verify()
                running.add(*_stored(shard, position))
        except Damaged:
            return None
        return running


def _stored(shard: Shard, position: int) -> tuple[Tensor, int]:
    return shard.read(position), shard.checksums[position]


def amount(count: float) -> str:
    """Bytes as people say them: "37.7 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
