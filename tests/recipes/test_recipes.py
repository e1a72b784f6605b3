"""Recipes by name, preset and key: what is typed is read as its type, what is mistyped gets the nearest."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from planish.errors import PlanishError
from planish.fit.reconstruct import Reconstruct
from planish.fit.spans import Stage
from planish.fit.whole import EndToEnd
from planish.quant import MinMax, Nearest, Offset, Searched
from planish.recipes import PRESETS, RECIPES, Recipe, build, describe, split_preset
from planish.recipes.signround import signround

EVERY_PRESET = [(name, preset) for name in RECIPES for preset in PRESETS[name]]


def fit_of(recipe: Recipe) -> Reconstruct:
    (stage,) = recipe.stages
    assert stage.fit is not None
    return stage.fit


@pytest.mark.parametrize(("name", "preset"), EVERY_PRESET)
def test_every_preset_builds(name: str, preset: str) -> None:
    recipe = build(name, preset)
    assert recipe.name == name and all(isinstance(stage, Stage | EndToEnd) for stage in recipe.stages)
    own, data = split_preset(name, preset)
    assert own.keys() | data.keys() == PRESETS[name][preset].keys() and data.keys() <= {"samples", "seqlen"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_explains_itself(name: str) -> None:
    facts = describe(name)
    assert facts["summary"].endswith(".") and facts["equation"]
    keys = inspect.signature(RECIPES[name]).parameters
    assert facts["help"].keys() == facts["keys"].keys() == keys.keys(), "every key has its line under Args"
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in keys.values())
    assert "default" in facts["presets"]


def test_rtn_is_the_start_itself() -> None:
    (plain,), (searched,) = build("rtn").stages, build("rtn", "best").stages
    assert (plain.range, plain.rounding, plain.fit, plain.needs_data) == (MinMax, Nearest, None, False)
    assert (searched.range, searched.fit, searched.needs_data) == (Searched, None, True)


def test_signround_defaults_and_presets() -> None:
    fit = fit_of(build("signround"))
    assert (fit.steps, fit.batch_size, fit.optimizer, fit.target) == (200, 8, "signsgd", "float")
    assert build("signround").stages[0].rounding is Offset and build("signround").needs_data
    assert [fit_of(build("signround", preset)).steps for preset in ("fast", "light", "best")] == [20, 50, 1000]
    paper = fit_of(build("signround", "paper"))
    assert (paper.rates["rounding"], paper.trim, paper.span, paper.steps) == (5e-3, 0, 1, 200)
    assert not build("signround", "paper").stages[0].importance
    assert split_preset("signround", "best")[1] == {"samples": 512}


def test_block_ap_starts_searched_and_paper_is_the_publications() -> None:
    (stage,) = build("block_ap").stages
    assert stage.importance and fit_of(build("block_ap")).rates.keys() == {"weight", "range.scale", "range.zero"}
    assert "norm" in fit_of(build("block_ap", None, {"norm_rate": 1e-5})).rates
    fit = fit_of(build("block_ap", "paper"))
    assert fit.rates == {"weight": 2e-5, "range.scale": 1e-4, "range.zero": 1e-4, "norm": 2e-5}
    assert (fit.optimizer, fit.batch_size, fit.epochs, fit.span, fit.trim) == ("adamw", 2, 2, 1, 0)
    assert split_preset("block_ap", "paper")[1] == {"samples": 4096}


def test_e2e_qp_trains_scales_and_zero_points_by_a_switch() -> None:
    recipe = build("e2e_qp")
    assert recipe.blocks == () and recipe.needs_data and recipe.whole is not None
    assert recipe.whole.rates.keys() == {"scale"} and recipe.whole.distill == 0 and recipe.whole.relative
    assert build("e2e_qp", None, {"zero_rate": "0.01"}).whole.rates["zero"] == 0.01  # type: ignore[union-attr]
    paper = build("e2e_qp", "paper").whole
    assert paper is not None and (paper.rates, paper.relative, paper.batch_size) == ({"scale": 2e-5}, False, 32)
    assert (paper.epochs, paper.steps_on(4096)) == (1, 128)
    assert split_preset("e2e_qp", "paper")[1] == {"samples": 4096, "seqlen": 4096}


@pytest.mark.parametrize("preset", PRESETS["efficientqat"])
def test_efficientqat_is_block_ap_and_then_e2e_qp(preset: str) -> None:
    recipe = build("efficientqat", preset)
    (blocks,), whole = recipe.blocks, recipe.whole
    assert recipe.stages == (blocks, whole) and (blocks.name, whole.name) == ("block_ap", "e2e_qp")  # type: ignore[union-attr]
    assert build("efficientqat", preset, {"e2e_rate": 0.5}).whole.rates == {"scale": 0.5}  # type: ignore[union-attr]
    assert build("efficientqat", preset, {"rate": 0.5}).blocks[0].fit.rates["weight"] == 0.5  # type: ignore[union-attr]
    if preset == "paper":
        alone = build("block_ap", "paper").blocks[0]
        assert blocks.fit == alone.fit and whole.rates == build("e2e_qp", "paper").whole.rates  # type: ignore[union-attr]


def test_planish_is_made_of_the_others() -> None:
    (blocks,), whole = build("planish").blocks, build("planish").whole
    assert blocks.fit == dataclasses.replace(fit_of(build("block_ap")), passed=1536)
    assert blocks.importance and blocks.products
    assert whole is not None and (whole.distill, whole.optional) == (1.0, True)
    # three and eight times through 512 windows; more often through fewer, though not without end
    assert blocks.fit is not None
    steps = [(blocks.fit.steps_on(count), whole.steps_on(count)) for count in (64, 512, 4096)]
    assert steps == [(128, 64), (384, 512), (2048, 512)]
    assert whole.rates == {"scale": 2e-3, "norm": 1e-3, "weight": 3e-3} and whole.if_room == ("weight",)
    rounding = build("planish", None, {"fit": "rounding", "steps": 30}).blocks[0]
    assert rounding.fit == fit_of(build("signround", None, {"steps": 30})) and rounding.rounding is Offset
    (light,), (fast,) = build("planish", "light").stages, build("planish", "fast").stages
    assert light.fit == fit_of(build("signround")) and fast.range is Searched and fast.fit is None  # type: ignore[union-attr]
    more = {"e2e_norm_rate": "1e-3", "e2e_weight_rate": "5e-3", "e2e_zero_rate": "0.01", "distill": "0.9"}
    last = build("planish", "best", more).whole
    assert last is not None and last.rates == {"scale": 2e-3, "zero": 0.01, "norm": 1e-3, "weight": 5e-3}
    assert (last.distill, last.epochs, split_preset("planish", "best")[1]) == (0.9, 16, {"samples": 512})


def test_omniquant_clips_and_scales_where_activations_are_rounded() -> None:
    (stage,) = build("omniquant").blocks
    assert stage.smooth is not None and not stage.smooth.always and stage.importance
    assert build("omniquant", None, {"let": "false"}).blocks[0].smooth is None
    assert build("omniquant", None, {"let": True, "fallback": True}).blocks[0].smooth.strict is False  # type: ignore[union-attr]
    assert fit_of(build("omniquant", None, {"augment": True})).target == "both"
    (paper,) = build("omniquant", "w4a4").blocks
    assert paper.smooth is not None and (paper.smooth.alpha, paper.smooth.always) == (0.75, True)
    fit = fit_of(build("omniquant", "w4a4"))
    assert (fit.rates, fit.batch_size, fit.span) == ({"range": 1e-2, "transform": 1e-3}, 1, 1)
    assert (fit.epochs, fit.schedule, fit.trim) == (20, "constant", 0)
    low = fit_of(build("omniquant", "w2a16"))
    assert (low.epochs, low.target) == (40, "both") and build("omniquant", "w2a16").blocks[0].smooth is None


def test_recipes_are_chained() -> None:
    recipe = build("rotate+efficientqat", None, {"rotation_seed": "7", "epochs": 3})
    assert recipe.rotation is not None and recipe.rotation.seed == 7 and recipe.name == "rotate+efficientqat"
    alone = build("efficientqat", None, {"epochs": 3})
    assert recipe.whole == alone.whole and recipe.blocks[0].fit == alone.blocks[0].fit
    assert {"rotation_seed", "clip_rate"} <= describe("rotate+omniquant")["help"].keys()
    assert describe("rotate+omniquant")["summary"] == describe("omniquant")["summary"]
    assert split_preset("rotate+signround", "best") == split_preset("signround", "best")
    for name, said in (("rotate+omniqant", "did you mean 'omniquant'"), ("e2e_qp+rtn", "comes last, and once")):
        with pytest.raises(PlanishError, match=said):
            build(name)


def test_steps_follow_epochs_and_samples() -> None:
    whole = build("e2e_qp", None, {"epochs": 2, "batch_size": 8}).whole
    assert whole is not None and [whole.steps_on(count) for count in (1, 8, 100)] == [2, 2, 25]
    given = build("e2e_qp", None, {"epochs": 2, "steps": 7}).whole
    assert given is not None and given.steps_on(100) == 7
    fewer = [build("e2e_qp").whole.steps_on(count) / count for count in (64, 1024, 4096)]  # type: ignore[union-attr]
    assert fewer[0] > fewer[1] >= fewer[2], "more passes over fewer samples"


def test_keys_win_over_the_preset_and_the_rate_follows_the_steps() -> None:
    assert fit_of(build("signround", "fast", {"steps": 100})).rates["rounding"] == pytest.approx(0.02)
    assert fit_of(build("signround", "fast")).rates["rounding"] == pytest.approx(0.05)
    rates = fit_of(build("signround", None, {"rate": 0.3, "range_rate": 0.07})).rates
    assert (rates["rounding"], rates["range"]) == (0.3, 0.07)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("steps", "30", 30),
        ("trim", "0.01", 0.01),
        ("trim", "0", 0.0),
        ("rate", "1e-3", 1e-3),
        ("prefix", "quantized", "quantized"),
        *[("compile", text, True) for text in ("true", "True", "1", "yes")],
        *[("compile", text, False) for text in ("false", "FALSE", "0", "no")],
    ],
)
def test_text_is_read_as_the_keys_type(key: str, text: str, expected: Any) -> None:
    fit = fit_of(build("signround", None, {key: text}))
    found = fit.rates["rounding"] if key == "rate" else getattr(fit, "target" if key == "prefix" else key)
    assert found == expected and type(found) is type(expected)


def test_values_that_have_their_type_pass_through() -> None:
    fit = fit_of(build("signround", None, {"steps": 30, "compile": None, "rate": 0.5}))
    assert (fit.steps, fit.compile, fit.rates["rounding"]) == (30, None, 0.5)


@pytest.mark.parametrize(
    ("name", "preset", "keys", "said"),
    [
        ("signrond", None, {}, "no recipe 'signrond': did you mean 'signround'?"),
        ("awq", None, {}, "no recipe 'awq': there is: block_ap, "),
        ("signround", "fats", {}, "recipe 'signround' has no preset 'fats': did you mean 'fast'?"),
        ("rtn", "paper", {}, "recipe 'rtn' has no preset 'paper'"),
        ("signround", None, {"stepps": 3}, "recipe 'signround' has no key 'stepps': did you mean 'steps'?"),
        ("rtn", None, {"steps": 3}, "recipe 'rtn' has no key 'steps': there is: products, search"),
        ("signround", None, {"steps": "many"}, "steps='many' isn't a number"),
        ("signround", None, {"steps": "2.5"}, "steps='2.5' isn't a number"),
        ("signround", None, {"trim": "few"}, "trim='few' isn't a number"),
        ("signround", None, {"compile": "perhaps"}, "compile='perhaps' isn't true or false"),
        ("signround", None, {"prefix": "flaot"}, "target='flaot': did you mean 'float'?"),
        ("signround", None, {"trim": "2"}, "trim=2.0 isn't a share"),
        ("signround", None, {"steps": "0"}, "steps, batch size, holdout, checks and span must be 1 or more"),
        ("signround", None, {"span": -1}, "must be 1 or more"),
        ("block_ap", None, {"rate": 0}, "the learning rate of weight is 0; it must be above 0"),
        ("e2e_qp", None, {"rate": "0"}, "the learning rate of scale is 0.0; it must be above 0"),
        ("e2e_qp", None, {"rate": "nan"}, "the learning rate of scale is nan; it must be above 0"),
        ("e2e_qp", None, {"zero_rate": -1}, "the learning rate of zero is -1; it must be above 0"),
        ("e2e_qp", None, {"distill": 2}, "distill=2 isn't a share; 0 is cross-entropy alone, 1 distillation alone"),
        ("e2e_qp", None, {"temperature": 0}, "temperature and clip must be above 0, warmup a share below 1"),
        ("e2e_qp", None, {"warmup": 1}, "temperature and clip must be above 0, warmup a share below 1"),
        ("e2e_qp", None, {"steps": 0}, "must be 1 or more"),
        ("planish", None, {"fit": "weight"}, "fit='weight': did you mean 'weights'?"),
        ("planish", "light", {"epochs": 2}, "epochs and norm_rate are of fit=weights, and this is fit=rounding; drop"),
        ("efficientqat", None, {"e2e_rate": 0}, "the learning rate of scale is 0; it must be above 0"),
        ("efficientqat", None, {"e2e_rates": 1}, "recipe 'efficientqat' has no key 'e2e_rates': did you mean 'e2e_"),
    ],
)
def test_refusals(name: str, preset: str | None, keys: dict, said: str) -> None:
    with pytest.raises(PlanishError) as error:
        build(name, preset, keys)
    assert said in str(error.value) and "\n" not in str(error.value)


MINE = """
from planish.fit.spans import Stage
from planish.fit.whole import EndToEnd
from planish.recipes import Recipe


