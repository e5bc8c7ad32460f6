"""The contract of a method itself: defaults, options, cameras."""

from __future__ import annotations

import pytest
import torch

from upbench.contracts.backbone import BackboneInfo
from upbench.contracts.image import normalize_image
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.errors import UpbenchError
from upbench.testing import assert_close


class WithOptions(Upsampler):
    """Not registered: it has no name of its own."""

    def __init__(self, channels: int = 384, *, radius: int = 2, mode: str = "fast") -> None:
        super().__init__(channels)
        if radius < 1:
            raise ValueError("radius must be at least 1")
        self.radius, self.mode = radius, mode

    def forward(self, image, features, output_size):
        return features


WithOptions.name = "with_options"  # set after the class body, so that the registry does not see it


def test_options_are_read_from_the_constructor():
    assert WithOptions.option_names() == ("radius", "mode")
    built = WithOptions.build(channels=8, radius=3)
    assert (built.channels, built.radius, built.mode) == (8, 3, "fast")


def test_unknown_option_suggests_the_nearest():
    with pytest.raises(
        UpbenchError, match="unknown option of method 'with_options' 'radios'; did you mean 'radius'"
    ):
        WithOptions.build(radios=3)


def test_refused_value_is_one_line():
    with pytest.raises(UpbenchError, match=r"refuses.*radius must be at least 1") as caught:
        WithOptions.build(radius=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [True, 1.5, "3", None, [3]])
def test_kinds_of_options_are_read_from_the_constructor(value):
    with pytest.raises(UpbenchError, match="option 'radius' of method 'with_options' must be a whole number"):
        WithOptions.build(radius=value)


def test_camera_shapes_are_checked():
    Camera(torch.ones(2, 4), torch.eye(4).expand(2, 4, 4))
    with pytest.raises(UpbenchError, match=r"intrinsics must be \[B, 4\]"):
        Camera(torch.ones(4))
    with pytest.raises(UpbenchError, match=r"pose must be \[2, 4, 4\]"):
        Camera(torch.ones(2, 4), torch.eye(4)[None])


def test_normalize_image():
    image = torch.rand(2, 3, 4, 5)
    out = normalize_image(image, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    assert_close(out[:, 2], (image[:, 2] - 0.3) / 4)


def test_license_under_the_name_of_the_first_edition():
    class Old(WithOptions):
        licence = "MIT"

    class Heir(Old):
        pass

    class New(Old):
        license = "BSD"

    spelt = [(cls.license, cls.licence) for cls in (WithOptions, Old, Heir, New)]
    assert spelt == [("", ""), ("MIT", "MIT"), ("MIT", "MIT"), ("BSD", "BSD")]
    assert BackboneInfo("b", 3, 4, "random", licence="MIT") == BackboneInfo("b", 3, 4, "random", "MIT")
    assert BackboneInfo("b", 3, 4, "random", license="MIT").licence == "MIT"
