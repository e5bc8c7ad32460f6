"""What a run will do: every name and every input looked at before anything is written.

Planning raises on bad input, decides which cells are skipped and why, and takes the fingerprints by which a
finished cell is known again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from upbench.contracts.backbone import Backbone
from upbench.contracts.dataset import Dataset
from upbench.contracts.upsampler import Setting
from upbench.dense.camera import CameraChoice
from upbench.errors import UpbenchError, unknown
from upbench.evaluate.protocol import find_preset
from upbench.registry import find_method, find_task, load_plugin_files, open_dataset, plugins
from upbench.results.cell import Cell, MethodSpec
from upbench.run.build import build_method, probe_config, splits
from upbench.run.config import RunConfig
from upbench.system.sources import source_fingerprint
from upbench.weights.load import images_seen
from upbench.weights.resolve import resolve, weights_reason

_GLANCE = 32  # pixels: a sample that is only looked at


@dataclass(frozen=True)
class PlannedCell:
    """A cell that was looked at.

    Attributes:
        cell: The cell.
        inputs: Fingerprints of what goes into it: while they are the same, its record holds.
        setting: Sizes and channels that the method meets.
        skip: Why it cannot be had, in words; "" where it can.
    """

    cell: Cell
    setting: Setting
    inputs: Mapping[str, Any] = field(default_factory=dict)
    skip: str = ""


@dataclass(frozen=True)
class BackboneFacts:
    """What a plan needs to know of a loaded backbone.

    Attributes:
        channels: C of its features.
        stride: Pixels per feature.
        patch_size: See `Backbone.patch_size`.
        fingerprint: Of its weights.
        image_size: (h, w) that it sees under the preset.
    """

    channels: int
    stride: int
    patch_size: int | None
    fingerprint: str
    image_size: tuple[int, int]


def make_plan(config: RunConfig, load: Callable[[str, str], Backbone]) -> list[PlannedCell]:
    """The cells of a run, looked at.

    Args:
        config: As the user gave it, wildcards and all.
        load: Gives the backbone of a name on a device.

    Returns:
        Every cell, in the order in which they share the most work.

    Raises:
        UpbenchError: Anything that is wrong with a name, a plugin file, a checkpoint, a dataset or the
            device.
    """
    load_plugin_files(config.plugins)
    tasks = plugins("task")
    named = {spec.name for spec in config.methods}
    config = config.select(plugins("method"), tasks, plugins("dataset"))
    config = replace(config, methods=[_with_preset_options(s, config.preset) for s in config.methods])
    device = _device(config.device)
    methods = {spec: _check_method(spec) for spec in config.methods}
    cells = config.cells({name: tuple(task.datasets) for name, task in tasks.items()}, device)
    datasets = {name: open_dataset(name) for name in dict.fromkeys(cell.dataset for cell in cells)}
    fingerprints = {name: _fingerprints(dataset) for name, dataset in datasets.items()}
    names = dict.fromkeys(cell.backbone for cell in cells)
    backbones = {name: _look_at(load(name, device), config.preset) for name in names}
    settings = {
        (spec, name): _setting(spec, name, facts, config.preset, device)
        for spec in config.methods
        for name, facts in backbones.items()
    }
    skips = {
        pair: _skip_method(pair[0], setting, pair[0].name in named) for pair, setting in settings.items()
    }
    cameras = {name: _skip_camera(dataset, config.methods) for name, dataset in datasets.items()}
    planned = []
    for cell in cells:
        task = find_task(cell.task)()
        inputs = {
            **methods[cell.method],
            "task_source": source_fingerprint(type(task)),
            "dataset": fingerprints[cell.dataset],
            "backbone": backbones[cell.backbone].fingerprint,
            "protocol": find_preset(cell.preset).protocol,
            "probe": asdict(probe_config(cell, task)),
        }
        pair = (cell.method, cell.backbone)
        skip = skips[pair] or task.skip_reason(datasets[cell.dataset]) or ""
        if not skip and CameraChoice.parse(cell.method.camera).dataset:
            skip = cameras[cell.dataset]
        planned.append(PlannedCell(cell, settings[pair], inputs, skip))
    return planned


def _with_preset_options(spec: MethodSpec, preset: str) -> MethodSpec:
    """The row with the options that its method has under a preset, where the user set none of them.

    Where the user set nothing at all, the row is called after the preset: the options are many.
    """
    cls = find_method(spec.name)
    options = cls.preset_options.get(preset, {})
    plain = options and spec == MethodSpec(spec.name)
    label = f"{cls.title or spec.name}, {preset} budget" if plain else spec.label
    return replace(spec, options={**options, **spec.options}, label=label)


def _setting(spec: MethodSpec, backbone: str, facts: BackboneFacts, preset: str, device: str) -> Setting:
    sizes = find_preset(preset)
    height, width = facts.image_size
    return Setting(
        backbone=backbone,
        channels=facts.channels,
        stride=facts.stride,
        image_size=(sizes.image_size, sizes.image_size),
        feature_size=(height // facts.stride, width // facts.stride),
        output_size=(sizes.output_size, sizes.output_size),
        weights=spec.weights,
        device=device,
        patch_size=facts.patch_size,
    )


def _device(asked: str) -> str:
    """What "auto" stands for here, or the device that was asked for if there is one.

    Raises:
        UpbenchError: "cuda" on a machine where torch sees no GPU.
    """
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UpbenchError("device 'cuda' asked for, but torch sees no GPU; use 'cpu' or 'auto'")
    return ("cuda" if there else "cpu") if asked == "auto" else asked


def _check_method(spec: MethodSpec) -> dict[str, Any]:
    """Fingerprints of a row's code and weights.

    Raises:
        UpbenchError: An option that the method has not, a camera that it does not use, or weights that are
            not there.
    """
    cls = find_method(spec.name)
    for option in spec.options:
        if option not in cls.option_names():
            raise unknown(f"option of method '{spec.name}'", option, cls.option_names())
    if spec.camera and not cls.uses_camera:
        raise UpbenchError(f"method '{spec.name}' uses no camera")
    weights = resolve(cls, spec.weights)
    told = {"name": weights.name, "sha256": weights.sha256, "images_seen": images_seen(weights)}
    return {
        "method_source": source_fingerprint(cls),
        "weights": {name: value for name, value in told.items() if value is not None or name == "sha256"},
    }


def _fingerprints(dataset: Dataset) -> dict[str, str]:
    """Fingerprint of each split, after its names were read (which finds images without labels)."""
    for split in splits(dataset):
        if not dataset.names(split):
            raise UpbenchError(f"split '{split}' of dataset '{dataset.name}' has no images")
    return {split: dataset.fingerprint(split) for split in splits(dataset)}


def _skip_camera(dataset: Dataset, methods: Iterable[MethodSpec]) -> str:
    """Why rows that ask for the dataset's camera cannot have it, or "" (also where no row asks for it)."""
    if not any(CameraChoice.parse(spec.camera).dataset for spec in methods):
        return ""
    first = dataset.load(dataset.train_split, 0, _GLANCE)
    return "" if first.camera is not None else f"dataset '{dataset.name}' has no cameras"


