"""Self-supervised training: one recipe for every method with `trainable = True`.

The method upsamples features of a photo that was made smaller, guided by the photo, and is asked for the
features that the frozen backbone gives at full size. No labels take part. The loss is that of JAFAR, NAF
and RaysUp: a cosine embedding and the squared error of features scaled to 0..1 (see `upsampling_loss`).

A training run leaves, beside FILE.safetensors, FILE.curve.jsonl (a line every few steps), FILE.md (a model
card) and, until it is through, FILE.resume.pt. On a CPU a resumed run ends with the same bits as one that
was never stopped: batches and random numbers are functions of the seed and the step.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from upbench.errors import UpbenchError, named, printable, system_errors, unknown
from upbench.registry import find_method
from upbench.system.cache import replacing, sha256_file
from upbench.system.outputs import writable_file
from upbench.system.progress import Bar, bar, say
from upbench.train.config import TrainConfig, TrainPaths, TrainResult, ViewConfig
from upbench.train.views import Batch, MixedPool, ViewPool, compute, find_photos, plan_views

if TYPE_CHECKING:
    from upbench.contracts.upsampler import Upsampler

__all__ = ["TrainConfig", "TrainPaths", "TrainResult", "ViewConfig", "train", "upsampling_loss"]

_SMOOTHING = 0.98  # of the loss that is shown


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine similarity of `[B, C, H, W]` features over channels, averaged over positions."""
    return 1 - F.cosine_similarity(prediction, target, dim=1).mean()


def scaled_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of `[B, C, H, W]` features after both are scaled, at each position, so that the
    target's channels reach from 0 to 1."""
    low, high = target.amin(1, keepdim=True), target.amax(1, keepdim=True)
    return ((prediction - target) / (high - low).clamp(min=1e-6)).square().mean()


