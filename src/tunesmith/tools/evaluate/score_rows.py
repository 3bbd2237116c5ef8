"""Answer the rows of an evaluation with a model, and score the answers with their intervals.

Scoring is apart from answering: answers are written to a file (`answers_file.py`), and scored when
all of them are there.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from tunesmith.checkpoint import manifest
from tunesmith.data.compare.splits import SourceRows
from tunesmith.data.rows.samples import CalledFunction, Conversation, FunctionCall, Message
from tunesmith.data.tokens.token_set import TokenSet
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import DataError, MachineError, StoppedError, UsageError
from tunesmith.host.files import write_atomically
from tunesmith.host.signals import StopRequest
from tunesmith.inference.decoding import Answer, Decoding, answer_all, decode
from tunesmith.inference.load_run import LoadedModel, RunLocation
from tunesmith.metrics.intervals import (
    Interval,
    PairedIntervals,
    difference_sentence,
    mean_interval,
    paired_intervals,
)
from tunesmith.model.safetensors_files import weights_digest
from tunesmith.run_dir import EVALS, FINAL
from tunesmith.tools.evaluate.answers_file import AnswersFile, AnswersHeader, SavedAnswer
from tunesmith.tools.evaluate.generate import Prompt, check_room, make_prompt
from tunesmith.tools.evaluate.scorers import TOOL_CALL, ScoredRow, scorer_process
from tunesmith.tools.evaluate.tool_calls import CALL_PROBE, PROBE_TOOL, CallReader, learn_call_form
from tunesmith.units import count_of

# Called with what is counted, their count so far, their total, and the tokens so far
AnswerProgress = Callable[[str, int, int, int], None]


@dataclass(frozen=True)
class RowScores:
    """The scores that one scorer gave all rows.

    Attributes:
        models: the mean of each model, with its interval.
        paired: base and tuned side by side; None for a model alone.
        verdict: better, worse or no significant difference, in a sentence; empty for a model alone.
        scores: of each model, row by row.
    """

    name: str
    rows: int
    models: dict[str, Interval]
    paired: PairedIntervals | None
    verdict: str
    scores: dict[str, list[float]] = field(repr=False)


def read_call_form(loaded: LoadedModel) -> CallReader | None:
    """Find a reader of the tool calls that the model's template writes; None if it writes none, or
    none of a readable form."""
    function: CalledFunction = {"name": CALL_PROBE.name, "arguments": CALL_PROBE.arguments}
    call: FunctionCall = {"type": "function", "function": function}
    answer: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    thoughtful: Message = {**answer, "reasoning_content": "It must be looked up."}
    # Some templates of models that think write an answer without reasoning unlike their prompt.
    for message in (answer, thoughtful):
        sample = Conversation([{"role": "user", "content": "Look it up."}, message], [PROBE_TOOL])
        try:
            example = loaded.template.encode(sample, "last", where="the template")
        except DataError:
            continue
        reader = learn_call_form(_raw_text(loaded, example.ids[example.trained].tolist()))
        if reader is not None:
            return reader
    return None


def _raw_text(loaded: LoadedModel, ids: Sequence[int]) -> str:
    """The text of tokens, with special ones."""
    return decode(loaded.tokenizer, ids, with_special=True)


def answers_path(location: RunLocation, name: str, output: str | Path | None) -> Path:
    """Choose the file of answers: `output`, else in evals/ of the run directory, else in evals/.

    Each checkpoint that is not `final/` has a file of its own.
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
    """A name of rows or of a model as a part of a file's name."""
    path = Path(name)
    stem = path.stem if path.suffix in (".jsonl", ".json", ".csv", ".parquet") else name
    safe_name = "".join(char if char.isalnum() or char in "._-" else "-" for char in stem)
    return safe_name.strip("-.")[-80:] or "rows"


def trained_weights(location: RunLocation) -> str:
    """Identify the weights of a run's checkpoint; empty for a plain model."""
    if location.folder is None:
        return ""
    file = location.folder / manifest.MANIFEST
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    if location.holds == "base":
        return ""
    return weights_digest(location.folder)