def _look_at(backbone: Backbone, preset: str) -> BackboneFacts:
    side = find_preset(preset).image_size
    return BackboneFacts(
        backbone.channels,
        backbone.stride,
        backbone.patch_size,
        backbone.fingerprint,
        backbone.input_size(side, side),
    )


def _skip_method(spec: MethodSpec, setting: Setting, named: bool) -> str:
    """Why a method cannot run on a backbone, or "" after its weights were loaded for a test.

    Args:
        spec: The row.
        setting: What it is asked to do.
        named: Whether the user named the method, where "all" or another pattern would stand for it. Weights
            that it does not have are then an error, and no reason to skip it.

    Raises:
        UpbenchError: A checkpoint that is corrupt or of another size.
    """
    cls = find_method(spec.name)
    if not named and spec.weights == "default" and cls.trainable and cls.default_weights is None:
        known = next((f", such as {cls.name}:{name}" for name in cls.weights), "")
        return f"no weights come with {cls.name}; it can be run with others{known}"
    reason = cls.skip_reason(setting) or weights_reason(cls, setting)
    if reason is None:
        try:
            build_method(spec, setting.channels)
        except UpbenchError:
            raise
        except Exception:  # a fault of the method's own: its cells fail, each with the traceback
            return ""
    return reason or ""
