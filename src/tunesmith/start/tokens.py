"""Stage 3 of a start: tokenize and check the rows. It imports no torch for text."""

from collections.abc import Mapping
from dataclasses import dataclass

from tunesmith.batches.training_data import TrainingData
from tunesmith.checkpoint.resume import Resumed, Start, check_unchanged, find_resumed
from tunesmith.checkpoint.start_adapter import adapter_digest
from tunesmith.config.schema import Run
from tunesmith.model.arch.tokenizer import eos_ids
from tunesmith.planning.run_plan import shares_prompts
from tunesmith.start.model import ModelFacts
from tunesmith.start.prepare import prepare_data
from tunesmith.tokens.contract import CutAnswers


@dataclass(frozen=True)
class TokenFacts:
    """The tokens of a recipe's rows, and the result of all checks before the machine is known.

    Attributes:
        hashes: hashes of the data and of the reference adapter, named as in `Progress`.
        resumed: the point from which a run resumes. None for a new run.
    """

    model: ModelFacts
    data: TrainingData
    hashes: Mapping[str, str | None]
    resumed: Resumed | None

    @property
    def run(self) -> Run:
        return self.model.run

    @property
    def start(self) -> Start:
        return self.model.rows.request.start


def read_tokens(model: ModelFacts) -> TokenFacts:
    """Tokenize the rows, check the tokens, and make the schedule of batches.

    Raises:
        DataError: the rows or the tokens are wrong, or they differ from the checkpoint.
        RecipeError: the duration is shorter than that of the resumed run.
    """
    run = model.run
    request = model.rows.request
    start = request.start
    shares = shares_prompts(run, model.support.recurrent)
    if start.progress is not None:
        # A resumed run must share prompts only if it did so before, because sharing changes the
        # rounding of sums.
        shares = shares and bool(start.progress.shares_prompts)
    # Truncated answers are only a warning for a measurement, because it trains nothing, and for a
    # resumed run, because it must keep its rows.
    cut_answers: CutAnswers = "refuse"
    if request.purpose == "measure" or start.checkpoint is not None:
        cut_answers = "warn"
    data = prepare_data(
        run,
        model.tokenizer,
        eos_ids(model.folder, model.tokenizer),
        model.vocab_rows,
        opened=model.rows.opened,
        strict=request.purpose != "show",
        cut_answers=cut_answers,
        position_limit=model.spec.position_limit,
        shares_prompts=shares,
        pictures=model.pictures,
    )
    hashes = {"data_hash": data.digest, "validation_hash": data.validation_digest}
    if run.uses_reference and run.adapter.from_ is not None:
        hashes["reference_hash"] = adapter_digest(run.adapter.from_)
    if run.samples_answers:
        from tunesmith.start import rewards

        hashes["reward_hash"] = rewards.reward_digest(run)
        rewards.check_sampling(run, model.support)
        rewards.check_prompts(run, data)
        if request.purpose == "train" and start.checkpoint is None:
            rewards.check_reward(run, data)
    check_unchanged(start, run, hashes)
    return TokenFacts(model, data, hashes, find_resumed(start, run, data.schedule))
