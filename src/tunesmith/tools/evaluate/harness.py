"""Benchmarks of lm-evaluation-harness on a loaded run, its base beside it.

lm-eval builds the prompts, asks the model and computes the metrics, by its own `hf` model around
the one that `load_run` has loaded; nothing of a task is written a second time here. What is added
is the base on the same rows, and what the difference says: a metric that is the mean of its rows'
values gets the paired intervals of `--score`, any other one lm-eval's standard error.

Tasks are loaded before the model (`load_tasks.py`), so that a wrong name, a missing package or rows
that cannot be had are reported within seconds.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.adapter.lora import disabled
from tunesmith.data.compare.row_checks import check_prompts, place
from tunesmith.data.compare.splits import SourceRows, read_splits
from tunesmith.errors import TunesmithError, UsageError, first_line
from tunesmith.host.logger import lines_by_default
from tunesmith.inference.decoding import evaluating
from tunesmith.inference.load_run import LoadedModel, RunLocation, load_run, locate_run
from tunesmith.metrics.intervals import Interval
from tunesmith.run_dir import weights_step, with_earlier_runs
from tunesmith.tools.evaluate.load_tasks import LoadedTasks, load_tasks
from tunesmith.tools.evaluate.score_rows import (
    RowScores,
    answers_path,
    save_scores,
    saved_scores,
    summarize_rows,
)

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

log = logging.getLogger(__name__)

_Z95 = 1.959964  # standard errors from the mean to each end of a normal 95 % interval


class HarnessResults(TypedDict):
    """The parts of what lm-eval returns that are read.

    Attributes:
        results: by task, each metric's value under `METRIC,FILTER`.
        samples: by task, a record of each row.
        group_subtasks: by group, its tasks.
        higher_is_better: by task and metric.
    """

    results: dict[str, dict[str, object]]
    samples: dict[str, list[dict[str, object]]]
    group_subtasks: dict[str, list[str]]
    higher_is_better: dict[str, dict[str, bool]]


class MetricValue(NamedTuple):
    """A metric that lm-eval computed for one model; `stderr` is None where it has none."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskMetric:
    """One metric of a task or of a group of tasks.

    Attributes:
        filter_name: of lm-eval, what was cut out of the answers; `none` without.
        rows: that it is computed from.
        higher_is_better: None where lm-eval does not define it.
        values: of `base` and `tuned`, or of `model` for a plain model.
        row_scores: with paired intervals, where the metric is the mean of values from 0 to 1.
    """

    task: str
    metric: str
    filter_name: str
    rows: int
    higher_is_better: bool | None
    values: dict[str, MetricValue]
    row_scores: RowScores | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The metric, with the filter if there is one."""
        return self.metric if self.filter_name == "none" else f"{self.metric}, {self.filter_name}"

    def interval(self, model: str) -> Interval | None:
        """The 95 % interval of one model; None where lm-eval has no standard error."""
        if self.row_scores is not None:
            return self.row_scores.models[model]
        value, stderr = self.values[model]
        if stderr is None:
            return None
        return Interval(value, value - _Z95 * stderr, value + _Z95 * stderr)


class SeenRows(NamedTuple):
    """Rows of a task whose text nearly repeats a prompt that the run was trained on.

    Attributes:
        seen: how many.
        rows: of the task.
        where, trained: the first such row of the task, counted from 1, and the place of the
            training row.
    """

    seen: int
    rows: int
    where: int
    trained: str


@dataclass(frozen=True)
class TaskEvaluation:
    """The result of `evaluate_tasks`.

    Attributes:
        seen: by task; without those that have none, or where it is not known.
        chat_template: whether prompts were written through the run's chat template.
        files: of the scores, one for each task or group that was named.
    """

    metrics: tuple[TaskMetric, ...]
    chat_template: bool
    lm_eval: str
    files: tuple[Path, ...]
    seen: dict[str, SeenRows] = field(default_factory=dict)


@lines_by_default()
def evaluate_tasks(
    path: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    base: bool = True,
    batch_size: int = 16,
    chat_template: bool | None = None,
    device: str | None = None,
) -> TaskEvaluation:
    """Score a run on tasks of lm-evaluation-harness, and its base beside it.

    Args:
        path: as for `load_run`; `base` scores the base of it too.
        tasks: names that lm-eval knows, YAML files of tasks, or folders of these.
        limit: the first rows of each task.
        chat_template: whether prompts are written through the run's template, as one user turn
            after the run's system message; None takes it where the run was trained with it.

    Raises:
        UsageError: a task is unknown, or cannot be used with a text model.
        DataError: the rows of a task cannot be had.
        MachineError: lm-eval, or a package that a task needs, is not installed.
    """
    location = locate_run(path)
    loaded_tasks = load_tasks(tasks)
    seen = _seen_rows(loaded_tasks, location, limit)
    loaded = load_run(location, device=device)
    # A task may bring its own prompt; whether the template goes around it is decided once for all.
    applies = _applies_template(loaded, path, chat_template)

    def results_of(loaded: LoadedModel) -> HarnessResults:
        return _harness_results(loaded, loaded_tasks, limit, batch_size, chat_template=applies)

    tuned = "model" if location.holds == "base" else "tuned"
    results = {tuned: results_of(loaded)}
    if base and location.holds == "adapter":
        with disabled(loaded.model):
            results = {"base": results_of(loaded), **results}
    elif base and location.holds == "full":
        # One model at a time.
        del loaded
        base_model = load_run(path, device=device, base_only=True)
        results = {"base": results_of(base_model), **results}
    metrics = tuple(_task_metrics(results))
    version = _lm_eval_version()
    about: dict[str, object] = {
        "lm_eval": version,
        "limit": limit,
        "chat_template": applies,
        "checkpoint": location.folder.name if location.folder else None,
        "step": weights_step(location.folder) if location.run else None,
    }
    files = []
    for name in loaded_tasks.names:
        named = name if limit is None else f"{name}, first {limit}"
        path = answers_path(location, f"tasks-{named}".replace(", ", "-"), None)
        about["seen"] = None if seen is None else _count_seen(seen, name, results[tuned])
        files.append(_save_task(path, named, name, metrics, results[tuned], about))
    return TaskEvaluation(metrics, applies, version, tuple(files), seen or {})


# Rows that were trained on ----------------------------------------------------------------------


def _seen_rows(
    tasks: LoadedTasks, location: RunLocation, limit: int | None
) -> dict[str, SeenRows] | None:
    """The rows of each task that the run was trained on, with a warning for each; None where that
    is not known: of no run, where its rows are gone, and where a task's text cannot be made."""
    run = location.run
    if run is None or location.holds == "base":
        return None
    try:
        prompts = tasks.prompts(limit)
    except Exception as error:
        # A task may hold code of its own, which may raise anything; scoring has its own say.
        what = f"{type(error).__name__}: {first_line(error)}"
        log.info("could not check whether rows of tasks were trained on: %s", what)
        return None
    try:
        train: SourceRows = []
        runs, fault = with_earlier_runs(run)
        for each in runs:
            train += read_splits(replace(each.data, validation=()), each.train.seed)[0]
        if fault:
            log.info("could not check all rows of training: %s", fault)
        pairs = check_prompts(list(prompts.values()), train)
    except TunesmithError as error:
        log.info("could not check whether rows of tasks were trained on: %s", error.what)
        return None
    seen = {}
    first = 0
    for task, texts in prompts.items():
        stop = first + len(texts)
        here = [(row - first, trained) for row, trained in pairs if first <= row < stop]
        first = stop
        if not here:
            continue
        row, trained = here[0]
        seen[task] = SeenRows(len(here), len(texts), row + 1, place(train, trained))
        log.warning(
            "%s: %d of %d rows nearly repeat a prompt that was trained on, so its scores are too "
            "optimistic: first row %d (%s)",
            task,
            *seen[task],
        )
    return seen


