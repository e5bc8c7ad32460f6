"""RaysUp's ablations: encoders, positions, windows, ray coordinates; their checkpoints and contracts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.sample import Camera
from upbench.cost.macs import count_macs
from upbench.errors import UpbenchError
from upbench.layers.raysup_options import POSITIONS
from upbench.methods.raysup import ENCODERS, RaysUp
from upbench.ops.window.attention import QueryRows, window_attention
from upbench.run.config import RunConfig
from upbench.system.checkpoint import read_metadata
from upbench.testing import METHOD_CHECKS, MethodCase, NotApplicable, assert_close
from upbench.testing.closeness import allowed, relative_error
from upbench.weights.load import load_method

ROUNDING = allowed(torch.float32)
PARAMETERS = {"decoupled": 102_592, "parallel": 144_512, "multi": 268_544, "dual": 662_528, "single": 266_240}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"encoder {name}": {"encoder": name} for name in ENCODERS if name != "decoupled"},
    **{f"position {name}": {"position": name} for name in ("rope", "sinrays", "none")},
    "plucker": {"ray_coordinates": "plucker"},
    "original size": {"original_size": "image"},
    "window 5": {"kernel_size": 5},
    "everything": {"encoder": "dual", "position": "sinrays", "ray_coordinates": "plucker", "kernel_size": 3},
}


def inputs(batch: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 42, 56), torch.randn(batch, 16, 6, 8)


def posed(place: tuple[float, float, float], batch: int = 1) -> Camera:
    """A camera that looks to the right and stands at a place."""
    pose = torch.tensor([[0.0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]]).repeat(batch, 1, 1)
    pose[:, :3, 3] = torch.tensor(place)
    return Camera(torch.tensor([[60.0, 50.0, 28.0, 21.0]]).repeat(batch, 1), pose)


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_of_the_encoders(name: str) -> None:
    method = load_method("raysup", "none", encoder=name)
    assert sum(p.numel() for p in method.parameters()) == PARAMETERS[name]


def test_parameters_of_the_positions() -> None:
    counts = {p: sum(t.numel() for t in RaysUp(position=p).parameters()) for p in ("rope", "none", "sinrays")}
    assert counts["rope"] == counts["none"] == 102_592
    assert counts["sinrays"] == 102_592 + 60 * 256 + 256  # 6 coordinates, 5 frequencies, sine and cosine


@pytest.mark.parametrize("variant", VARIANTS)
def test_contract(variant: str) -> None:
    options = VARIANTS[variant]
    case = MethodCase(RaysUp, {"dim": 256 if options.get("position") == "sinrays" else 64, **options})
    for name, check in METHOD_CHECKS.items():
        if name == "camera" and options.get("position") in ("rope", "none"):
            continue  # takes one and has no use for it: tested below
        try:
            check(case)
        except NotApplicable:
            continue


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoints_tell_what_they_can(variant: str) -> None:
    """The encoder and what else has parameters of its own are read from the tensors."""
    options = VARIANTS[variant]
    saved = load_method("raysup", "none", channels=16, dim=128, seed=3, **options)
    telling = {k: v for k, v in options.items() if k == "encoder" or v == "sinrays"}
    told = RaysUp.options_from(saved.state_dict())
    assert told == {"encoder": "decoupled", "dim": 128, **telling}
    silent = {key: value for key, value in options.items() if key not in telling}
    loaded = load_method("raysup", saved.state_dict(), channels=16, **silent)
    image, features = inputs()
    with torch.no_grad():
        assert_close(loaded(image, features, (42, 56)), saved(image, features, (42, 56)))


def test_official_names_of_the_other_encoders() -> None:
    names = {"center": "1x1", "horizontal": "1x3", "vertical": "3x1", "square": "3x3"}
    for encoder in ("parallel", "multi"):
        ours = RaysUp(dim=64, encoder=encoder).state_dict()
        theirs = {}
        for key, tensor in ours.items():
            _, branch, rest = key.split(".", 2)
            theirs[f"image_tokenizer.img_encoder.enc_{names[branch]}.{rest}"] = tensor
        assert RaysUp.options_from(theirs) == {"encoder": encoder, "dim": 64}
        assert RaysUp.convert_state(theirs).keys() == ours.keys()


def test_checkpoints_that_fit_no_encoder() -> None:
    state = RaysUp(dim=64, encoder="parallel").state_dict()
    lacking = {key: value for key, value in state.items() if "vertical" not in key}
    with pytest.raises(UpbenchError, match=r"no encoder with the branches .* horizontal \(1\), square \(1\)"):
        load_method("raysup", lacking)
    with pytest.raises(UpbenchError, match="has encoder=parallel, asked for encoder=dual"):
        load_method("raysup", state, encoder="dual")
    with pytest.raises(UpbenchError, match="has encoder=decoupled, asked for encoder=multi"):
        load_method("raysup", encoder="multi")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "paralel"}, "unknown encoder of raysup 'paralel'; did you mean 'parallel'?"),
        ({"position": "raype"}, "unknown position of raysup 'raype'; did you mean 'rayPE'?"),
        ({"position": None}, "unknown position of raysup 'None'; did you mean 'none'?"),
        ({"ray_coordinates": "plücker"}, "did you mean 'plucker'?"),
        ({"original_size": "images"}, "did you mean 'image'?"),
        ({"position": "sinrays", "dim": 32}, "dim 32 is too small for position 'sinrays'; 48 at least"),
        ({"kernel_size": 0}, "kernel_size 0 is not positive"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UpbenchError) as error:
        RaysUp.build(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_heads_are_consecutive_channels_of_the_branches(encoder: str) -> None:
    """The whole method against its formula: all branches, one concatenation, one rotation of each head."""
    model = RaysUp(channels=16, encoder=encoder).eval()
    image, features = inputs()
    size = (21, 28)
    with torch.no_grad():
        encoding = torch.cat([branch(image) for branch in model.encoder.children()], 1)
        rotated = []
        for grid in (size, (6, 8)):
            x = F.adaptive_avg_pool2d(encoding, grid).view(4, 64, *grid)
            angles = torch.zeros(32, *grid)
            i = torch.arange(grid[0]).view(-1, 1).expand(grid)
            j = torch.arange(grid[1]).expand(grid)
            ray = torch.stack([(j + 0.5) / grid[1] - 0.5, (i + 0.5) / grid[0] - 0.5, torch.ones(grid)])
            ray = ray / ray.norm(dim=0)
            for k in range(5):
                angles[6 * k + 3 : 6 * k + 6] = 2 * torch.pi / 8 * 3**k * ray
            a, b = x[:, :32], x[:, 32:]
            halves = [a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin()]
            rotated.append(torch.cat(halves, 1).view(1, 256, *grid))
        tables = model.tables((6, 8), size)
        expected = window_attention(*rotated, features, *tables, heads=4, backend="reference")
        assert_close(model(image, features, size), expected)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_positions_that_need_no_camera(position: str) -> None:
    model = RaysUp(channels=16, position=position).eval()
    image, features = inputs()
    with torch.no_grad():
        plain = model(image, features, (42, 56))
        assert_close(model(image, features, (42, 56), camera=posed((1, 2, 3))), plain)


def test_rope_is_a_function_of_the_distance_between_cells() -> None:
    """On a uniform image, logits depend on the offset alone; without positions they are all equal."""
    image = torch.zeros(1, 3, 48, 48)
    for position in ("rope", "none"):
        model = RaysUp(channels=16, position=position).eval()
        with torch.no_grad():
            queries, keys = model.encode(image, (8, 8), (8, 8), None)
        q, k = (x.view(4, 64, 64).mean(0) for x in (queries, keys))
        logits = (q.T @ k).view(8, 8, 8, 8)
        near, also_near, far = logits[2, 2, 3, 3], logits[4, 3, 5, 4], logits[2, 2, 4, 4]
        assert_close(near, also_near)
        assert (far < near - 1) if position == "rope" else relative_error(far, near) <= ROUNDING


@pytest.mark.parametrize("position", ["rope", "sinrays"])
def test_every_position_begins_close_to_bilinear_interpolation(position: str) -> None:
    fine = F.interpolate(torch.randn(1, 8, 6, 6), (32, 32), mode="bicubic")
    coarse = F.adaptive_avg_pool2d(fine, 16)
    image = F.interpolate(torch.rand(1, 3, 4, 4), (64, 64), mode="bilinear")

    def error(name: str) -> float:
        method = load_method("raysup", "none", channels=8, position=name)
        with torch.no_grad():
            return float((method(image, coarse, (32, 32)) - fine).square().mean())

    assert error(position) < 0.6 * error("none")
    assert error(position) < 2 * error("rayPE")


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7, 8, 9])
def test_windows_of_any_size(kernel: int) -> None:
    """Each pixel sees exactly kernel x kernel features, one more before than after where that is even."""
    model = RaysUp(channels=16, kernel_size=kernel, position="none").eval()
    for branch in model.encoder.children():  # every logit is zero: a plain mean over the window
        nn.init.zeros_(branch[-1].conv2.weight)
    grid, ratio = 12, 3
    features = torch.randn(1, 16, grid, grid)
    with torch.no_grad():
        output = model(torch.randn(1, 3, 36, 36), features, (grid * ratio, grid * ratio))
    for pixel in (0, 5, 17, 20, 35):
        first = min(max(pixel // ratio - kernel // 2, 0), grid - kernel)
        window = features[:, :, first : first + kernel, first : first + kernel]
        assert_close(output[:, :, pixel, pixel], window.mean((2, 3)))


@pytest.mark.parametrize("position", ["rayPE", "sinrays"])
def test_plucker_equals_the_released_form_under_the_identity_pose(position: str) -> None:
    """Moments are zero where the origin is, and so are its angles."""
    torch.manual_seed(1)
    released = RaysUp(channels=16, position=position).eval()
    plucker = RaysUp(channels=16, position=position, ray_coordinates="plucker").eval()
    if released.ray_features is not None:
        nn.init.normal_(released.ray_features.projection.weight)
    plucker.load_state_dict(released.state_dict())
    image, features = inputs()
    identity = Camera(posed((0, 0, 0)).intrinsics, torch.eye(4)[None])
    with torch.no_grad():
        for camera in (None, Camera(identity.intrinsics), identity, posed((0, 0, 0))):
            expected = released(image, features, (42, 56), camera=camera)
            assert_close(plucker(image, features, (42, 56), camera=camera), expected)


def test_translation_matters_to_plucker_moments_and_not_to_the_released_form() -> None:
    image, features = inputs()
    with torch.no_grad():
        for coordinates in ("origin_direction", "plucker"):
            model = RaysUp(channels=16, ray_coordinates=coordinates).eval()
            here, there = (
                model(image, features, (42, 56), camera=posed(place)) for place in ((0, 0, 0), (0, 1, 2))
            )
            moved = relative_error(there, here)
            assert moved <= ROUNDING if coordinates == "origin_direction" else moved > 1e-2


def test_moments_are_those_of_the_line() -> None:
    """Moving the camera along a ray leaves that ray's moment, and so its angles, as they were."""
    from upbench.layers.rays import ray_angles, ray_directions, ray_moments

    image = torch.zeros(1, 3, 40, 60)
    camera = posed((0.3, -0.2, 0.5))
    directions = ray_directions(image, (4, 6), camera)
    step = directions[0, :, 1, 2]
    ahead = posed(tuple((torch.tensor([0.3, -0.2, 0.5]) + 1.7 * step).tolist()))  # type: ignore[arg-type]
    here, there = (ray_moments(directions, c) for c in (camera, ahead))
    assert here is not None
    assert there is not None
    assert_close(here[0, :, 1, 2], there[0, :, 1, 2])
    assert (here[0, :, 3, 5] - there[0, :, 3, 5]).abs().max() > 0.1
    assert_close((here * directions).sum(1), torch.zeros(1, 4, 6), scale=here)
    # the origin's period 4 for moments, 8 for directions
    angles = ray_angles(directions, 64, here)[0, 1, 2]
    assert angles.shape == (30,)
    assert_close(angles[6:9], 2 * torch.pi / 4 * 3 * here[0, :, 1, 2])
    assert_close(angles[9:12], 2 * torch.pi / 8 * 3 * step)


