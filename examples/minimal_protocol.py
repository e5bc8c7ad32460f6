"""A protocol: whole images, a plain probe, flips. Try it with `--plugin examples/minimal_protocol.py
--protocol whole`."""

from upbench import NativeAspect, Protocol, Recipe


class Whole(Protocol):
    name = "whole"
    source = "an example"
    geometry = NativeAspect(short=224)
    recipe = Recipe(epochs=20, lr=5e-4, schedule="epoch_cosine", crop=1.0, shrinkage=None, flip=0.5)
    task_recipes = False