def _count_seen(seen: Mapping[str, SeenRows], name: str, result: HarnessResults) -> int:
    """Count the seen rows of a task, or of all tasks of a group."""
    count = seen[name].seen if name in seen else 0
    for child in result["group_subtasks"].get(name, ()):
        count += _count_seen(seen, child, result)
    return count


# Models -----------------------------------------------------------------------------------------


def _applies_template(loaded: LoadedModel, path: str | Path, chosen: bool | None) -> bool:
    """Tell whether prompts go through the template: if the run was trained so, unless `chosen`."""
    template = loaded.template
    if chosen and (template.raw or template.jinja is None):
        raise UsageError(
            f"{path} has no chat template",
            where="--chat-template",
            why="it was trained on raw prompts",
            fix="remove --chat-template",
        )
    if chosen is not None:
        return chosen
    # Of a run on rows of the format text alone the template is not what was trained.
    return not template.raw and template.jinja is not None and template.name != "text"


def _harness_results(
    loaded: LoadedModel,
    tasks: LoadedTasks,
    limit: int | None,
    batch_size: int,
    *,
    chat_template: bool,
) -> HarnessResults:
    """Run lm-eval on one model and return its results."""
    import lm_eval

    # The template in use is not always the tokenizer's own.
    tokenizer = copy(loaded.tokenizer)
    tokenizer.chat_template = loaded.template.jinja
    with evaluating(loaded.model), _answers_end(loaded.model, loaded.template.end_ids):
        results: HarnessResults = lm_eval.simple_evaluate(
            model=_harness_model(loaded.model, tokenizer, batch_size),
            tasks=tasks.items,
            task_manager=tasks.manager,
            limit=limit,
            apply_chat_template=chat_template,
            system_instruction=loaded.system if chat_template else None,
        )
    return results


