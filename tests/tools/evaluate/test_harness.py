"""`eval --tasks`: what is refused before a model is loaded, and a tiny run on tasks of its own."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import recipes
from errors import holds, lines_with, refuses, warnings_with
from logged import logged_lines
from runs import make_run, peft_model, write_rows
from tunesmith.cli.main import main
from tunesmith.errors import DataError, MachineError, UsageError
from tunesmith.inference.load_run import RunLocation
from tunesmith.metrics.intervals import paired_intervals
from tunesmith.reader.figures import eval_figures
from tunesmith.reader.run_files import RunFiles
from tunesmith.tools.evaluate import harness, load_tasks

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: [one, two]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
WRITE = """\
task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - metric: exact_match
  - metric: chrf
"""
SURPRISE = """\
task: tiny_surprise
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: perplexity
    higher_is_better: false
"""


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "run"
    make_run(folder, tiny, peft_model(tiny))
    return folder


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three tasks over local rows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Say {n}", "answer": n % 2, "text": f"word {n}"} for n in range(9)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "choice.yaml").write_text(CHOICE.format(rows=data))
    (folder / "write.yaml").write_text(WRITE.format(rows=data))
    (folder / "surprise.yaml").write_text(SURPRISE.format(rows=data))
    return folder


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded fails the test."""

    def load_run(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(harness, "load_run", load_run)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--tasks", "gsm8k", "--data", "rows.jsonl"], "--data"),
        (["--tasks", "gsm8k", "--score", "exact"], "--score"),
        (["--tasks", "gsm8k", "--max-examples", "3"], "--max-examples"),
        (["--tasks", "gsm8k", "--max-new-tokens", "3"], "--max-new-tokens"),
        (["--tasks", "gsm8k", "--columns", "prompt=a"], "--columns"),
        (["--limit", "3"], "--limit"),
        (["--no-chat-template"], "--chat-template"),
        (["--tasks", "gsm8k,,ifeval"], "--tasks"),
        (["--tasks", "gsm8k", "--limit", "0"], "--limit"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    run: Path, words: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), *words]) == 2
    assert option in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_without_lm_eval_the_command_that_installs_it_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name)
    )
    with refuses(MachineError, where="--tasks", names=["lm-eval"]) as error:
        harness.evaluate_tasks(run, ["gsm8k"])
    assert "pip install" in error.value.fix
    assert "lm-eval" in error.value.fix


@pytest.mark.usefixtures("no_model")
def test_under_torchrun_it_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_tasks, "started_as", lambda: {"RANK": 0, "WORLD_SIZE": 2})
    with refuses(UsageError, where="--tasks", fix=["torchrun"]):
        harness.evaluate_tasks(run, ["gsm8k"])


