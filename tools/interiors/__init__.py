"""The generator of `interiors`: furnishes rooms, renders them, and writes their exact ground truth.

    pip install -e '.[render]'  # in the repository's root, as all that follows
    apt-get install libllvm19 sweethome3d-furniture
    npm install --prefix ~/.cache/upbench/render @pmndrs/assets
    python -m tools.interiors --split train --seed 5000 --count 8 --out rendered
    upbench run --datasets interiors:rendered ...

The packed scenes are seeds 1000 to 1097 of `train`, 2000 to 2023 of `val` and 3000 to 3023 of `val_heldout`,
less those in `dropped.json`, at the default size and samples.

The path of a scene through the modules: `models` (which model is what, and which split may show it) ->
`catalogue` and `mesh` (furniture files to meshes) -> `layout`, `room` and `themes` (what stands where) with
`materials` and `textures` (what it looks like) -> `lights` -> `camera` (the best of several views) ->
`truth` (label, depth, normals) and `film` (the image) -> `scene` (all of it together) -> `__main__` (the
files).

Needs the extra `render`, the LLVM library that Mitsuba compiles with, and two collections of free assets; see
`assets`. No module here imports torch.
"""