def _harness_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> "HFLM":
    """lm-eval's own `hf` model around one that is loaded."""
    from lm_eval.models import huggingface

    # It warns that a model in place of a name may ignore other options: none is set.
    logger = logging.getLogger(huggingface.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        logger.setLevel(level)


@contextmanager
def _answers_end(model: PreTrainedModel, end_ids: frozenset[int]) -> Iterator[None]:
    """Answers end where the run's do, and nothing else of a checkpoint's generation settings
    counts; as in `answer_batch`."""
    settings = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=sorted(end_ids) or None)
    try:
        yield
    finally:
        model.generation_config = settings


# Metrics ----------------------------------------------------------------------------------------


def _task_metrics(results: Mapping[str, HarnessResults]) -> Iterator[TaskMetric]:
    """All metrics of all tasks and groups, where every model has a number."""
    first = next(iter(results.values()))
    for task, by_key in first["results"].items():
        for key in by_key:
            metric, _, filter_name = key.partition(",")
            # Others are names, counts and standard errors.
            if not filter_name or metric.endswith("_stderr"):
                continue
            values = {}
            for model, result in results.items():
                value = _metric_value(result["results"][task], metric, filter_name)
                if value is not None:
                    values[model] = value
            if len(values) == len(results):
                yield _task_metric(results, task, metric, filter_name, values)


def _task_metric(
    results: Mapping[str, HarnessResults],
    task: str,
    metric: str,
    filter_name: str,
    values: dict[str, MetricValue],
) -> TaskMetric:
    first = next(iter(results.values()))
    higher_is_better = first["higher_is_better"].get(task, {}).get(metric)
    rows = len(_samples_of(first, task, filter_name))
    whole = TaskMetric(task, metric, filter_name, rows, higher_is_better, values)
    by_row = {}
    for model, result in results.items():
        row_values = _row_values(result, task, metric, filter_name)
        # Not every metric is a mean over rows: without such rows nothing can be resampled.
        if not _is_mean_of(row_values, values[model].value):
            return whole
        by_row[model] = row_values
    # The rows are the same for both models, so they can be compared pair by pair.
    row_scores = summarize_rows(
        f"{task} {whole.name}", by_row, higher_is_better=higher_is_better is not False
    )
    return replace(whole, row_scores=row_scores)