class _At(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([branch(image) for branch in self.model.encoder.children()], 1)


@pytest.mark.parametrize(("size", "published"), [(224, 10.17e9), (448, 40.67e9)])
def test_flops_that_the_paper_prints(size: int, published: float) -> None:
    """2 x (MACs + biases) of the released encoder's convolutions are the paper's 10.17 and 40.67 GFLOPs."""
    convolutions = [m for m in RaysUp().modules() if isinstance(m, nn.Conv2d)]
    per_pixel = sum(c.weight.numel() + c.weight.shape[0] for c in convolutions)
    assert 2 * per_pixel * size**2 == pytest.approx(published, rel=5e-4)
    small = count_macs(_At(RaysUp()), torch.randn(1, 3, 32, 32)).total
    assert small > (per_pixel - 896) * 32**2  # the counter adds the normalisations, and leaves out biases


def test_images_of_a_batch_with_different_cameras() -> None:
    """With the image's own size each is upsampled as if it were alone; the released form is not so."""
    image, features = inputs(2)
    views = Camera(torch.tensor([[60.0, 50.0, 28.0, 21.0], [90.0, 90.0, 20.0, 30.0]]))
    for form, apart in (("image", False), ("principal_point", True)):
        model = RaysUp(channels=16, original_size=form).eval()
        with torch.no_grad():
            both = model(image, features, (42, 56), camera=views)
            for i in range(2):
                one = Camera(views.intrinsics[i : i + 1])
                alone = model(image[i : i + 1], features[i : i + 1], (42, 56), camera=one)
                differs = float((alone - both[i : i + 1]).abs().max()) > 1e-2
                assert differs == apart


def test_forms_of_the_original_size_agree_where_principal_points_are_centres() -> None:
    image, features = inputs()
    released = RaysUp(channels=16).eval()
    corrected = RaysUp(channels=16, original_size="image").eval()
    corrected.load_state_dict(released.state_dict())
    camera = Camera(torch.tensor([[60.0, 50.0, 28.0, 21.0]]))
    with torch.no_grad():
        first, second = (m(image, features, (42, 56), camera=camera) for m in (released, corrected))
    assert_close(first, second)


def test_the_ablation_compares_what_was_trained_for_it(root: Path) -> None:
    """Every row of configs/raysup_ablation.yaml builds; rows share weights only where nothing was trained."""
    rows = [
        m for m in RunConfig.load(root / "configs" / "raysup_ablation.yaml").methods if m.name == "raysup"
    ]
    for row in rows:
        RaysUp.build(**row.options)
    plain = {row.weights for row in rows if not row.options and not row.camera}
    assert plain == {"results/raysup_ablation/released.safetensors"}
    trained = [row for row in rows if row.weights not in plain]
    assert len({row.weights for row in trained}) == len(trained) == 11
    tried = {(key, value) for row in trained for key, value in row.options.items()}
    assert {value for key, value in tried if key == "encoder"} == set(ENCODERS) - {"decoupled"}
    assert {value for key, value in tried if key == "position"} == set(POSITIONS) - {"rayPE"}
    assert {row.camera for row in rows} >= {"", "dataset", "dataset*2", "dataset*0.5"}


def test_the_variants_of_the_ablation_were_trained_with_one_budget(root: Path) -> None:
    """Each file has the options of its row, and the recipe, steps, seed and backbone of the others."""
    budgets = set()
    for row in RunConfig.load(root / "configs" / "raysup_ablation.yaml").methods:
        if row.name != "raysup" or row.camera:
            continue
        facts = read_metadata(root / row.weights)
        assert json.loads(facts["options"]) == dict(row.options)
        budgets.add(tuple(facts[name] for name in ("backbone", "recipe", "steps", "images_seen", "seed")))
        load_method("raysup", root / row.weights, **row.options)
    assert len(budgets) == 1


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("position", ["rayPE", "rope"])
def test_queries_in_strips_equal_queries_at_once(encoder: str, position: str) -> None:
    """Without gradients on a CPU, large images are encoded and rotated strip by strip."""
    method = load_method("raysup", "none", channels=8, encoder=encoder, position=position, kernel_size=5)
    image, features = torch.randn(2, 3, 100, 96), torch.randn(2, 8, 7, 6)
    for size in ((33, 45), (7, 1), (100, 96)):
        whole = method(image, features, size)
        assert whole.requires_grad
        with torch.no_grad():
            assert isinstance(method.encode(image, (7, 6), size, None)[0], QueryRows)
            strips = method(image, features, size)
        assert_close(strips, whole.detach())