@pytest.mark.slow
@pytest.mark.usefixtures("no_model")
def test_tasks_that_cannot_be_had_are_named_before_a_model_is_loaded(
    run: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")

    def refused(kind: type[UsageError], spec: str) -> str:
        with refuses(kind) as error:
            harness.evaluate_tasks(run, [spec])
        return error.value.text()

    # lm-eval's own tasks: their names without the seconds that reading them takes.
    unknown = load_tasks._unknown_task("gsm8", _Names(["gsm8k", "ifeval"]))
    assert "gsm8k" in unknown.fix
    assert holds(refused(UsageError, "nothing.yaml"), "nothing.yaml")
    (tasks / "empty").mkdir()
    assert holds(refused(UsageError, f"{tasks / 'empty'}/"), f"{tasks / 'empty'}/", ".yaml")

    text = (tasks / "choice.yaml").read_text()
    (tasks / "choice.yaml").write_text(text.replace("rows.jsonl", "no.jsonl"))
    gone = refused(DataError, str(tasks / "choice.yaml"))
    assert "no.jsonl" in gone
    assert "fix:" in gone

    hub = text.replace("dataset_path: json", "dataset_path: nobody/nothing")
    (tasks / "choice.yaml").write_text(hub)
    assert "nobody/nothing" in refused(DataError, str(tasks / "choice.yaml"))

    (tasks / "needs.py").write_text("import a_package_that_is_missing\n")
    needy = text.replace('doc_to_text: "{{prompt}}"', "doc_to_text: !function needs.prompt")
    (tasks / "choice.yaml").write_text(needy)
    missing = refused(MachineError, str(tasks / "choice.yaml"))
    assert "pip install a_package_that_is_missing" in missing

    (tasks / "choice.yaml").write_text(text + "unsafe_code: true\n")
    assert holds(refused(UsageError, str(tasks / "choice.yaml")), "tiny_choice", "lm_eval")

    (tasks / "choice.yaml").write_text("task: [\n")
    assert holds(refused(UsageError, str(tasks / "choice.yaml")), tasks / "choice.yaml")


class _Names:
    def __init__(self, names: list[str]) -> None:
        self.all_tasks = names


@pytest.mark.slow
def test_a_run_and_its_base_are_scored_in_one_table(
    run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    folder = f"{tasks}/"
    main(["eval", str(run), "--tasks", folder, "--device", "cpu", "--json", "--batch-size", "4"])
    report = json.loads(capsys.readouterr().out)
    assert report["chat_template"]
    assert report["tasks"].keys() == {"tiny_choice", "tiny_surprise", "tiny_write"}
    acc = report["tasks"]["tiny_choice"]["acc"]
    files = {Path(file).name: json.loads(Path(file).read_text()) for file in report["files"]}
    assert files.keys() == {f"tasks-{task}.scores.json" for task in report["tasks"]}
    scores = files["tasks-tiny_choice.scores.json"]["scores"]["acc"]
    by_row = scores["by_row"]
    assert acc["rows"] == len(by_row["base"]) == len(by_row["tuned"]) == 9
    assert acc["base"]["value"] == pytest.approx(sum(by_row["base"]) / 9)
    # The same intervals as --score has of the same values.
    paired = paired_intervals(by_row["base"], by_row["tuned"])
    assert acc["difference"] == paired.difference._asdict()
    assert [acc["tuned"]["low"], acc["tuned"]["high"]] == scores["tuned"][1:]
    assert acc["verdict"].startswith("tiny_choice acc: tuned ")
    # A corpus's chrF is no mean of its rows: no sentence, lm-eval's own standard error.
    chrf = report["tasks"]["tiny_write"]["chrf"]
    assert "verdict" not in chrf
    tuned = chrf["tuned"]
    assert tuned["high"] == pytest.approx(tuned["value"] + 1.96 * tuned["stderr"], rel=1e-4)

    lines = dict(eval_figures([RunFiles(run)]))
    assert "% (" in str(lines["eval: acc (tiny_choice, 9 rows)"])
    assert not [line for line in lines if "loss" in line]

    main(["eval", str(run), "--tasks", str(tasks / "choice.yaml"), "--limit", "3", "--no-base"])
    printed = capsys.readouterr()
    assert "tiny_choice" in printed.out
    assert "base" not in printed.out
    assert (run / "evals" / "tasks-tiny_choice-first-3.scores.json").is_file()
    assert lines_with(printed.err, "lm-eval")


@pytest.mark.slow
def test_rows_of_a_task_that_were_trained_on_are_named(
    tiny: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    folder = tmp_path / "run"
    run = make_run(folder, tiny, peft_model(tiny))
    prompts = ["Name a river", "Count to 13, slowly", "Please count to 4, slowly", "COUNT TO 5!"]
    rows = write_rows(
        tmp_path / "seen.jsonl", [{"prompt": prompt, "answer": 1} for prompt in prompts]
    )
    (tasks / "choice.yaml").write_text(CHOICE.format(rows=rows))
    words = ["--tasks", str(tasks / "choice.yaml"), "--device", "cpu", "--json", "--no-base"]
    main(["eval", str(folder), *words])
    shown = capsys.readouterr()
    place = f"{run.data.train[0].source}:4"
    report = json.loads(shown.out)
    assert report["seen"] == {"tiny_choice": {"seen": 2, "rows": 4, "where": 3, "trained": place}}
    assert warnings_with(shown.err, "tiny_choice", "2 of 4", "row 3", place)
    assert json.loads(Path(report["files"][0]).read_text())["seen"] == 2


class RaisingTask:
    """A task whose own code fails."""

    eval_docs = ({},)

    def doc_to_text(self, row: dict[str, str]) -> str:
        return row["question"]


def test_a_task_whose_text_cannot_be_made_is_not_looked_for(tiny: Path, tmp_path: Path) -> None:
    run = recipes.make_run(tiny, tmp_path)
    tasks = load_tasks.LoadedTasks(None, [], [], {"raises": RaisingTask()})
    location = RunLocation("adapter", None, base=run.model, run=run)
    with logged_lines() as lines:
        assert harness._seen_rows(tasks, location, None) is None
    assert lines_with("\n".join(lines), "KeyError", "question")


@pytest.mark.slow
def test_a_group_has_the_intervals_of_all_its_rows(
    run: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    (tasks / "second.yaml").write_text(
        (tasks / "choice.yaml").read_text().replace("tiny_choice", "other_choice")
    )
    group = tasks / "group.yaml"
    by_size = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    group.write_text(f"group: both\ntask: [tiny_choice, other_choice]\n{by_size}")
    # Reading lm-eval's own tasks takes seconds.
    monkeypatch.setattr(load_tasks, "_needs_default_tasks", lambda _: False)
    result = harness.evaluate_tasks(run, [f"{tasks}/"], device="cpu", limit=6)
    accuracies = {metric.task: metric for metric in result.metrics if metric.metric == "acc"}
    assert accuracies.keys() == {"both", "tiny_choice", "other_choice"}
    whole = accuracies["both"].row_scores
    assert whole is not None
    assert whole.rows == 12
    assert "12 rows" in whole.verdict
    assert [file.name for file in result.files] == [
        "tasks-both-first-6.scores.json",
        "tasks-tiny_surprise-first-6.scores.json",
        "tasks-tiny_write-first-6.scores.json",
    ]
    with refuses(UsageError, fix=[f"{group.parent}/"]):
        harness.evaluate_tasks(run, [str(group)])


@pytest.mark.slow
def test_the_model_answers_as_lm_evals_own_does(
    run: Path, tiny: Path, tasks: Path, tmp_path: Path
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    # lm-eval's `peft=` cuts the embeddings down to the tokenizer's tokens: another softmax.
    merged = tmp_path / "merged"
    peft_model(tiny).merge_and_unload().save_pretrained(merged)
    ours = harness.evaluate_tasks(run, [f"{tasks}/"], device="cpu", batch_size=4)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    seen = set()
    for model, folder in (("base", tiny), ("tuned", merged)):
        theirs = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "tokenizer": str(tiny), "dtype": "float32"},
            tasks=["tiny_choice", "tiny_surprise", "tiny_write"],
            task_manager=manager,
            apply_chat_template=True,
            batch_size=4,
            device="cpu",
        )
        for metric in ours.metrics:
            expected = theirs["results"][metric.task]
            value, stderr = metric.values[model]
            # A merged weight is rounded once more; perplexity is the exp of a sum of logits.
            assert value == pytest.approx(expected[f"{metric.metric},none"], rel=1e-3)
            assert stderr == pytest.approx(expected[f"{metric.metric}_stderr,none"], rel=1e-3)
        seen.add(tuple(metric.values[model].value for metric in ours.metrics))
    assert len(seen) == 2  # the adapter counts


@pytest.mark.slow
def test_a_full_fine_tune_has_its_base_and_a_run_on_text_no_template(
    tiny: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    file = str(tasks / "surprise.yaml")
    full = tmp_path / "full"
    make_run(full, tiny, peft_model(tiny).merge_and_unload())
    of_full = harness.evaluate_tasks(full, [file], device="cpu")
    (perplexity,) = of_full.metrics
    (plain,) = harness.evaluate_tasks(tiny, [file], device="cpu", chat_template=True).metrics
    assert perplexity.values["base"] == plain.values["model"]
    assert perplexity.values["base"] != perplexity.values["tuned"]

    text = tmp_path / "text"
    source = {"source": str(tasks.parent / "rows.jsonl"), "format": "text"}
    make_run(text, tiny, peft_model(tiny), data={"train": source})
    of_text = harness.evaluate_tasks(text, [file], device="cpu", base=False)
    assert of_full.chat_template
    assert not of_text.chat_template

    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "chat_template.jinja").unlink()
    assert not harness.evaluate_tasks(bare, [file], device="cpu").chat_template
    assert load_tasks._needs_default_tasks(["gsm8k"])
    assert not load_tasks._needs_default_tasks([file, f"{tasks}/"])
    with refuses(UsageError, where="--chat-template"):
        harness.evaluate_tasks(bare, [file], device="cpu", chat_template=True)
