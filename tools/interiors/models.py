"""Which furniture model is what, where it may stand, and which split may show it.

A model's code is the letter of its library and its number there: `A` BlendSwap CC-0, `B` BlendSwap CC-BY, `K`
Kator Legaz, `S` Scopia (see `catalogue.LIBRARIES`). Models with a brand on them were left out, and those made
of glass, whose first opaque surface is not what an eye sees.

Models are parted between training and held-out validation by hand rather than by a rule: pieces of one series
(two and three seats of the same sofa, the cups of one tea set) are on the same side. Held-out lists are about
a third of each group, so that one vase does not stand in every held-out scene.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Models that can stand in for one another.

    Attributes:
        raw_class: What they are labelled as.
        seen: Codes of the models that training may show.
        held_out: Codes of the models that only validation shows; empty where a class is shared.
        scale: Factor on the catalogue's size (a crate on the floor is a small box on a table).
    """

    raw_class: str
    seen: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    scale: float = 1.0

    def codes(self, split: str) -> tuple[str, ...]:
        """Codes that a split may show: `train` the seen ones, `val` all, `val_heldout` only held-out ones."""
        if self.raw_class in SHARED_CLASSES or split == "val":
            return self.seen + self.held_out
        return self.seen if split == "train" else self.held_out


def _group(raw_class: str, seen: str, held_out: str = "", scale: float = 1.0) -> Group:
    return Group(raw_class, tuple(seen.split()), tuple(held_out.split()), scale)


SHARED_CLASSES = frozenset({"door", "picture", "rug", "screen"})
"""Raw classes with too few models to part them; every split shows all of them. Walls, floors, ceilings and
windows are built, not taken from models."""

GROUPS: dict[str, Group] = {
    "bed": _group("bed", "A2 A3 A5 B77 B31 S3 S344 B10", "A88 S4 S77 S367"),
    "sofa": _group(
        "sofa", "A95 A112 A132 B119 B129 K4 K56 S32 S74 S75 S76 S86 S288", "A140 B80 K57 S37 S125 S385"
    ),
    "armchair": _group("armchair", "A86 A99 B45 B87 B95 S6 S23 S25 S69 S62", "K47 A139 B120 S24 S145 S384"),
    "chair": _group(
        "chair",
        "A26 A31 A79 A93 A101 A108 B11 B13 B24 B17 B112 B127 K51 S29 S30 S90 B18 S11",
        "A114 A125 A171 B116 B123 B128 K14 S31 S92",
    ),
    "stool": _group("chair", "A42 A45 B28 K49 S85", "A168 S71 A118"),
    "office_chair": _group("chair", "A1 K72 S81", "S47 S89"),
    "table": _group("table", "A27 B58 B12 K52 S38 S39 S61 S93 S94 S300 S95", "A134 S26 S301 S338 B14 A48"),
    "coffee_table": _group("table", "S33 B22 S88", "S177 S386 S360"),
    "desk": _group("table", "A75 A152 B7 B54 S84 B118", "B79 S82 A49"),
    "bedside": _group("cabinet", "A4 K74", "B5 B53"),
    "tv_stand": _group("cabinet", "B82 A39", "A52 S28"),
    "shelf": _group("cabinet", "A6 A61 B121 S45 S83 K55", "K80 S46 A74 S27"),
    "chest": _group("cabinet", "B36 B34 A144 A153 B38 B33", "B75 B130 S193"),
    "wardrobe": _group("cabinet", "A68 B63 A146", "B135 S5"),
    "table_lamp": _group("lamp", "A15 B98 S48 S55 S56 S57 B126 S53", "S54 S65 S63 S358 A149"),
    "floor_lamp": _group("lamp", "S87", "K42"),
    "ceiling_lamp": _group("lamp", "B29 S58 A121", "K40 S213"),
    "plant": _group("plant", "A113 A126 B78 B81 S36 S130", "B85 S157"),
    "small_plant": _group(
        "plant", "A77 A107 B47 B92 B101 B108 B109 B125 S192 A160", "A102 A124 B102 S100 B1"
    ),
    "television": _group("screen", "A22 S40"),
    "laptop": _group("screen", "B99"),
    "tablet": _group("screen", "S215"),
    "vase": _group("vase", "S41 S42 S43 S14", "S44 S15"),
    "bottle": _group("bottle", "B6 K87 A53 A64 S103 S108 S106 K23", "S22 A66 A23 K32 S116 S117"),
    "tableware": _group(
        "tableware",
        "A9 A32 B21 B43 B83 K25 K28 K33 S13 S21 S111 S112 S122 S123 S377 B134",
        "B8 B93 K34 S184 S391 S380 B19 S16",
    ),
    "food": _group("food", "A7 A90 A142 B96 S70 S206 S355 S392", "A147 S128 S356 S370 B73"),
    "small_box": _group("box", "B26 S118 K68", "B9 K84 S119 A81"),
    "parcel": _group("box", "A71 A105 S180 S194 K65", "A73 S174 S183 A115", scale=0.36),
    "floor_box": _group("box", "A71 A105 S180 S194 K65 A72", "A73 S174 S183 K26 A115"),
    "toy": _group("toy", "A10 A51 A175 B15 B74 B106 A78 S205", "A14 A18 B71 B110 S197 B105"),
    "floor_toy": _group("toy", "A8 S189 S297", "S196 A84"),
    "clothing": _group("clothing", "A85 A106 A141 B2 S147 S136 S237 S109", "A120 S150 S203 S238 S239"),
    "appliance": _group(
        "appliance",
        "A111 B48 B52 B76 S364 S342 S143 S102 A69 S120 S369 A47",
        "S395 S138 B115 S389 S368 S393 K27 S144 A100",
    ),
    "large_appliance": _group("appliance", "A128 K29 B65 B44 S132 A16", "A151 S131 S149 K86"),
    "frame": _group("picture", "S113 S114"),
    "rug": _group("rug", "K85 S207 S343 A170"),
    "door": _group("door", "S52 S216 K8 K9 K11"),
}
"""All groups of models, by the name that `themes` asks for them with."""

MAX_TRANSPARENT_SHARE = 0.4
"""No listed model has more see-through surface than this, except of `OPAQUE_CLASSES`."""

OPAQUE_CLASSES = frozenset({"bottle", "food", "lamp"})
"""Classes whose glass is rendered opaque: what is behind a bottle would otherwise be its label."""


def class_of(code: str) -> str:
    """Raw class of a model code; procedural models (`vase:...`) name theirs before the colon.

    Raises:
        KeyError: no group has such a model.
    """
    if ":" in code:
        return code.partition(":")[0]
    for group in GROUPS.values():
        if code in group.seen or code in group.held_out:
            return group.raw_class
    raise KeyError(code)


def all_codes() -> list[str]:
    """Every model code once, sorted."""
    return sorted({code for group in GROUPS.values() for code in group.seen + group.held_out})