class Scoring:
    """The rows of one evaluation that are answered and scored, and the file of their answers.

    A context from `open` on: `answer` for each model, then `finish`.
    Of several ranks rank 0 has the file.
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
        ranks: Ranks = ONE_PROCESS,
    ) -> None:
        """Check scorers and rows; nothing is written.

        Raises:
            DataError: a row cannot be answered, or not be scored whatever the answer.
            UsageError: a scorer cannot be used, or no row has an answer.
        """
        # Before any answer is paid for: a template whose calls cannot be read is refused.
        reader = read_call_form(loaded) if TOOL_CALL in scorers else None
        self.scorers = list(dict.fromkeys(scorers))
        self.start_scorers = partial(scorer_process, self.scorers, reader)
        self.prompts: list[Prompt] = []
        self.scored: list[ScoredRow] = []
        self.unanswered = 0
        digest = hashlib.sha256()
        # Rows that tokenization dropped have no place in `part`, and get no answer.
        for (source, rows), part in zip(parts, tokens.parts, strict=True):
            for i in part.row_indices:
                prompt = make_prompt(rows[i], rows.where(i), loaded, source)
                if prompt.scored is None:
                    self.unanswered += 1
                    continue
                self.prompts.append(prompt)
                self.scored.append(prompt.scored)
                digest.update(np.array([len(prompt.ids), *prompt.ids], np.int64).tobytes())
        if not self.prompts:
            raise no_scored_rows(name, "every answer is empty")
        check_room(self.prompts, loaded.context, decoding)
        # A row that no answer could satisfy is a fault of the data.
        with self.start_scorers() as run_scorer:
            for row in self.scored:
                for scorer in self.scorers:
                    run_scorer(scorer, None, row)
        references = [row.raw_reference for row in self.scored]
        self.reference_hash = hashlib.sha256(json.dumps(references).encode()).hexdigest()
        self.decoding = decoding
        self.batch_size = batch_size
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

    def open(self, path: Path, fresh: bool) -> None:
        """Read the existing answers; `fresh` will move them aside."""
        self.path = path
        self.file: AnswersFile | None = None
        if self.ranks.is_main_process:
            self.file = AnswersFile(path, self.header, fresh=fresh)

    def __enter__(self) -> "Scoring":
        with self.ranks.raise_on_all_ranks():
            if self.file is not None:
                self.file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.__exit__(*error)

    def answer(self, loaded: LoadedModel, model: str, progress: AnswerProgress) -> None:
        """Answer the rows that the file lacks answers of `model` for.

        Raises:
            StoppedError: a stop signal came; the answers so far are saved.
        """
        total = len(self.prompts)
        answer_count = self._answered(model)
        if answer_count == total:
            return
        what = f"answers of {model}"
        progress(what, answer_count, total, 0)
        done = answer_count
        tokens = 0

        def count_batch(batch: Sequence[Answer]) -> None:
            """Count this rank's answers, and as many of each other rank."""
            nonlocal done, tokens
            done = min(total, done + len(batch) * self.ranks.world)
            tokens += sum(len(answer.ids) for answer in batch) * self.ranks.world
            progress(what, done, total, tokens)

        with StopRequest(interactive=True) as stop:
            answers = answer_all(
                loaded.model,
                loaded.tokenizer,
                [prompt.ids for prompt in self.prompts],
                self.decoding,
                stops=loaded.template.end_ids,
                batch_size=self.batch_size,
                start=answer_count,
                cancelled=stop.requested,
                ranks=self.ranks,
                answered=count_batch,
                pictures=lambda i: loaded.pixels(self.prompts[i].pictures, self.prompts[i].where),
            )
            for i, answer in answers:
                if self.file is not None:
                    self.file.append(self._saved(loaded, model, i, answer))
        answer_count = self._answered(model)
        with self.ranks.raise_on_all_ranks():
            if answer_count < total:
                raise StoppedError(
                    f"stopped: {self.path} holds {answer_count} of {count_of(total, 'answer')} of "
                    f"{model}; to continue, run the same command again"
                )

    def _answered(self, model: str) -> int:
        """Count the answers of a model in the file, on every rank."""
        answer_count = 0 if self.file is None else len(self.file.of(model))
        return self.ranks.broadcast_object(answer_count)

    def unfinished(self) -> dict[str, int]:
        """Count the answers of each model that were cut at --max-new-tokens, on every rank."""
        counts = {} if self.file is None else self.file.unfinished()
        return self.ranks.broadcast_object(counts)

    def _saved(self, loaded: LoadedModel, model: str, i: int, answer: Answer) -> SavedAnswer:
        raw = _raw_text(loaded, answer.ids)
        row = self.scored[i]
        return SavedAnswer(
            model=model,
            row=i,
            where=row.where,
            answer=answer.text,
            raw=None if raw == answer.text else raw,
            tokens=len(answer.ids),
            finished=answer.finished,
            reference=row.reference,
        )

    def finish(self, about: dict[str, object]) -> list[RowScores]:
        """Score all answers, and write the scores beside them; RunError where a scorer fails.

        Args:
            about: what the file says too: the losses, the step, the rows that were seen.
        """
        results: list[RowScores] = []
        with self.ranks.raise_on_all_ranks():
            if self.file is not None:
                with self.start_scorers() as run_scorer:
                    for scorer in self.scorers:
                        score = partial(run_scorer, scorer)
                        results.append(self._scores(scorer, score, self.file))
                row_hash = hashlib.sha256(f"{self.header.prompts} {self.reference_hash}".encode())
                about = {"decoding": self.decoding.describe(), **about}
                save_scores(
                    self.path,
                    self.header.data,
                    len(self.prompts),
                    row_hash.hexdigest(),
                    {**about, "scores": {result.name: saved_scores(result) for result in results}},
                )
        return self.ranks.broadcast_object(results)

    def _scores(
        self, name: str, score: Callable[[str, ScoredRow], float], file: AnswersFile
    ) -> RowScores:
        """The scores of all answers by one scorer; RunError where it fails."""
        scores: dict[str, list[float]] = {}
        for model in ("base", "tuned", "model"):
            answers = file.of(model)
            # The file may have some answers of a base that is not evaluated now.
            if len(answers) < len(self.scored):
                continue
            scores[model] = []
            for answer, row in zip(answers, self.scored, strict=True):
                has_special = name == TOOL_CALL or row.is_special
                text = answer.raw_answer if has_special else answer.answer
                scores[model].append(score(text, row))
        return summarize_rows(name, scores)


