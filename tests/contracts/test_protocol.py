"""Protocols and recipes: what can be said, what is refused, and which settings count."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from probing import protocol

from upbench.contracts.protocol import OPTIMIZERS, SCHEDULES, Output, Protocol, Recipe, Scoring
from upbench.errors import UpbenchError
from upbench.protocols.geometry import SquareCrop
from upbench.registry import find_protocol, plugins


@pytest.fixture(autouse=True)
def _table():
    """Protocols of a test are forgotten after it."""
    plugins("protocol")
    before = dict(Protocol.registered)
    yield
    Protocol.registered.clear()
    Protocol.registered.update(before)


def one_line(error: pytest.ExceptionInfo[UpbenchError], message: str) -> None:
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class TestProtocols:
    def test_our_own(self) -> None:
        own = {name: plugins("protocol")[name]() for name in ("quick", "standard")}
        assert {name: (p.label, p.geometry.size()) for name, p in own.items()} == {
            "quick": ("quick-v1", (224, 224)),
            "standard": ("standard-v1", (448, 448)),
        }
        assert own["quick"].recipe == own["standard"].recipe == Recipe()

    @pytest.mark.parametrize("cls", plugins("protocol").values(), ids=lambda cls: cls.name)
    def test_every_registered_one_is_valid_and_describes_itself(self, cls) -> None:
        cls._check()
        one = cls()
        described = {name: value for name, value, _ in one.describe()}
        for name in Protocol.PARAMETERS:
            nested = any(key.startswith(f"{name}.") for key in described)
            assert nested or name in described
        facts = set(one.facts) - set(described)
        assert not facts, f"{cls.name} says where it read {facts}, which are no parameters"
        assert json.loads(json.dumps(one.to_dict())) == one.to_dict()

    def test_a_subclass_with_a_name_is_registered(self) -> None:
        class Mine(Protocol):
            name = "mine"
            geometry = SquareCrop(320)
            recipe = Recipe(epochs=20, schedule="epoch_cosine")

        assert plugins("protocol")["mine"] is Mine
        assert Mine().label == "mine-v1"

        class Later(Mine):
            name = "mine_2"
            version = 3

        assert Later().label == "mine_2-v3"
        assert Later().recipe.epochs == 20

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"geometry": None}, "protocol 'bad' has no geometry: set it to one, as in SquareCrop(224)"),
            ({"geometry": SquareCrop}, "has no geometry"),
            ({"geometry": 224}, "has no geometry"),
            ({"output": 448}, "protocol 'bad': 'output' must be of class Output"),
            ({"recipe": {"epochs": 3}}, "'recipe' must be of class Recipe"),
            ({"scoring": "frame"}, "'scoring' must be of class Scoring"),
            ({"sampling": "center"}, "unknown 'sampling' of protocol 'bad' 'center'; did you mean 'centre'?"),
            ({"guidance_size": "images"}, "did you mean 'image'?"),
            ({"backbone_statistics": "imgnet"}, "did you mean 'imagenet'?"),
            ({"guidance_statistics": "own"}, "unknown 'guidance_statistics' of protocol 'bad' 'own'"),
            ({"labels": "without other"}, "did you mean 'without_other'?"),
            ({"features_dtype": "bfloat16"}, "'bfloat16'; did you mean 'float16'?"),
            ({"version": 0}, "version must be a whole number of at least 1"),
            ({"version": True}, "version must be a whole number of at least 1"),
            ({"version": "1"}, "version must be a whole number of at least 1"),
            ({"task_recipes": "no"}, "'task_recipes' must be true or false"),
            ({"final_norm": 1}, "'final_norm' must be true or false"),
            ({"layers": 0}, "layers must be a whole number of at least 1"),
            ({"layers": True}, "layers must be a whole number of at least 1"),
            ({"layers": 4}, "layers is 1, or 4 for the head 'dpt'; got 4"),
            ({"objective": "probe3D"}, "did you mean 'probe3d'?"),
            ({"epochs": 3}, "protocol 'bad' has no parameter 'epochs'; it is one of its recipe"),
            ({"guidance_statistic": "none"}, "did you mean 'guidance_statistics'?"),
            (
                {"geometri": SquareCrop(4)},
                "protocol 'bad' has no parameter 'geometri'; did you mean 'geometry'?",
            ),
        ],
    )
    def test_what_no_protocol_can_mean_is_refused_when_it_is_written(self, values, message: str) -> None:
        with pytest.raises(UpbenchError) as error:
            type("Bad", (Protocol,), {"name": "bad", "geometry": SquareCrop(224), **values})
        one_line(error, message)
        assert "bad" not in plugins("protocol"), "what is refused is not offered"

    def test_helpers_of_a_protocol_are_its_own_business(self) -> None:
        class Helped(Protocol):
            name = "helped"
            geometry = SquareCrop(224)
            _epochs = {"coco": 5}
            lists = ("a", "b")
            EPOCHS = 20

            @property
            def longest(self) -> int:
                return 3

            def recipe_for(self, task=None, user=None, dataset: str = "") -> Recipe:
                epochs = self._epochs.get(dataset, self.EPOCHS)
                return super().recipe_for({"epochs": epochs}, user, dataset)

        assert Helped().recipe_for(dataset="coco").epochs == 5
        assert Helped().recipe_for(dataset="voc").epochs == 20
        assert Helped().recipe_for(user={"epochs": 1}, dataset="voc").epochs == 1

    def test_a_protocol_of_two_papers_has_two_names(self) -> None:
        class Both(Protocol):
            name = "both"
            other_names = ("the-other",)
            geometry = SquareCrop(224)

        assert find_protocol("the-other") is find_protocol("both") is Both
        assert "the-other" not in plugins("protocol"), "it is listed once"
        with pytest.raises(UpbenchError, match="did you mean 'the-other'"):
            find_protocol("the-othr")

    def test_an_abstract_step_needs_no_geometry(self) -> None:
        class Family(Protocol):
            task_recipes = False

        class Member(Family):
            name = "member"
            geometry = SquareCrop(224)

        assert not Member().task_recipes

    def test_describe_lists_every_parameter_with_where_it_was_read(self) -> None:
        facts = {"recipe.lr": "train config, line 12", "geometry.side": "transforms.py", "labels": "paper"}
        one = protocol(
            geometry=SquareCrop(448, "bilinear"),
            recipe=Recipe(lr=5e-4),
            output=Output("fixed", side=112),
            scoring=Scoring(at="stored"),
            facts=facts,
        )
        found = {name: (value, fact) for name, value, fact in one.describe()}
        assert found["geometry"] == ("SquareCrop", "")
        assert found["geometry.side"] == (448, "transforms.py")
        assert found["geometry.filter"] == ("bilinear", "")
        assert found["recipe.lr"] == (5e-4, "train config, line 12")
        assert found["output.side"] == (112, "")
        assert found["scoring.at"] == ("stored", "")
        assert found["labels"] == ("all", "paper")
        nested = {"recipe": Recipe, "output": Output, "scoring": Scoring, "geometry": SquareCrop}
        expected = {n for n in Protocol.PARAMETERS if n not in nested} | {"geometry"}
        for name, kind in nested.items():
            expected |= {f"{name}.{field.name}" for field in dataclasses.fields(kind)}
        assert set(found) == expected
        annotated = {n for n, kind in Protocol.__annotations__.items() if not kind.startswith("ClassVar")}
        assert set(Protocol.PARAMETERS) == annotated, "a parameter that is not described"

    def test_two_protocols_that_differ_are_told_apart_in_records(self) -> None:
        plain = protocol().to_dict()
        for change in (
            {"geometry": SquareCrop(25)},
            {"recipe": Recipe(lr=0.02)},
            {"output": Output(factor=2)},
            {"scoring": Scoring(other=False)},
            {"sampling": "pillow"},
            {"guidance_statistics": "imagenet"},
            {"task_recipes": False},
        ):
            assert protocol(**change).to_dict() != plain


class TestRecipes:
    def test_the_users_settings_come_last(self) -> None:
        one = protocol(recipe=Recipe(epochs=20, lr=0.1, batch_size=4))
        assert one.recipe_for() == one.recipe
        found = one.recipe_for({"epochs": 5, "lr": 0.2}, {"lr": 0.3})
        assert (found.epochs, found.lr, found.batch_size) == (5, 0.3, 4)

    def test_tasks_have_a_say_where_the_protocol_lets_them(self) -> None:
        one = protocol(recipe=Recipe(epochs=20), task_recipes=False)
        assert one.recipe_for({"epochs": 5}).epochs == 20
        assert one.recipe_for({"epochs": 5}, {"epochs": 2}).epochs == 2

    @pytest.mark.parametrize("whose", ["task", "user"])
    def test_a_setting_that_no_recipe_has_is_named(self, whose: str) -> None:
        with pytest.raises(UpbenchError) as error:
            protocol().recipe_for(**{whose: {"epoch": 3}})
        one_line(error, "unknown probe setting 'epoch'; did you mean 'epochs'?")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"epochs": 0}, "probe epochs must be a whole number from 1 to 100000, got 0"),
            ({"epochs": 1.5}, "epochs must be a whole number from 1 to 100000, got 1.5"),
            ({"epochs": True}, "epochs must be a whole number from 1 to 100000, got True"),
            ({"epochs": "3"}, "epochs must be a whole number from 1 to 100000, got '3'"),
            ({"batch_size": -1}, "batch_size must be a whole number from 1"),
            ({"crop": 0.0}, "crop must be a number above 0 and at most 1"),
            ({"crop": 1.5}, "crop must be a number above 0 and at most 1"),
            ({"warmup": -0.1}, "warmup must be a number of at least 0 and at most 1"),
            ({"lr": 0.0}, "lr must be a number above 0 and at most 10"),
            ({"lr": "1e-3"}, "lr must be a number above 0 and at most 10, got '1e-3'"),
            ({"lr": math.nan}, "lr must be a number above 0"),
            ({"weight_decay": math.inf}, "weight_decay must be a number of at least 0"),
            ({"weight_decay": None}, "weight_decay must be a number of at least 0 and at most 10, got None"),
            ({"lr_floor": 1.01}, "lr_floor must be a number of at least 0 and at most 1"),
            ({"flip": -1}, "flip must be a number of at least 0 and at most 1"),
            ({"shrinkage": -1.0}, "shrinkage must be a number of at least 0 and at most 1000"),
            ({"schedule": "cosin"}, "unknown probe schedule 'cosin'; did you mean 'cosine'?"),
            ({"optimizer": "adamW"}, "unknown probe optimizer 'adamW'; did you mean 'adamw'?"),
            ({"optimizer": None}, "unknown probe optimizer 'None'"),
            ({"bias_lr": "comon"}, "did you mean 'common'?"),
            ({"init": "convolution"}, "unknown probe init 'convolution'"),
            ({"order": "share"}, "did you mean 'shared'?"),
            ({"head": "DPT"}, "unknown probe head 'DPT'"),
            ({"trained_on": "methods"}, "did you mean 'method'?"),
            ({"first_lr": -1.0}, "probe first_lr must be a number of at least 0"),
            ({"cls_token": "unti"}, "did you mean 'unit'?"),
            ({"decay_bias": 1}, "decay_bias must be true or false, got 1"),
        ],
    )
    def test_bad_values_are_named_in_one_line(self, settings, message: str) -> None:
        with pytest.raises(UpbenchError) as error:
            protocol().recipe_for(user=settings)
        one_line(error, message)

    def test_everything_between_is_taken(self) -> None:
        for name, values in {
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
            "shrinkage": (None, 0, 1000),
            "crop": (1, 0.01),
            "lr": (1e-9, 10),
            "flip": (0, 1, 0.5),
        }.items():
            for value in values:
                assert getattr(Recipe(**{name: value}), name) == value

    def test_records_hold_plain_values(self) -> None:
        recipe = Recipe(shrinkage=None, cls_token="unit")
        assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


class TestOutputs:
    @pytest.mark.parametrize(
        ("output", "size"),
        [
            (Output(), (480, 854)),
            (Output("image", 0.5), (240, 427)),
            (Output("features"), (34, 61)),
            (Output("features", 2.0), (68, 122)),
            (Output("fixed", side=112), (112, 112)),
            (Output("image", 1e-6), (1, 1)),
        ],
    )
    def test_sizes(self, output: Output, size: tuple[int, int]) -> None:
        assert output.size((480, 854), (34, 61)) == size

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"of": "feature"}, "unknown output size 'feature'; did you mean 'features'?"),
            ({"of": "fixed"}, "output side must be a whole number from 1 to 1000000, got 0"),
            ({"factor": 0}, "output factor must be a number above 0 and at most 1000, got 0"),
            ({"factor": math.nan}, "output factor must be a number above 0"),
            ({"factor": math.inf}, "output factor must be a number above 0"),
        ],
    )
    def test_impossible_ones_are_refused(self, values, message: str) -> None:
        with pytest.raises(UpbenchError) as error:
            Output(**values)
        one_line(error, message)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"at": "frames"}, "unknown scoring 'at' 'frames'; did you mean 'frame'?"),
            ({"enlarge": "label"}, "unknown scoring 'enlarge' 'label'; did you mean 'labels'?"),
        ],
    )
    def test_impossible_scorings_are_refused(self, values, message: str) -> None:
        with pytest.raises(UpbenchError) as error:
            Scoring(**values)
        one_line(error, message)