def _metric_value(
    values: Mapping[str, object], metric: str, filter_name: str
) -> MetricValue | None:
    """None for what is no finite number."""
    value = values.get(f"{metric},{filter_name}")
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    stderr = values.get(f"{metric}_stderr,{filter_name}")
    # "N/A" where there is none.
    if not isinstance(stderr, int | float) or not math.isfinite(stderr):
        return MetricValue(float(value), None)
    return MetricValue(float(value), float(stderr))


def _samples_of(result: HarnessResults, task: str, filter_name: str) -> list[dict[str, object]]:
    """lm-eval's record of each row of a task, or of all tasks of a group, in their order."""
    samples = []
    if task in result["samples"]:
        for sample in result["samples"][task]:
            if sample["filter"] == filter_name:
                samples.append(sample)
    for child in result["group_subtasks"].get(task, ()):
        samples += _samples_of(result, child, filter_name)
    return samples


def _row_values(result: HarnessResults, task: str, metric: str, filter_name: str) -> list[float]:
    """A metric row by row; empty where a row has no single number from 0 to 1."""
    values = []
    for sample in _samples_of(result, task, filter_name):
        value = sample.get(metric)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            return []
        values.append(float(value))
    return values


def _is_mean_of(rows: Sequence[float], value: float) -> bool:
    """Tell whether lm-eval's value is the plain mean of the rows: not a corpus's BLEU, not a group
    that weighs its tasks alike."""
    return bool(rows) and math.isclose(math.fsum(rows) / len(rows), value, abs_tol=1e-9)


# Files ------------------------------------------------------------------------------------------


def _save_task(
    path: Path,
    data: str,
    task: str,
    metrics: Sequence[TaskMetric],
    result: HarnessResults,
    about: Mapping[str, object],
) -> Path:
    """Write one task's scores, for `report` and for other tools."""
    task_metrics = [metric for metric in metrics if metric.task == task]
    rows = max((metric.rows for metric in task_metrics), default=0)
    filters = [metric.filter_name for metric in task_metrics]
    digest = hashlib.sha256()
    for sample in _samples_of(result, task, filters[0] if filters else "none"):
        # The hash tells whether two evals scored the same rows.
        digest.update(f"{sample['prompt_hash']} {sample['target_hash']}\n".encode())
    scores = {}
    for metric in task_metrics:
        if metric.row_scores is not None:
            scores[metric.name] = saved_scores(metric.row_scores)
    values = {
        **about,
        "metrics": {metric.name: values_as_json(metric) for metric in task_metrics},
        "scores": scores,
    }
    return save_scores(path, data, rows, digest.hexdigest(), values)


def values_as_json(metric: TaskMetric) -> dict[str, object]:
    """Each model's value, standard error and interval; the difference where rows are paired."""
    values: dict[str, object] = {"rows": metric.rows, "higher_is_better": metric.higher_is_better}
    for model, (value, stderr) in metric.values.items():
        interval = metric.interval(model)
        values[model] = {
            "value": value,
            "stderr": stderr,
            "low": None if interval is None else interval.low,
            "high": None if interval is None else interval.high,
        }
    row_scores = metric.row_scores
    if row_scores is not None and row_scores.paired is not None:
        values["difference"] = row_scores.paired.difference._asdict()
        values["differing"] = row_scores.paired.differing
        values["verdict"] = row_scores.verdict
    return values


def _lm_eval_version() -> str:
    import lm_eval

    return str(lm_eval.__version__)
