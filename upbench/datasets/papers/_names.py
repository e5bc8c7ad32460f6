"""Class names, in the order of the official label values."""

from __future__ import annotations


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


VOC21 = _names(
    """
    background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse,
    motorbike, person, pottedplant, sheep, sofa, train, tvmonitor
    """
)
"""PASCAL VOC 2012: values 0 to 20."""

ADE150 = _names(
    """
    wall, building, sky, floor, tree, ceiling, road, bed , windowpane, grass, cabinet, sidewalk, person,
    earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
    mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base,
    box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator,
    grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge,
    bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island,
    computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier,
    awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
    escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer,
    plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture,
    hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board,
    shower, radiator, glass, clock, flag
    """
)
"""ADE20K, SceneParsing: values 1 to 150, by falling share of the pixels."""

CITYSCAPES19 = _names(
    """
    road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky,
    person, rider, car, truck, bus, train, motorcycle, bicycle
    """
)
"""Cityscapes: the train ids 0 to 18."""

COCO_STUFF182 = _names(
    """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street
    sign, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
    hat, backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
    kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup,
    fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
    chair, couch, potted plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse,
    remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase,
    scissors, teddy bear, hair drier, toothbrush, hair brush, banner, blanket, branch, bridge, building-other,
    bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter,
    cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone,
    floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other,
    hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement,
    pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug,
    salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other,
    table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel,
    wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
    """
)
"""COCO-Stuff: values 0 to 181, of which eleven (`COCO_STUFF_UNUSED`) never occur."""

COCO_STUFF_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
"""Values of things that were planned and never annotated."""

COCO_STUFF27 = _names(
    """
    electronic-things, appliance-things, food-things, furniture-things, indoor-things, kitchen-things,
    accessory-things, animal-things, outdoor-things, person-things, sports-things, vehicle-things,
    ceiling-stuff, floor-stuff, food-stuff, furniture-stuff, rawmaterial-stuff, textile-stuff, wall-stuff,
    window-stuff, building-stuff, ground-stuff, plant-stuff, sky-stuff, solid-stuff, structural-stuff,
    water-stuff
    """
)
"""COCO-Stuff, coarse, in the order of IIC (Ji et al. 2019): things 0 to 11, stuff 12 to 26."""

COCO_STUFF_COARSE = (
    9, 11, 11, 11, 11, 11, 11, 11, 11, 8, 8, 8, 8, 8, 8, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 6, 6, 6, 6, 6, 6, 6,
    6, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 5, 5, 5, 5, 5, 5, 5, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3,
    3, 3, 3, 3, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 4, 4, 17, 17, 22, 20, 20,
    22, 15, 25, 16, 13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, 13, 13, 13, 13, 13, 22, 26, 14, 14,
    15, 22, 21, 21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17, 25, 16, 21, 17, 22, 16, 21, 21, 25, 21, 26,
    21, 24, 20, 17, 14, 21, 26, 15, 23, 20, 21, 24, 15, 24, 22, 25, 15, 20, 17, 17, 22, 14, 18, 18, 18, 18,
    18, 18, 18, 26, 26, 19, 19, 24,
)  # fmt: skip
"""Value 0 to 181 -> coarse class, by the official hierarchy of labels."""

CONTEXT59 = _names(
    """
    aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car,
    cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass,
    ground, horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road,
    rock, sheep, shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall,
    water, window, wood
    """
)
"""PASCAL Context: values 1 to 59."""
