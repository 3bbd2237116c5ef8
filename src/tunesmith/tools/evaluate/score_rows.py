"""Generation of answers to the rows of an evaluation, and scores of the answers with intervals.

First, all answers are written to a file (`answers_file.py`). When the file is complete, the answers
are scored.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tunesmith.answers.answers import Answer
from tunesmith.answers.decoding import Decoding
from tunesmith.answers.load_run import LoadedModel, RunLocation
from tunesmith.answers.scoring.process import ScorerProcess
from tunesmith.answers.scoring.rows import read_call_form
from tunesmith.answers.scoring.scorers import SCORERS, TOOL_CALL, RewardedAnswer, scorer_label
from tunesmith.checkpoint import manifest
from tunesmith.distributed.ranks import Ranks
from tunesmith.errors import MachineError, StoppedError, UsageError
from tunesmith.host.files import write_atomically
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.intervals import (
    Interval,
    PairedIntervals,
    difference_sentence,
    mean_interval,
    paired_intervals,
    paired_losses,
)
from tunesmith.model.weights.safetensors_files import weights_digest
from tunesmith.rows.compare.splits import SourceRows
from tunesmith.run_dir import EVALS, FINAL
from tunesmith.tokens.token_set import TokenSet
from tunesmith.tools.evaluate.answers_file import AnswersFile, AnswersHeader, SavedAnswer
from tunesmith.tools.evaluate.generate import (
    RowPrompt,
    answer_rows,
    check_prompt_lengths,
    make_prompt,
)
from tunesmith.units import count_of

# Callback for progress. The arguments are a label, the number of finished items and the number of
# all items. While answers are generated, the number of generated tokens is a fourth argument.
Progress = Callable[..., None]


@dataclass(frozen=True)
class RowComparison:
    """Comparison of two models by one measure, which has a value for each row.

    Attributes:
        name: the measure: `loss`, or the name of a scorer.
        best: the tuned model, or of several runs the one with the best mean.
        other: the base model, or another run.
        paired: the difference, `best` minus `other`, with its confidence interval.
    """

    name: str
    best: str
    other: str
    paired: PairedIntervals

    @property
    def verdict(self) -> str:
        """The result in a sentence: better, worse or no significant difference."""
        return difference_sentence(self.name, self.paired, first=self.other, second=self.best)


def compare_rows(
    name: str,
    by_row: Mapping[str, Sequence[float]],
    best: str,
    tokens: Sequence[int] | None = None,
) -> tuple[RowComparison, ...]:
    """Compare one model with each of the others, row by row.

    Args:
        name: name of the measure.
        by_row: the values of each model, one for each row.
        best: the model that is compared with the others.
        tokens: number of tokens of each row if the values are losses, else None.
    """
    comparisons = []
    for other, values in by_row.items():
        if other == best:
            continue
        if tokens is None:
            paired = paired_intervals(values, by_row[best])
        else:
            paired = paired_losses(values, by_row[best], tokens)
        comparisons.append(RowComparison(name, best, other, paired))
    return tuple(comparisons)


@dataclass(frozen=True)
class RowScores:
    """Scores of all rows by one scorer.

    Attributes:
        name: the name of the scorer.
        rows: the number of rows.
        models: the mean score of each model with its confidence interval.
        scores: the scores of each model, row by row.
        comparisons: the tuned model compared with the base, or the best of several runs compared
            with each of the others.
    """

    name: str
    rows: int
    models: dict[str, Interval]
    scores: dict[str, list[float]] = field(repr=False)
    comparisons: tuple[RowComparison, ...] = ()


def answers_path(location: RunLocation, name: str, output: str | Path | None) -> Path:
    """Return the path of the file of answers.

    The path is `output` if it is given. Otherwise the file is in evals/ of the run directory, or of
    the current folder if there is no run. Each checkpoint other than `final/` has its own file.
    """
    if output is not None:
        return Path(output)
    stem = _file_stem(name)
    folder = location.folder
    if location.run is None or folder is None:
        return Path(EVALS) / f"{_file_stem(Path(location.base.name).name)}-{stem}.jsonl"
    if location.holds == "base":
        stem += "-base"
    elif folder.name != FINAL:
        stem += f"-{folder.name}"
    return folder.parent / EVALS / f"{stem}.jsonl"


def _file_stem(name: str) -> str:
    """Convert the name of a data set or model to a valid part of a file name."""
    path = Path(name)
    stem = path.stem if path.suffix in (".jsonl", ".json", ".csv", ".parquet") else name
    return re.sub(r"[^\w.-]", "-", stem).strip("-.")[-80:] or "rows"


def trained_weights(location: RunLocation) -> str:
    """Return a hash that identifies a run's trained weights, or "" for a base model."""
    if location.folder is None:
        return ""
    file = location.folder / manifest.MANIFEST
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    if location.holds == "base":
        return ""
    return weights_digest(location.folder)


