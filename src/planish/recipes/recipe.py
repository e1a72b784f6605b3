"""Recipe: a named tuple of stages, and how one is built from a name, a preset and keys.

A recipe's function is its own documentation: keyword arguments are its keys, the docstring says what it
is, a line "Equation:" gives the equation. Keys of a preset that aren't the function's own (samples,
seqlen) are about data and go to the caller.
"""

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planish.errors import PlanishError, nearest
from planish.fit.spans import Stage
from planish.fit.whole import EndToEnd
from planish.transform import Rotate

DATA_KEYS = ("samples", "seqlen")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method: stages run one after another, each over the whole model.

    Those that go through the blocks come first; at most one that trains the model as a whole follows.

    Args:
        rotation: how the model is turned before all that; what only turns has no stages, and another recipe follows.
    """

    name: str
    stages: tuple[Stage | EndToEnd, ...] = ()
    rotation: Rotate | None = None

    def __post_init__(self) -> None:
        assert self.stages or self.rotation, self.name
        assert all(isinstance(stage, Stage) for stage in self.stages[:-1]), self.name

    @property
    def blocks(self) -> tuple[Stage, ...]:
        """The stages that go through the blocks."""
        return tuple(stage for stage in self.stages if isinstance(stage, Stage))

    @property
    def whole(self) -> EndToEnd | None:
        """The stage that trains the packed model as a whole, if there is one."""
        last = self.stages[-1] if self.stages else None
        return last if isinstance(last, EndToEnd) else None

    @property
    def holdout(self) -> int:
        """The fewest samples that a stage holds out to choose its state by; 0 if none is fitted."""
        fits = (stage.fit if isinstance(stage, Stage) else stage for stage in self.stages)
        return min((fit.holdout for fit in fits if fit is not None), default=0)

    @property
    def needs_data(self) -> bool:
        return any(stage.needs_data for stage in self.stages)


def find(name: str) -> tuple[Callable[..., Recipe], Mapping[str, Mapping[str, Any]]]:
    """The function and the presets of a recipe by name, of 'path/to/file.py:function', or of several chained by +."""
    from planish.recipes import PRESETS, RECIPES

    if "+" in name:
        return _chain(name)
    path, sep, attribute = name.rpartition(":")
    if sep and path.endswith(".py"):
        return _from_file(Path(path), attribute), {"default": {}}
    if name.endswith(".py"):
        raise PlanishError(f"{name} names no function; write it as {name}:mine")
    if name not in RECIPES:
        raise PlanishError(f"no recipe {name!r}: {nearest(name, RECIPES)}")
    return RECIPES[name], PRESETS[name]


def _chain(name: str) -> tuple[Callable[..., Recipe], Mapping[str, Mapping[str, Any]]]:
    """Recipes one after another: each takes the keys that it knows; presets are the last one's."""
    parts = [find(part) for part in name.split("+")]
    signatures = [inspect.signature(function).parameters for function, _ in parts]

    def chained(**keys: Any) -> Recipe:
        made = [
            function(**{key: value for key, value in keys.items() if key in known})
            for (function, _), known in zip(parts, signatures, strict=True)
        ]
        stages = tuple(stage for recipe in made for stage in recipe.stages)
        if any(isinstance(stage, EndToEnd) for stage in stages[:-1]):
            raise PlanishError(f"{name}: what trains the whole model comes last, and once")
        rotations = [recipe.rotation for recipe in made if recipe.rotation]
        return Recipe(name=name, stages=stages, rotation=rotations[0] if rotations else None)

    texts = [inspect.getdoc(function) or "" for function, _ in parts]
    arguments = "\n".join(text.partition("Args:\n")[2] for text in texts)
    chained.__doc__ = f"{texts[-1].partition('Args:')[0]}Args:\n{arguments}"
    every = {key: parameter for known in signatures for key, parameter in known.items()}
    chained.__signature__ = inspect.Signature(list(every.values()))  # type: ignore[attr-defined]
    return chained, parts[-1][1]


def _from_file(path: Path, attribute: str) -> Callable[..., Recipe]:
    if not path.is_file():
        raise PlanishError(f"no such recipe file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, attribute, None)):
        raise PlanishError(f"{path} has no function {attribute!r}")
    return getattr(module, attribute)


def split_preset(name: str, preset: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of a preset: (the recipe's own, those about data)."""
    _, presets = find(name)
    chosen = preset or "default"
    if chosen not in presets:
        raise PlanishError(f"recipe {name!r} has no preset {chosen!r}: {nearest(chosen, presets)}")
    keys = dict(presets[chosen])
    return {k: v for k, v in keys.items() if k not in DATA_KEYS}, {k: v for k, v in keys.items() if k in DATA_KEYS}


def build(name: str, preset: str | None = None, keys: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of that name with its preset's keys, overridden by the ones given.

    Values may be text, as typed on a command line; they are read as the key's type.

    Raises:
        PlanishError: unknown recipe, preset or key (with the nearest), or a value of the wrong type.
    """
    function, _ = find(name)
    own, _ = split_preset(name, preset)
    known = inspect.signature(function).parameters
    for key, value in (keys or {}).items():
        if key not in known:
            raise PlanishError(f"recipe {name!r} has no key {key!r}: {nearest(key, known)}")
        own[key] = _read(key, value, known[key].annotation)
    recipe = function(**own)
    if not isinstance(recipe, Recipe):
        raise PlanishError(f"{name!r} returned {type(recipe).__name__}, not a planish.recipes.Recipe")
    return recipe


def _read(key: str, value: Any, annotation: Any) -> Any:
    """A value typed as text, as the type that the function's signature gives the key."""
    if not isinstance(value, str):
        return value
    kinds = str(annotation)
    if "bool" in kinds:
        if value.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise PlanishError(f"{key}={value!r} isn't true or false")
        return value.lower() in ("true", "1", "yes")
    for kind in (int, float):
        if kind.__name__ in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    if "str" in kinds or annotation is inspect.Parameter.empty:
        return value
    raise PlanishError(f"{key}={value!r} isn't a number")


def describe(name: str) -> dict[str, Any]:
    """What a recipe is: summary, equation, keys with defaults and meaning, presets."""
    function, presets = find(name)
    text = inspect.getdoc(function) or ""
    equation = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("Equation:")), "")
    _, _, arguments = text.partition("Args:\n")
    parameters = inspect.signature(function).parameters
    return {
        "name": name,
        "summary": text.splitlines()[0] if text else "",
        "equation": equation,
        "keys": {k: p.default for k, p in parameters.items()},
        "presets": {k: dict(v) for k, v in presets.items()},
        "help": _argument_help(arguments, list(parameters)),
    }


def _argument_help(text: str, keys: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    current = None
    for line in text.splitlines():
        head, sep, rest = line.strip().partition(":")
        if sep and head in keys:
            current, found[head] = head, rest.strip()
        elif current and line.strip():
            found[current] += " " + line.strip()
    return found
