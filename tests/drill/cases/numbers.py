"""Counts, sizes and other numbers that a user gives, and that nothing can have."""

from __future__ import annotations

from pathlib import Path

from drill.case import Case, refused

TRAIN = ("train", "jafar", "--images", "photos", "--out", "w.safetensors")
EXPORT = ("export", "nearest", "--out", "x.pt2", "--image-size")
PROFILE = ("profile", "--methods", "nearest", "--size")
MANY = "1000000000"
HUGE = "9" * 6000


def photos(folder: Path) -> None:
    """A folder that training would look into; it is never reached."""
    (folder / "photos").mkdir()


def square(folder: Path) -> None:
    """A method whose parameters grow with the square of the channels."""
    (folder / "p.py").write_text(
        "import torch\nfrom upbench import Upsampler\n\n\n"
        "class Square(Upsampler):\n    name, trainable = 'square', True\n\n"
        "    def __init__(self, channels=384, dim=1):\n        super().__init__(channels)\n"
        "        self.layer = torch.nn.Linear(channels * dim, channels * dim)\n\n"
        "    def forward(self, image, features, output_size):\n"
        "        return torch.nn.functional.interpolate(features, output_size)\n"
    )


RUN: list[tuple[str, str, tuple[str, ...]]] = [
    *(
        (flag, value, (flag.strip("-"), "whole number"))
        for flag in ("--seeds", "--workers", "--limit")
        for value in ("0", "-1", "1.5", "x", "", "nan", "1e3", "1_000", "\u0663", HUGE)
    ),
    ("--seeds", MANY, ("seeds", "from 1 to 1000")),
    ("--workers", MANY, ("workers", "from 1 to")),
    ("--limit", "1" + "0" * 18, ("limit", "whole number")),
    *(
        ("--shard", value, ("shard", "I/N"))
        for value in ("0/4", "5/4", "1", "1/0", "-1/2", "a/b", "1/" + HUGE, "\u0661/\u0662", "1/2/3")
    ),
]
PROBE: list[tuple[str, tuple[str, ...]]] = [
    ("lr=true", ("lr", "number", "True")),
    ("lr=nan", ("lr", "number")),
    ("lr=.nan", ("lr", "finite")),
    ("lr=.inf", ("lr", "finite")),
    ("lr=0", ("lr", "above 0")),
    ("lr=-1", ("lr", "above 0")),
    ("lr=fast", ("lr", "number", "'fast'")),
    ("lr=[1]", ("lr", "number")),
    ("epochs=0", ("epochs", "from 1")),
    ("epochs=1.5", ("epochs", "whole number")),
    ("epochs=true", ("epochs", "whole number", "True")),
    (f"epochs={MANY}", ("epochs", "to 100000")),
    (f"epochs={HUGE}", ("epochs",)),
    ("batch_size=-1", ("batch_size", "from 1")),
    ("warmup=2", ("warmup", "at most 1")),
    ("crop=0", ("crop", "above 0")),
    ("flip=-0.1", ("flip", "at least 0")),
    ("shrinkage=-1", ("shrinkage", "at least 0")),
    ("schedule=1", ("schedule", "'1'")),
    ("decay_bias=1", ("decay_bias", "true or false")),
]
TRAINING: list[tuple[str, str, tuple[str, ...]]] = [
    *(
        (flag, value, (flag.strip("-"), "whole number"))
        for flag in ("--micro-batch", "--steps", "--batch", "--view-size", "--save-every")
        for value in ("0", "-1")
    ),
    ("--micro-batch", MANY, ("micro-batch", "to 100000")),
    ("--batch", MANY, ("batch", "to 100000")),
    ("--view-size", "1000000", ("view-size", "to 10000")),
    ("--guidance-size", MANY, ("guidance-size", "to 10000")),
    ("--guidance-sizes", "0", ("guidance-sizes", "from 1")),
    ("--guidance-sizes", "100000", ("guidance-sizes", "whole number")),
    ("--crops-per-image", MANY, ("crops-per-image", "to 100000")),
    ("--warmup", "-5", ("warmup", "at least 0")),
    ("--seed", "-1", ("seed", "from 0")),
    ("--seed", "1" + "0" * 17, ("seed", "whole number")),
    ("--clip", "-1", ("clip", "at least 0")),
    ("--weight-decay", "-1", ("weight-decay", "at least 0")),
    ("--save-minutes", "0", ("save-minutes", "above 0")),
    ("--lr", "0", ("lr", "above 0")),
    *(
        (flag, value, (flag, "number"))
        for flag in ("--lr", "--clip", "--save-minutes", "--weight-decay", "--min-crop")
        for value in ("nan", "inf", "-inf", "x", HUGE)
    ),
    ("--min-crop", "1.5", ("min-crop", "at most 1")),
    ("--ratio", "0.5", ("ratio", "two")),
    ("--ratio", "2", ("ratio", "two")),
    ("--val-views", "0", ("val-views", "at least 1")),
    ("--log-every", "0", ("log-every", "at least 1")),
    ("--device", "meta", ("device", "'meta'")),
    ("--device", "x", ("unknown device",)),
    ("--options", "name=x", ("option", "'name'")),
    ("--options", "weights=x", ("option", "'weights'")),
    ("--options", "channels=3", ("option", "'channels'")),
    ("--options", "seed=3", ("option", "'seed'")),
    ("--options", "dim", ("KEY=VALUE",)),
    ("--out", "w.pt", (".safetensors",)),
]
SIZES: list[tuple[str, tuple[str, ...]]] = [
    ("0", ("size", "'0'")),
    ("0x14", ("size", "'0x14'")),
    ("14x00", ("size", "'14x00'")),
    ("-1", ("size", "'-1'")),
    ("1.5", ("size", "'1.5'")),
    ("", ("size", "''")),
    ("x", ("size", "'x'")),
    ("14x14x14", ("size",)),
    ("\u0661\u0664", ("size",)),
    ("7", ("7",)),
    ("1000000", ("1000000", "memory")),
    (MANY, ("at most", "1000000")),
    (HUGE, ("size", "6000 characters")),
]