class Scoring:
    """Evaluation of rows with scorers. Answers are generated, saved in a file and scored.

    Use the object in a `with` statement: call `answer` for each model, then `finish`. With several
    ranks, only rank 0 has the file.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokens: TokenSet,
        parts: SourceRows,
        name: str,
        scorers: Sequence[str],
        decoding: Decoding,
        batch_size: int,
        path: Path,
        *,
        fresh: bool,
        ranks: Ranks,
    ) -> None:
        """Check the scorers and the rows, and read the existing answers. No file is written.

        Args:
            name: name of the rows.
            path: the file of answers.
            fresh: rename an existing file when the `with` block starts, and answer all rows again.

        Raises:
            DataError: a row cannot be answered, or a scorer cannot score it.
            UsageError: a scorer cannot be used, or no row has an answer.
        """
        # Build the parser of tool calls first, so that an unsupported template is reported before
        # answers are generated.
        reader = read_call_form(loaded.template) if TOOL_CALL in scorers else None
        self.scorers = list(dict.fromkeys(scorers))
        self.process = ScorerProcess(self.scorers, reader)
        self.template, self.tokenizer = loaded.template, loaded.tokenizer
        self.prompts: list[RowPrompt] = []
        self.unanswered = 0
        digest = hashlib.sha256()
        # Rows without examples, which tokenization dropped, are skipped.
        for (source, rows), part in zip(parts, tokens.parts, strict=True):
            for i in dict.fromkeys(part.arrays.rows.tolist()):
                prompt = make_prompt(rows[i], rows.where(i), loaded, source)
                is_compared = any(scorer in SCORERS for scorer in self.scorers)
                if is_compared and not prompt.scored.is_answered:
                    self.unanswered += 1
                    continue
                self.prompts.append(prompt)
                digest.update(np.array([len(prompt.ids), *prompt.ids], np.int64).tobytes())
        if not self.prompts:
            raise no_scored_rows(name, "every answer is empty")
        check_prompt_lengths(self.prompts, loaded.context, decoding)
        self.scored = [prompt.scored for prompt in self.prompts]
        # Check every row with every scorer before answers are generated.
        with self.process as process:
            for row in self.scored:
                for scorer in self.scorers:
                    process.check(scorer, row)
        references = [row.raw_reference for row in self.scored]
        self.reference_hash = hashlib.sha256(json.dumps(references).encode()).hexdigest()
        self.ranks = ranks
        base = loaded.location.base
        self.header = AnswersHeader(
            data=name,
            rows=len(self.prompts),
            prompts=digest.hexdigest(),
            weights=trained_weights(loaded.location),
            base=f"{base.name}@{base.revision}" if base.revision else base.name,
            decoding=decoding,
            batch_size=batch_size,
        )
        self.path = path
        self.file: AnswersFile | None = None
        if ranks.is_main_process:
            self.file = AnswersFile(path, self.header, fresh=fresh)

    def __enter__(self) -> "Scoring":
        with self.ranks.raise_on_all_ranks():
            if self.file is not None:
                self.file.__enter__()
        # Model -> its answers, in the order of the rows. All ranks have all answers.
        self.answers = self.ranks.broadcast_object(self.file.answers if self.file else {})
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.__exit__(*error)

    def answer(self, loaded: LoadedModel, model: str, progress: Progress) -> None:
        """Answer the rows for which the file has no answer of `model`.

        Raises:
            StoppedError: a stop signal was received. The finished answers are saved.
        """
        total = len(self.prompts)
        answers = self.answers.setdefault(model, [])
        if len(answers) == total:
            return
        what = f"answers of {model}"
        done = len(answers)
        tokens = 0
        progress(what, done, total, tokens)

        def count_batch(batch: Sequence[Answer]) -> None:
            """Report progress. Other ranks are assumed to be as fast as this rank."""
            nonlocal done, tokens
            done = min(total, done + len(batch) * self.ranks.world)
            tokens += sum(len(answer.ids) for answer in batch) * self.ranks.world
            progress(what, done, total, tokens)

        with StopRequest(interactive=True) as stop:
            new_answers = answer_rows(
                loaded,
                self.prompts,
                self.header.decoding,
                batch_size=self.header.batch_size,
                start=len(answers),
                cancelled=stop.requested,
                ranks=self.ranks,
                answered=count_batch,
            )
            for row, (answer,) in new_answers:
                saved = SavedAnswer(
                    model=model,
                    row=len(answers),
                    where=row.where,
                    answer=answer.text,
                    raw=None if answer.raw == answer.text else answer.raw,
                    tokens=len(answer.ids),
                    finished=answer.finished,
                    reference=row.reference,
                )
                if self.file is not None:
                    self.file.append(saved)
                answers.append(saved)
        with self.ranks.raise_on_all_ranks():
            if len(answers) < total:
                raise StoppedError(
                    f"the evaluation was stopped: {self.path} has {len(answers)} of "
                    f"{count_of(total, 'answer')} of {model}; to continue, run the same command "
                    "again"
                )

    def unfinished(self) -> dict[str, int]:
        """Return the number of answers of each model that were cut off at --max-new-tokens."""
        return {
            model: sum(not answer.finished for answer in answers)
            for model, answers in self.answers.items()
        }

    def finish(self, about: dict[str, object]) -> list[RowScores]:
        """Score all answers, and write the scores to a file next to the answers.

        Args:
            about: further values for the scores file, such as the losses and the step.

        Raise RunError if a scorer fails.
        """
        results: list[RowScores] = []
        with self.ranks.raise_on_all_ranks():
            if self.ranks.is_main_process:
                with self.process:
                    results += [self._scores(name) for name in self.scorers]
                row_hash = hashlib.sha256(f"{self.header.prompts} {self.reference_hash}".encode())
                save_scores(
                    self.path,
                    self.header.data,
                    len(self.prompts),
                    row_hash.hexdigest(),
                    results,
                    {"decoding": self.header.decoding.describe(), **about},
                )
        return self.ranks.broadcast_object(results)

    def _scores(self, name: str) -> RowScores:
        """Score the answers of all models with one scorer. Raise RunError if the scorer fails."""
        scores: dict[str, list[float]] = {}
        for model in ("base", "tuned", "model"):
            answers = self.answers.get(model, ())
            # Skip a model whose answers are incomplete. For example, an earlier eval may have been
            # stopped while the base model answered.
            if len(answers) < len(self.scored):
                continue
            scores[model] = []
            for answer, row in zip(answers, self.scored, strict=True):
                raw = answer.answer if answer.raw is None else answer.raw
                ids = self.tokenizer.encode(raw, add_special_tokens=False)
                final = self.template.final_answer(raw)
                scored = RewardedAnswer(answer.answer, raw, row, ids, answer.finished, final)
                [found] = self.process.score(name, [scored])
                scores[model].append(found[scorer_label(name)])
        return summarize_rows(name, scores)


def summarize_rows(name: str, scores: dict[str, list[float]], best: str = "") -> RowScores:
    """Compute mean and interval of each model's scores, and compare one model with the others.

    Args:
        best: the model that is compared with the others; "": the last, which is the tuned model.
    """
    best = best or next(reversed(scores))
    models = {model: mean_interval(values) for model, values in scores.items()}
    comparisons = compare_rows(name, scores, best)
    return RowScores(name, len(scores[best]), models, scores, comparisons)


def save_scores(
    answers: Path,
    data: str,
    rows: int,
    row_hash: str,
    results: Sequence[RowScores],
    about: Mapping[str, object],
) -> None:
    """Write the file of scores next to a file of answers. `run_dir.read_scores` reads it.

    Args:
        answers: path of the file of answers.
        data: name of the rows.
        rows: number of rows.
        row_hash: hash of the rows. Two evals with the same hash have scored the same rows.
        results: the result of each scorer.
        about: further values for the file.

    Raise MachineError if the file cannot be written.
    """
    path = answers.with_name(f"{answers.stem}.scores.json")
    start = {"tunesmith": "eval scores", "data": data, "rows": rows, "row_hash": row_hash}
    scores = {}
    for result in results:
        values: dict[str, object] = {model: list(span) for model, span in result.models.items()}
        values["verdict"] = ""
        for comparison in result.comparisons:
            values["difference"] = list(comparison.paired.difference)
            values["differing"] = comparison.paired.differing
            values["verdict"] = comparison.verdict
        scores[result.name] = {**values, "by_row": result.scores}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({**start, **about, "scores": scores}) + "\n")
    except OSError as error:
        raise MachineError(
            "the scores cannot be written",
            where=path,
            why=error.strerror or str(error),
            fix="make sure that the folder is writable and the disk is not full, then run the "
            "command again",
        ) from error


def no_scored_rows(name: str, why: str) -> UsageError:
    """Build the error for rows that have no answers to compare with."""
    return UsageError(
        "no row has an expected answer to compare the model's answer with",
        where=name,
        why=why,
        fix="remove --score, or use rows with expected answers",
    )