def mine(*, name: str = "mine", untyped=3):
    '''A recipe of my own.'''
    assert untyped in (3, "4")
    return Recipe(name=name, stages=(Stage(name="one"),))


def wrong():
    return "rtn"


number = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)


def test_a_recipe_of_the_users_own(mine: None, tmp_path: Path) -> None:
    assert build("./mine.py:mine").name == build(f"{tmp_path}/mine.py:mine", "default").name == "mine"
    assert build("mine.py:mine", None, {"name": "other", "untyped": "4"}).name == "other"
    assert describe("./mine.py:mine")["summary"] == "A recipe of my own."


@pytest.mark.parametrize(
    ("name", "preset", "keys", "said"),
    [
        ("./nowhere.py:mine", None, {}, "no such recipe file: nowhere.py"),
        ("./mine.py:other", None, {}, "mine.py has no function 'other'"),
        ("./mine.py:number", None, {}, "mine.py has no function 'number'"),
        ("./mine.py:wrong", None, {}, "'./mine.py:wrong' returned str, not a planish.recipes.Recipe"),
        ("./mine.py:mine", "fast", {}, "recipe './mine.py:mine' has no preset 'fast': did you mean 'default'?"),
        ("./mine.py:mine", None, {"nam": "x"}, "recipe './mine.py:mine' has no key 'nam': did you mean 'name'?"),
        ("./mine.py", None, {}, "./mine.py names no function; write it as ./mine.py:mine"),
    ],
)
def test_refusals_of_the_users_own(mine: None, name: str, preset: str | None, keys: dict, said: str) -> None:
    with pytest.raises(PlanishError) as error:
        build(name, preset, keys)
    assert said in str(error.value)


def test_signround_may_be_called_as_it_is() -> None:
    assert fit_of(signround(steps=7)).steps == 7
