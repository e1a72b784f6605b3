"""Tasks: questions with answers, as the field counts them (lm-eval's tasks, prompts and metrics).

    evaluate(model, ["piqa", "arc_easy"], task_data="data") -> {"piqa": {"acc": 0.68, "stderr": 0.011}, ...}

lm-eval is optional (pip install planish[eval]) and has its tasks' data from the hub; with `task_data` tasks are those
of a folder of its YAML files, and nothing else is looked for. The first metric of a task is the one to quote.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planish.errors import PlanishError, nearest
from planish.folder import tokenizer_of
from planish.guard import reading

QUOTED = ("acc", "exact_match")  # metrics that go first, whatever a task's own order
DRAWS = 100  # of the bootstrap, where a standard error has no formula
PREFIX = "local_"  # of the names in a folder that mustn't hide lm-eval's own

Found = dict[str, dict[str, float]]


def evaluate(
    model: Any,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    task_data: str | Path | None = None,
    tokenizer: Any = None,
    counts: dict[str, int] | None = None,
) -> Found:
    """A model's metrics on tasks, each with its standard error.

    Args:
        model: a causal language model of transformers; sequences run on the device that it is on.
        tasks: names of lm-eval's tasks or groups, or configurations of one as lm-eval takes them.
        shots: questions with answers before each; what the task says if not given.
        limit: only the first so many questions of each.
        batch_size: sequences at once; by their tokens if not given.
        task_data: a folder of lm-eval's YAML files, or one with a folder of them; Python that they name is run.
        tokenizer: by default that of the model's own folder.
        counts: filled with what the model has read: "rows" and "tokens".

    Returns:
        By task {metric: value, "stderr": of the first metric, "NAME_stderr": of others}.

    Raises:
        PlanishError: if lm-eval isn't installed, a task isn't known, or its data can't be had.
    """
    if not tasks or (limit is not None and limit < 1) or (shots is not None and shots < 0):
        raise PlanishError(f"{len(tasks)} tasks, limit {limit}, shots {shots}: there is nothing to evaluate")
    manager, harness, lm_eval = _lm_eval(task_data)
    tokenizer = tokenizer or tokenizer_of(model)
    if tokenizer is None:
        raise PlanishError(f"no tokenizer in {model.config.name_or_path!r}; pass tokenizer=")
    names = {_name(task): task if isinstance(task, Mapping) else _known(task, manager.all_tasks) for task in tasks}
    answering = harness(model, tokenizer, batch_size)
    with reading(f"lm-eval can't run {', '.join(names)}", "see which of them it knows, and whether data can be had"):
        found = lm_eval.simple_evaluate(
            answering,
            tasks=list(names.values()),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=DRAWS,
            log_samples=False,
        )
    if counts is not None:
        counts |= {"rows": answering.rows, "tokens": answering.tokens}
    return {name: _metrics(found["results"][_name(task)]) for name, task in names.items()}


def _lm_eval(task_data: str | Path | None) -> tuple[Any, Any, Any]:
    """(tasks that there are, what answers, the package)."""
    folder = None if task_data is None else _yaml_folder(Path(task_data))
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from planish.eval.harness import Harness
    except ImportError as error:
        raise PlanishError(f"tasks need lm-eval ({error.name} is missing); pip install planish[eval]") from error
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    return manager, Harness, lm_eval


def _yaml_folder(folder: Path) -> Path:
    """The folder itself, or the one in it that holds tasks."""
    if not folder.is_dir():
        raise PlanishError(f"no such folder: {folder}; --task-data is a folder of lm-eval's YAML files")
    if any(folder.glob("*.yaml")):
        return folder
    inside = sorted({file.parent for file in folder.glob("*/*.yaml")})
    if len(inside) != 1:
        raise PlanishError(f"{folder} has {len(inside)} folders of lm-eval's YAML files, not one; name that folder")
    return inside[0]


def _name(task: str | Mapping[str, Any]) -> str:
    return task if isinstance(task, str) else str(task["task"])


def _known(task: str, there: Sequence[str]) -> str:
    """A task's name as lm-eval knows it."""
    for name in (task, PREFIX + task):
        if name in there:
            return name
    raise PlanishError(f"no task {task!r}: {nearest(task, [name.removeprefix(PREFIX) for name in there][:200])}")


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's 'acc,none' and 'acc_stderr,none' as acc and its standard error; the one to quote first."""
    values: dict[str, tuple[float, Any]] = {}
    for key, value in results.items():
        metric, comma, kept = key.partition(",")
        if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
            label = f"{metric} ({kept})" if metric in values else metric
            values[label] = float(value), results.get(f"{metric}_stderr,{kept}")
    first = next((name for name in QUOTED if name in values), next(iter(values), ""))
    found: dict[str, float] = {}
    for name in sorted(values, key=lambda name: name != first):
        value, error = values[name]
        found[name] = value
        if isinstance(error, int | float):
            found["stderr" if name == first else f"{name}_stderr"] = float(error)
    return found