def _size(name: str, words: tuple[str, ...]) -> tuple[str, ...]:
    return ("from 1 to 1000000",) if name == MANY else words


CASES = [
    *(
        Case("counts", f"run {flag} {value[:20]}", ("run", f"{flag}={value}"), refused(*words))
        for flag, value, words in RUN
    ),
    *(
        Case("probe", pair[:30], ("run", "--methods", "nearest", "--probe", pair), refused(*words))
        for pair, words in PROBE
    ),
    *(
        Case("training", f"{flag} {value[:20]}", (*TRAIN, f"{flag}={value}"), refused(*words), photos)
        for flag, value, words in TRAINING
    ),
    *(
        Case("sizes", f"profile {size[:20]}", (*PROFILE[:-1], f"--size={size}"), refused(*_size(size, words)))
        for size, words in SIZES
    ),
    *(
        Case(
            "sizes",
            f"export {size[:20]}",
            (*EXPORT[:-1], f"--image-size={size}"),
            refused(*_size(size, words)),
        )
        for size, words in SIZES
        if size != "7"
    ),
    *(
        Case(
            "sizes",
            f"{command[0]} {flag} {value}",
            (*command, "28", f"{flag}={value}"),
            refused(flag.strip("-"), "whole number"),
        )
        for command in (PROFILE, EXPORT)
        for flag in ("--channels", "--stride", "--batch")
        for value in ("0", "-1", "1.5", "1" + "0" * 18)
    ),
    Case(
        "sizes",
        "profile 10^6 channels",
        (*PROFILE, "448", "--channels", "1000000"),
        refused("1000000", "memory"),
    ),
    Case("sizes", "profile 10^5 images", (*PROFILE, "448", "--batch", "100000"), refused("memory")),
    Case("sizes", "export 10^6 channels", (*EXPORT, "448", "--channels", "1000000"), refused("memory")),
    Case(
        "sizes",
        "parameters of 10^6 channels",
        ("profile", "--methods", "square:none", "--size", "14", "--channels", "1000000", "--plugin", "p.py"),
        refused("square", "memory"),
        square,
        whole=True,
        fresh=True,
    ),
    Case(
        "sizes",
        "an option of 10^9",
        (
            "export",
            "square:none",
            "--out",
            "x.pt2",
            "--image-size",
            "14",
            "--options",
            "dim=1000000000",
            "--plugin",
            "p.py",
        ),
        refused("square", "memory"),
        square,
        whole=True,
        fresh=True,
    ),
    Case("sizes", "output of 10^6", (*PROFILE, "28", "--output", "1000000"), refused("memory")),
    Case("sizes", "export to 10^6", (*EXPORT, "28", "--output-size", "1000000"), refused("memory")),
    Case(
        "sizes", "export from 10^6 features", (*EXPORT, "28", "--feature-size", "1000000"), refused("memory")
    ),
    *(
        Case(
            "sizes",
            f"tolerance {value}",
            (*EXPORT, "28", f"--tolerance={value}"),
            refused("tolerance", "number"),
        )
        for value in ("nan", "inf", "-1", "x")
    ),
    Case("sizes", "below the stride", (*EXPORT, "7"), refused("feature size")),
]
