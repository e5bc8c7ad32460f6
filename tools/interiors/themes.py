"""What kind of room it is: which furniture goes where."""

from __future__ import annotations

import math
from collections.abc import Callable

from .layout import Furnisher
from .room import RoomBuilder
from .stage import Placed

SMALL = (
    "tableware", "made_bowl", "food", "small_plant", "vase", "made_vase", "bottle", "small_box", "made_books",
    "parcel", "toy", "frame", "appliance", "table_lamp", "clothing",
)  # fmt: skip
DINNER = ("tableware", "tableware", "made_bowl", "food", "food", "bottle", "small_plant", "vase", "made_vase")
DESK = (
    "laptop", "tablet", "table_lamp", "made_books", "small_box", "tableware", "frame", "small_plant",
    "appliance", "bottle", "toy",
)  # fmt: skip
FLOOR = ("clothing", "toy", "floor_toy", "floor_box")


def bedroom(f: Furnisher, room: RoomBuilder) -> None:
    """A bed, bedside tables, a wardrobe, a chest."""
    _ = f.at_wall("bed", ("back",)) or f.at_wall("bed")
    for _number in range(2):
        bedside = f.at_wall("bedside", ("back",))
        if bedside:
            f.on_top(bedside, ("table_lamp", "made_books", "frame", "vase", "made_vase", "small_plant"), 2)
    room.rug(f, f.rng.uniform(-0.6, 0.6), f.rng.uniform(-0.6, 0.3))
    f.at_wall("wardrobe", ("left", "right"))
    _with_things(f, "chest", SMALL, 4)
    f.at_wall("plant")
    f.at_wall("floor_lamp")
    f.scatter(("armchair", "chair", "stool"), 1)
    f.scatter(FLOOR, 3)


def living(f: Furnisher, room: RoomBuilder) -> None:
    """A sofa, a coffee table, a television, shelves."""
    f.at_wall("sofa", ("back",))
    room.rug(f, 0.0, 0.0)
    angle = float(f.rng.choice([0, 0, math.pi / 2]) + f.rng.normal(0, 0.08))
    table = f.at("coffee_table", f.rng.uniform(-0.4, 0.4), f.rng.uniform(-0.3, 0.3), angle)
    if table:
        f.on_top(table, (*DINNER, "made_books", "toy"), 5)
    stand = f.at_wall("tv_stand", ("left", "right"))
    if stand:
        f.on_top(stand, ("television",), 1, widest=1.6)
    f.at_wall("shelf")
    f.at_wall("plant")
    f.at_wall("floor_lamp")
    _with_things(f, "chest", SMALL, 4)
    f.scatter(("armchair", "armchair", "stool"), 2)
    f.scatter(FLOOR, 3)


def dining(f: Furnisher, room: RoomBuilder) -> None:
    """A table with chairs around it, a sideboard, kitchen appliances."""
    angle = float(f.rng.choice([0, math.pi / 2]) + f.rng.normal(0, 0.1))
    table = f.at("table", f.rng.uniform(-0.5, 0.5), f.rng.uniform(-0.2, 0.5), angle)
    if table:
        f.on_top(table, (*DINNER, "appliance"), 8)
        _chairs_around(f, table)
    f.at_wall("large_appliance")
    _with_things(f, "chest", (*DINNER, "appliance", "parcel"), 4)
    f.at_wall("shelf")
    f.at_wall("large_appliance")
    f.at_wall("plant")
    f.scatter(("floor_box", "clothing", "toy"), 2)


def office(f: Furnisher, room: RoomBuilder) -> None:
    """A desk with a chair, shelves."""
    desk = f.at_wall("desk")
    if desk:
        f.on_top(desk, DESK, 6)
        x, y = desk.local(0.0, -desk.size[1] / 2 - 0.25)
        f.at("office_chair", x, y, desk.angle + math.pi + f.rng.normal(0, 0.5))
    f.at_wall("shelf")
    f.at_wall("shelf")
    _with_things(f, "chest", SMALL, 4)
    room.rug(f, 0.0, 0.0)
    f.scatter(("armchair", "chair", "stool"), 2)
    f.at_wall("plant")
    f.at_wall("floor_lamp")
    f.scatter(FLOOR, 2)


def tabletop(f: Furnisher, room: RoomBuilder) -> Placed | None:
    """A table full of small things seen from close by; returns the table."""
    group = ("table", "desk", "coffee_table")[f.rng.integers(3)]
    depth = f.room.depth
    table = None
    for _ in range(8):
        x, y = f.rng.uniform(-0.3, 0.3), depth / 2 - f.rng.uniform(0.75, 1.3)
        table = f.at(group, x, y, f.rng.normal(0, 0.15))
        if table:
            break
    if table is None:
        return None
    f.on_top(table, (*SMALL, "laptop", "tablet"), int(f.rng.integers(11, 18)), widest=0.42)
    f.at_wall("shelf", ("back",))
    f.at_wall("plant")
    _with_things(f, "chest", SMALL, 3)
    f.scatter(("chair", "armchair"), 2)
    return table


THEMES: dict[str, Callable[[Furnisher, RoomBuilder], Placed | None]] = {
    "tabletop": tabletop,
    "living": living,
    "bedroom": bedroom,
    "dining": dining,
    "office": office,
}
"""Kind of scene -> what furnishes it; a tabletop returns the table to look at."""

CYCLE = ("tabletop", "living", "bedroom", "tabletop", "dining", "office", "tabletop")
"""Kinds in the order of the seeds: three out of seven scenes are tabletops."""


def hang_lamp(f: Furnisher) -> bool:
    """Hangs a lamp of the library from the ceiling; returns whether there was one."""
    picked = f.pick("ceiling_lamp")
    if picked is None:
        return False
    model, scale = picked
    x, y = f.rng.uniform(-0.5, 0.5), f.rng.uniform(-0.2, 0.8)
    f.add(
        model, "ceiling_lamp", x, y, f.room.height - model.size[2] * scale, f.rng.uniform(0, math.pi), scale
    )
    return True


def _with_things(f: Furnisher, group: str, things: tuple[str, ...], count: int) -> None:
    base = f.at_wall(group)
    if base:
        f.on_top(base, things, count)


def _chairs_around(f: Furnisher, table: Placed) -> None:
    picked = f.pick("chair")
    if picked is None:
        return
    model, scale = picked
    width, depth, _ = table.size
    places = [(-width / 4, -depth / 2 - 0.12, math.pi), (width / 4, -depth / 2 - 0.12, math.pi)]
    places += [(-width / 4, depth / 2 + 0.12, 0.0), (width / 4, depth / 2 + 0.12, 0.0)]
    places += [(-width / 2 - 0.15, 0.0, math.pi / 2), (width / 2 + 0.15, 0.0, -math.pi / 2)]
    if width < 1.0:  # a small table: one chair a side
        places = [(0.0, -depth / 2 - 0.15, math.pi), (0.0, depth / 2 + 0.15, 0.0), *places[4:]]
    for local_x, local_y, turn in places:
        if f.rng.random() < 0.3:
            continue
        x, y = table.local(local_x, local_y)
        angle = table.angle + turn + f.rng.normal(0, 0.12)
        if abs(x) + 0.25 > f.room.width / 2 or y + 0.25 > f.room.depth / 2:
            continue
        f.add(model, "chair", x, y, 0.0, angle, scale)
        f.reserve(x, y, 0.4, 0.4, 0.0)