def summarize_rows(name: str, scores: dict[str, list[float]]) -> RowScores:
    """Means and intervals of each model's scores; of base and tuned with the sentence."""
    count = len(next(iter(scores.values())))
    models = {model: mean_interval(values) for model, values in scores.items()}
    if not {"base", "tuned"} <= scores.keys():
        return RowScores(name, count, models, None, "", scores)
    paired = paired_intervals(scores["base"], scores["tuned"])
    verdict = difference_sentence(name, paired, count)
    return RowScores(name, count, models, paired, verdict, scores)


def saved_scores(result: RowScores) -> dict[str, object]:
    """One of the `scores` of a file of scores, as `run_dir.read_scores` reads it."""
    values: dict[str, object] = {model: list(span) for model, span in result.models.items()}
    if result.paired is not None:
        values["difference"] = list(result.paired.difference)
        values["differing"] = result.paired.differing
    return values | {"verdict": result.verdict, "by_row": result.scores}


def save_scores(
    answers: Path,
    data: str,
    rows: int,
    row_hash: str,
    values: Mapping[str, object],
) -> None:
    """Write the file of scores that stands beside a file of answers; MachineError where that fails.

    Args:
        data: the rows' name.
        row_hash: tells whether two evals scored the same rows.
    """
    path = answers.with_name(f"{answers.stem}.scores.json")
    start = {"tunesmith": "eval scores", "data": data, "rows": rows, "row_hash": row_hash}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({**start, **values}) + "\n")
    except OSError as error:
        raise MachineError(
            "the scores cannot be written",
            where=str(path),
            why=error.strerror or str(error),
            fix="make sure the folder is writable and the disk is not full, then start again",
        ) from error


def no_scored_rows(name: str, why: str) -> UsageError:
    """The error for rows without an answer to score against."""
    fix = "remove --score, or use rows with answers"
    return UsageError("no row contains an answer to compare with", where=name, why=why, fix=fix)