def upsampling_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """`cosine_loss` + `scaled_mse`, the loss of JAFAR (Couairon et al. 2025), NAF and RaysUp."""
    return cosine_loss(prediction, target) + scaled_mse(prediction, target)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of a step (0-based)."""
    rise = min(1.0, (step + 1) / (config.warmup + 1))
    if config.schedule == "constant":
        return config.lr * rise
    progress = max(0.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.lr * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(config: TrainConfig) -> TrainResult:
    """Trains a method and writes its weights, curve and card.

    SIGTERM and SIGINT (from the main thread) end the run after the step in progress, with a checkpoint.

    Raises:
        UpbenchError: Unknown method, backbone or option; a method that has nothing to train, or whose
            parameters depend on C where backbones differ in it; no images, or one that cannot be read; an
            output that cannot be written, exists, or has a checkpoint of another run; a loss that is not
            finite.
    """
    _trainable(config.method).check_options(config.options)
    device = _device(config.device)
    photos = find_photos(config.images)
    val_photos = find_photos(config.val_images) if config.val_images else []
    paths = _writable(config)
    run = _prepared(config, device, photos, val_photos)
    if config.resume and paths.resume.is_file():
        run.restore(paths.resume)
    elif config.force:  # last of all: until here everything may still turn out to be wrong
        paths.resume.unlink(missing_ok=True)
    with _stop_requests() as stop:
        finished = run.train(paths, stop)
    if not finished:
        say(f"stopped after step {run.step}; go on with: {config.command()} --resume")
        return replace(run.result(paths, None), stopped_by=stop.number)
    return _finish(run, paths)


def _prepared(
    config: TrainConfig, device: torch.device, photos: Sequence[Path], val_photos: Sequence[Path]
) -> _Run:
    """A run at its start. It holds the features of its views; the backbones have gone."""
    from upbench.features.backbones import load_backbone

    backbones = {name: load_backbone(name, device=device) for name in config.backbone}
    _check_parameters(config, [backbone.channels for backbone in backbones.values()])  # before costly work
    views = replace(config.views, recipe="guidance", crops_per_image=1, scales_per_view=1, min_crop=1.0)
    # all of them are planned, which reads every photo's head, before the features of any are computed
    plans = [
        (plan_views(photos, config.views, each.stride), plan_views(val_photos, views, each.stride))
        for each in backbones.values()
    ]
    pools, val = [], {}
    for (name, backbone), (planned, val_planned) in zip(backbones.items(), plans, strict=True):
        pools.append(compute(planned, backbone, config.views))
        if val_photos:
            val[name] = compute(val_planned[: config.val_views], backbone, views)
    pool = MixedPool(pools)
    return _Run(config, backbones[config.backbone[0]].channels, device, pool, val)


class _Run:
    """The state of a training run, and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        channels: int,
        device: torch.device,
        pool: MixedPool,
        val: Mapping[str, ViewPool],
    ) -> None:
        self.config = config
        self.device = device
        self.pool = pool
        self.val = val
        self.model = _model(config, channels, device).train()
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.bf16 = config.dtype == "bf16" or (config.dtype == "auto" and device.type == "cuda")
        self.micro_batch = config.micro_batch or (1 if device.type == "cpu" else config.batch)
        self.step = 0
        self.loss = math.nan
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self.baseline = self.validate(find_method("bilinear")(channels=channels)).get("val_cosine")

    def train(self, paths: TrainPaths, stop: _Stop) -> bool:
        """Steps until the end or until `stop`; returns whether it is the end."""
        saved = time.monotonic()
        with bar(f"train {self.config.method}", self.config.steps, self.step) as progress:
            while self.step < self.config.steps:
                start = time.monotonic()
                self._checked_step()
                self._log(paths, progress)
                self.seconds += time.monotonic() - start
                progress.advance()
                late = time.monotonic() - saved > 60 * self.config.save_minutes
                if self.step < self.config.steps and (
                    stop.is_set() or late or self.step % self.config.save_every == 0
                ):
                    self.save(paths.resume)
                    saved = time.monotonic()
                if stop.is_set() and self.step < self.config.steps:
                    return False
        return True

    def _checked_step(self) -> None:
        loss = self.optimise(self.pool.batch(self.step, self.config.batch, self.config.seed))
        if not math.isfinite(loss):
            raise UpbenchError(f"the loss is {loss} at step {self.step + 1}; lower the learning rate (--lr)")
        self.loss = loss if self.step == 0 else _SMOOTHING * self.loss + (1 - _SMOOTHING) * loss
        self.step += 1

    def optimise(self, batch: Batch) -> float:
        """One optimiser step; returns the batch's loss."""
        _seed_step(self.config.seed, self.step, self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimiser.zero_grad(set_to_none=True)
        total = 0.0
        batch = batch.to(self.device).shrunk(self._guidance_size())
        for part in batch.split(self.micro_batch):
            loss = upsampling_loss(self.upsample(self.model, part), part.target)
            (loss * (len(part) / len(batch))).backward()
            total += loss.item() * len(part) / len(batch)
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if math.isfinite(total):
            self.optimiser.step()
        return total

    def _guidance_size(self) -> int | None:
        sizes = self.config.guidance_sizes
        return sizes[int(torch.randint(len(sizes), ()))] if sizes else None

    def upsample(self, model: Upsampler, batch: Batch) -> Tensor:
        """The upsampled features where the batch has a target, in float32."""
        batch = batch.to(self.device)
        context = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with context:
            dense = model(model.normalize(batch.image), batch.features, (batch.output, batch.output))
        return batch.covered(dense).float()

    def validate(self, model: Upsampler) -> dict[str, float]:
        """`val_cosine`, the mean over the backbones, and where there are several, that of each."""
        each = {name: self.measure(pool, model) for name, pool in self.val.items()}
        if not each:
            return {}
        mean = sum(each.values()) / len(each)
        own = {f"val_cosine/{name}": value for name, value in each.items()} if len(each) > 1 else {}
        return {"val_cosine": mean, **own}

    @torch.no_grad()
    def measure(self, pool: ViewPool, model: Upsampler) -> float:
        """Mean cosine similarity to the high-resolution features over a pool."""
        similarities = []
        for i, view in enumerate(pool.views):
            batch = pool.read([i], view.cells[0])
            similarity = F.cosine_similarity(self.upsample(model, batch), batch.target.to(self.device), dim=1)
            similarities.append(similarity.mean().item())
        return sum(similarities) / len(similarities)

    def _log(self, paths: TrainPaths, progress: Bar) -> None:
        last = self.step == self.config.steps
        measured = bool(self.val) and (self.step % self.config.val_every == 0 or last)
        if not (measured or self.step % self.config.log_every == 0 or last):
            return
        row: dict[str, float] = {
            "step": self.step,
            "loss": self.loss,
            "lr": learning_rate(self.config, self.step - 1),
        }
        note = f"loss {self.loss:.4f}"
        if measured:
            self.model.eval()
            row |= self.validate(self.model)
            self.model.train()
            note += f", cosine {row['val_cosine']:.4f} (bilinear {self.baseline:.4f})"
            say(f"step {self.step}: {note}")
        self.curve.append(row)
        progress.note(note)
        with replacing(paths.curve) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.curve))

    def save(self, path: Path) -> None:
        """Writes a checkpoint that `restore` takes."""
        content = {
            "identity": json.dumps(self._identity()),
            "step": self.step,
            "loss": self.loss,
            "seconds": self.seconds,
            "curve": self.curve,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)  # by its name, torch would write past Python, and lose what failed
            file.flush()
            os.fsync(file.fileno())

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            UpbenchError: It is broken, or of a run with other settings (the first of them is named).
        """
        from upbench.system.checkpoint.read import read_checkpoint

        content = read_checkpoint(path)
        try:
            theirs, ours = json.loads(content["identity"]), self._identity()
            for name, value in ours.items():
                if theirs.get(name) != value:
                    raise UpbenchError(
                        f"checkpoint {path} is of a run with {name} {theirs.get(name)}, not {value}; "
                        "--force starts over"
                    )
            self.model.load_state_dict(content["model"])
            self.optimiser.load_state_dict(content["optimiser"])
            self.step, self.loss = content["step"], content["loss"]
            self.seconds, self.curve = content["seconds"], content["curve"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise UpbenchError(f"checkpoint {path} is not one of 'upbench train'") from error

    def _identity(self) -> dict[str, Any]:
        return {**self.config.identity(), "views": self.pool.fingerprint}

    def result(self, paths: TrainPaths, sha256: str | None) -> TrainResult:
        """What the run has come to so far."""
        measured = [row["val_cosine"] for row in self.curve if "val_cosine" in row]
        return TrainResult(
            out=paths.out,
            sha256=sha256,
            steps=self.step,
            images_seen=self.step * self.config.batch,
            images_before=_seen_before(self.config),
            loss=self.loss,
            val_cosine=measured[-1] if measured else None,
            val_bilinear=self.baseline,
            finished=sha256 is not None,
            seconds=self.seconds,
            curve=paths.curve,
            card=paths.card,
        )


def _finish(run: _Run, paths: TrainPaths) -> TrainResult:
    """Writes weights and card, and removes the checkpoint."""
    from upbench.system.environment import describe
    from upbench.train.card import model_card

    result = run.result(paths, None)
    machine = describe(run.device.type)
    metadata = {
        "method": run.config.method,
        "backbone": ", ".join(run.config.backbone),
        "channels": str(run.model.channels),
        "options": json.dumps(run.config.options, sort_keys=True),
        "recipe": run.config.views.recipe,
        "steps": str(result.steps),
        "images_seen": str(result.images_before + result.images_seen),
        "loss": f"{result.loss:.6f}",
        "seed": str(run.config.seed),
        "command": run.config.command(published=True),
        "upbench": machine["upbench"],
        "versions": json.dumps(machine["packages"]),
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in run.model.state_dict().items()}
    with replacing(paths.out) as temporary:
        temporary.write_bytes(save(state, metadata))  # save_file would make it private to the user
    result = run.result(paths, sha256_file(paths.out))
    with replacing(paths.card) as temporary:
        temporary.write_text(model_card(run.config, result, run.curve, len(run.pool), machine))
    paths.resume.unlink(missing_ok=True)
    say(f"{paths.out}: sha256 {result.sha256}")
    return result


def _seen_before(config: TrainConfig) -> int:
    """Images that the weights were trained on from which the run started."""
    from upbench.weights.load import images_seen
    from upbench.weights.resolve import resolve

    return images_seen(resolve(find_method(config.method), config.init)) or 0


def _trainable(name: str) -> type[Upsampler]:
    cls = find_method(name)
    if not cls.trainable:
        raise UpbenchError(f"method '{name}' has nothing to train")
    if cls.uses_backbone:  # the pool holds features; the backbone is gone when training begins
        raise UpbenchError(f"method '{name}' runs the backbone itself; such methods cannot be trained")
    return cls


def _check_parameters(config: TrainConfig, widths: Sequence[int]) -> None:
    """Builds the method for the C of each backbone; one set of parameters has to serve them all."""
    shapes: dict[int, dict[str, torch.Size]] = {}
    for channels in dict.fromkeys(widths):
        method = _model(config, channels)
        shapes[channels] = {name: tensor.shape for name, tensor in method.state_dict().items()}
    first, *others = shapes.values()
    if any(other != first for other in others):
        raise UpbenchError(
            f"parameters of method '{config.method}' depend on C, and the backbones have "
            f"{' and '.join(map(str, shapes))} channels; train it on one of them"
        )


def _model(config: TrainConfig, channels: int, device: torch.device | str = "cpu") -> Upsampler:
    """The method as the run begins."""
    from upbench.weights.load import load_resolved
    from upbench.weights.resolve import resolve

    cls = find_method(config.method)
    weights = resolve(cls, config.init)
    return load_resolved(cls, weights, channels, device=device, seed=config.seed, options=config.options)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown("device", name, ("auto", "cpu", "cuda")) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UpbenchError("device 'cuda' was asked for, but torch sees no GPU")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        text = printable(error).partition(". ")[0][:200]
        raise UpbenchError(f"device {named(name)} cannot be used here: {text}") from error
    return device


def _writable(config: TrainConfig) -> TrainPaths:
    """The run's files, checked before anything expensive is done. Nothing that is there is touched.

    Raises:
        UpbenchError: A file that would be replaced without `force`, or one that cannot be written.
    """
    paths = config.paths()
    with system_errors("write the weights to", config.out):
        unfinished = paths.resume.is_file()
        if unfinished and not (config.resume or config.force):
            raise UpbenchError(
                f"an unfinished run lies at {paths.resume}: --resume goes on with it, --force starts over"
            )
        for path in (paths.out, paths.card, paths.curve):
            own = path == paths.curve and (unfinished or _is_curve(path))  # of this run, or of one that died
            if path.exists() and not config.force and not own:
                raise UpbenchError(f"{path} exists; --force replaces it")
        paths.out.parent.mkdir(parents=True, exist_ok=True)
    for what, path in (
        ("weights", paths.out),
        ("checkpoint", paths.resume),
        ("curve", paths.curve),
        ("model card", paths.card),
    ):
        writable_file(what, path)
    return paths


def _is_curve(path: Path) -> bool:
    """Whether a file is what a run that was killed before its first checkpoint left of its curve."""
    try:
        row = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and {"step", "loss", "lr"} <= set(row)


def _seed_step(seed: int, step: int, device: torch.device) -> None:
    """Random numbers of a step (dropout) depend on nothing that came before."""
    mixed = (seed * 1_000_003 + step) % 2**63
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)


class _Stop(threading.Event):
    """Set where somebody wants the run to end; `number` is that of the signal that said so."""

    number: int | None = None


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """An event that SIGTERM and SIGINT set; a second SIGINT interrupts at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: object) -> None:
        stop.number = number
        stop.set()
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in previous:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
