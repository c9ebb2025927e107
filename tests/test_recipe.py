"""Recipes: strict keys, overrides, options checked against the dataclasses that receive them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bitwright.driver import Stop
from bitwright.errors import BitwrightError, RecipeError
from bitwright.recipe import bundled_recipes, load_recipe, make_options, override, parse_yaml
from bitwright.training import FinetuneOptions


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipe_is_valid_and_survives_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_the_recipes_of_the_readme_are_bundled() -> None:
    wanted = {"digits-sdq", "cifar10-resnet20-sdq", "cifar10-resnet20-sdq-quick", "cifar10-resnet20-sdq-quick-a4"}
    assert wanted | {"imagenet-resnet18-sdq", "imagenet-mobilenetv2-sdq"} <= set(bundled_recipes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("serch={}", "unknown key 'serch'; did you mean 'search'?"),
        ("search.metod=sdq", "unknown key 'search.metod'; did you mean 'method'?"),
        ("search.options.epoch=1", "unknown key 'search.options.epoch'; did you mean 'epochs'?"),
        ("finetune.learning_rate=1", "unknown key 'finetune.learning_rate'; known: epochs"),
        ("float.epoch=1", "unknown key 'float.epoch'; did you mean 'epochs'?"),
        ("quantize.quantiser=lsq", "unknown key 'quantize.quantiser'; did you mean 'quantizer'?"),
        ("teacher.wieghts=x", "unknown key 'teacher.wieghts'; did you mean 'weights'?"),
        ("baselines.finetune.lrr=1", "unknown key 'baselines.finetune.lrr'; did you mean 'lr'?"),
        ("export.options.batchnrm=1", "unknown key 'export.options.batchnrm'; did you mean 'batchnorm'?"),
        ("data.held_out=many", "data.held_out is 'many'; expected a valid integer"),
        ("data.held_out=0", "data.held_out is 0; expected greater than or equal to 1"),
        ("finetune.epochs=2.5", "finetune.epochs is 2.5; expected a valid integer"),
        ("finetune.optimizer=sdg", "finetune.optimizer is 'sdg'; expected 'sgd' or 'adam'"),
        ("finetune.ema=1.5", "ema"),
        ("search.budgets=[]", "search.budgets is []"),
        ("search.pin_first=8", "search.pin_first is 8; expected [weight width, activation width], 'free'"),
        ("search.method=sqd", "unknown method 'sqd'; did you mean 'sdq'"),
        ("baselines.methods=[unifrom]", "unknown method 'unifrom'; did you mean 'uniform'"),
        ("export.to=paked", "no format 'paked'; did you mean 'packed'?"),
        ("data=7", "data is 7; expected a valid dictionary"),
        ("seed=-1", "seed is -1"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(tiny: dict[str, Any], change: str, message: str) -> None:
    with pytest.raises(BitwrightError) as caught:
        load_recipe(tiny, [change])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_says_how_to_give_it(tiny: dict[str, Any]) -> None:
    del tiny["model"]
    with pytest.raises(RecipeError, match=r"key 'model' is missing; add it, or give it with --set model=…"):
        load_recipe(tiny)


def test_an_unknown_name_gives_the_nearest_bundled_recipe() -> None:
    with pytest.raises(RecipeError, match=r"recipe 'digit-sdq': no bundled recipe and no file of that name; did you mean 'digits-sdq'\?"):
        load_recipe("digit-sdq")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "found list, expected sections"),
        ("", "found NoneType, expected sections"),
        ("a: [1,\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "key 'seed' is given twice"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(path)


def test_override_makes_sections_and_keeps_the_original() -> None:
    data: dict[str, Any] = {"float": None, "a": {"b": 1}}
    assert override(data, "float.epochs=3") == {"float": {"epochs": 3}, "a": {"b": 1}}
    assert override(data, "a.b=[1, x]")["a"] == {"b": [1, "x"]}
    assert override(data, "a.b=weight_bits<=2") == {"float": None, "a": {"b": "weight_bits<=2"}}
    assert data == {"float": None, "a": {"b": 1}}


@pytest.mark.parametrize("text", ["epochs", "=3", "a..b=3"])
def test_override_needs_key_and_value(text: str) -> None:
    with pytest.raises(RecipeError, match="expected key=value"):
        override({}, text)


def test_override_does_not_enter_a_value() -> None:
    with pytest.raises(RecipeError, match="'seed' is 3, not a section"):
        override({"seed": 3}, "seed.x=1")


def test_overrides_reach_the_recipe(tiny: dict[str, Any]) -> None:
    recipe = load_recipe(tiny, ["search.budgets=bitops<=W3A3", "teacher=null", "finetune.lr=1e-3", "seed=4"])
    assert recipe.search.budgets == ["bitops<=W3A3"]
    assert recipe.teacher is None
    assert recipe.finetune is not None
    assert make_options(FinetuneOptions, recipe.finetune, "finetune").lr == 1e-3
    assert recipe.seed == 4


def test_the_shorthands_mean_what_they_say(tiny: dict[str, Any]) -> None:
    recipe = load_recipe(tiny)
    assert recipe.teacher is not None
    assert recipe.teacher.name == "float"
    assert load_recipe(tiny, ["search.pin_first=[8, 4]"]).search.pin_first == (8, 4)
    assert load_recipe(tiny, ["search.pin_last=free"]).search.pin_last == "free"


def test_make_options_takes_dataclasses_only() -> None:
    assert make_options(Stop, {"seconds": "2"}, "stop") == Stop(seconds=2.0)
    with pytest.raises(RecipeError, match="int is no dataclass of options"):
        make_options(int, {}, "x")


def test_yaml_is_read_safely() -> None:
    assert parse_yaml("1e-3", "x") == "1e-3"
    with pytest.raises(RecipeError, match="x: not valid YAML"):
        parse_yaml("{", "x")


def test_quality_is_a_list_or_says_how_often(tiny: dict[str, Any]) -> None:
    listed = load_recipe(tiny, ["data.quality={corruptions: [fog, snow], severities: [1, 3], clean: 0.1, held_out: [frost]}"])
    assert listed.data.quality is not None
    mix = listed.data.quality.mix()
    assert (dict(mix.corruptions), dict(mix.severities), mix.clean, mix.held_out) == ({"fog": 1, "snow": 1}, {1: 1, 3: 1}, 0.1, ("frost",))
    weighed = load_recipe(tiny, ["data.quality={corruptions: {fog: 2, snow: 1}}"])
    assert weighed.data.quality is not None
    assert weighed.data.quality.mix().corruptions == {"fog": 2, "snow": 1}
    assert load_recipe(weighed.to_dict()) == weighed


def test_what_a_recipe_does_not_have_leaves_no_trace(tiny: dict[str, Any]) -> None:
    data = load_recipe(tiny).to_dict()
    assert "quality" not in data["data"]
    assert "evaluate" not in data
    assert "stop_at" not in data["search"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.quality={corruption: [fog]}", "unknown key 'data.quality.corruption'; did you mean 'corruptions'?"),
        ("data.quality={corruptions: [fogg]}", "no corruption 'fogg'; did you mean 'fog'?"),
        ("data.quality={corruptions: [fog, fog]}", "one is given twice"),
        ("data.quality={severities: [6]}", "quality: severity 6; severities are the whole numbers 1 (mild) to 5"),
        ("data.quality={clean: 2}", "quality: clean is 2.0"),
        ("data.quality={corruptions: [fog], held_out: [fog]}", "'fog' is held out and among the corruptions"),
        ("evaluate={condition: clean}", "unknown key 'evaluate.condition'; did you mean 'conditions'?"),
        ("evaluate={conditions: 'clean,fog:6'}", "severity '6' of fog; give fog:1 to fog:5"),
        ("search.stop_at=clean>=0.9", "'sdq' trains the weights while it searches, so no policy before its last can be judged by itself"),
        ("finetune.stop_at=clean>=90", "stop_at is 'clean>=90'; give a condition and a fraction"),
    ],
)
def test_quality_that_cannot_be(tiny: dict[str, Any], change: str, message: str) -> None:
    with pytest.raises(BitwrightError) as caught:
        load_recipe(tiny, [change])
    assert message in str(caught.value)
