"""Global batches of sampled answers, for reinforcement learning.

    prompts of the step -> groups of answers -> rewards -> weights -> micro batches

The answers of a step are sampled with the weights before the step, and used for one update. Each
prompt is in a packed row only once for all its answers.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean

import numpy as np
from safetensors.numpy import save_file

from tunesmith.answers.answers import decode
from tunesmith.answers.decoding import Decoding
from tunesmith.answers.sampler import Prompt, SampledIds, sample
from tunesmith.answers.scoring.reward import Reward
from tunesmith.answers.scoring.rows import make_scored_row
from tunesmith.answers.scoring.scorers import AnswerScores, RewardedAnswer
from tunesmith.batches.loader import GlobalBatch, Loader
from tunesmith.errors import RunError, UsageError
from tunesmith.host.cores import available_cores
from tunesmith.methods.grpo.groups import (
    answer_batches,
    group_examples,
    max_group_tokens,
    prompt_of,
)
from tunesmith.methods.grpo.loss import answer_weights
from tunesmith.metrics.run_figures import explain_equal_rewards
from tunesmith.model.layers.slots import answers_at_once
from tunesmith.parallel.shard import unsharded
from tunesmith.run_dir import ROLLOUTS, outdated_rollouts
from tunesmith.tokens.text.example import Example
from tunesmith.tokens.token_set import TokenSet
from tunesmith.train_model import StopRequests, TrainingSession

log = logging.getLogger(__name__)

# Number of steps without a group of different rewards, after which a warning is logged.
STEPS_WITHOUT_VARIANCE = 3


@dataclass
class Rollout:
    """A sampled answer and its reward."""

    answer: SampledIds
    reward: float
    text: str
    # Scores and values that the scorers have logged, by their names in records.
    scores: AnswerScores


class RewardedSampling:
    """Samples answers to rows, and rewards them.

    Args:
        session: the running training.
    """

    def __init__(self, session: TrainingSession) -> None:
        self.session = session
        processes = max(1, min(4, available_cores() // session.ranks.local_world))
        self.reward = Reward(session.run.method, session.data.template, processes)

    def sample(
        self,
        tokens: TokenSet,
        indices: Sequence[int],
        decoding: Decoding,
        *,
        answers: int,
        step: int,
        stop: StopRequests,
    ) -> list[list[Rollout]] | None:
        """Sample answers to some examples and reward them. This is a collective call.

        The examples are divided into windows of fixed size, which the data ranks sample in turn.
        All ranks return the answers to all examples. Return None if the run must stop. The
        ranks then draw no more tokens.
        """
        session = self.session
        window = answers_at_once(answers) // answers
        rank, ranks = session.share
        mine: dict[int, list[SampledIds]] = {}
        seen: Counter[int] = Counter()
        prompts = []
        for i in indices:
            prompts.append(prompt_of(tokens[i], i)._replace(occurrence=seen[i]))
            seen[i] += 1
        with unsharded(session.model), session.ranks.raise_on_all_ranks():
            for number, first in enumerate(range(0, len(indices), window)):
                if number % ranks != rank or stop.cancels_sampling():
                    continue
                chosen = prompts[first : first + window]
                sampled = sample(
                    session.model,
                    chosen,
                    decoding,
                    stops=session.data.template.end_ids,
                    answers=answers,
                    step=step,
                    pad_id=session.files.pad_id,
                    cancelled=stop.cancels_sampling,
                )
                for n in range(len(chosen)):
                    mine[first + n] = sampled[n * answers : (n + 1) * answers]
        stop.agree()
        if stop.is_due():
            return None
        rewarded: dict[int, list[Rollout]] = {}
        with session.ranks.raise_on_all_ranks():
            rewarded = self._reward(tokens, indices, mine, step, stop.cancels_sampling)
        stop.agree()
        if stop.is_due():
            return None
        groups: dict[int, list[Rollout]] = {}
        for of_rank in session.ranks.all_gather_object(rewarded):
            groups |= of_rank
        return [groups[n] for n in range(len(indices))]

    def _reward(
        self,
        tokens: TokenSet,
        indices: Sequence[int],
        groups: dict[int, list[SampledIds]],
        step: int,
        cancelled: Callable[[], bool],
    ) -> dict[int, list[Rollout]]:
        """Reward answers. Raise RunError if a scorer fails often."""
        data = self.session.data
        tokenizer = self.session.files.tokenizer
        items = []
        for n, group in groups.items():
            i = indices[n]
            sample = tokens.sample(i, self.session.run.data.system)
            row = make_scored_row(data.template, sample, tokens.row(i), tokens.where(i))
            for answer in group:
                ids = answer.ids[:-1] if answer.finished else answer.ids
                raw = decode(tokenizer, ids, with_special=True)
                text = decode(tokenizer, ids)
                final = data.template.final_answer(raw)
                items.append(RewardedAnswer(text, raw, row, answer.ids, answer.finished, final))
        try:
            state = {"global_step": step, "max_steps": self.session.total_steps or -1}
            rewards, scores = self.reward.of(items, cancelled, state)
        except (RunError, UsageError) as error:
            raise RunError(
                error.what,
                where=error.where.replace("--score", "method.reward"),
                why=error.why,
                fix=f"{error.fix.partition(', then')[0]}; to resume with a changed file, add "
                "checkpoint.resume=force",
            ) from None
        rewarded = iter(zip(rewards.tolist(), scores, items, strict=True))
        rollouts: dict[int, list[Rollout]] = {n: [] for n in groups}
        for n, group in groups.items():
            for answer in group:
                reward, of_answer, item = next(rewarded)
                rollouts[n].append(Rollout(answer, reward, item.text, of_answer))
        return rollouts


class Rollouts(AbstractContextManager["Rollouts"]):
    """Iterator over the global batches of sampled answers. Use it in a `with` statement.

    Args:
        session: the running training.
        sampling: samples the answers and rewards them.
        loader: determines the layout of the batches and the first step. It is not iterated.
        stop: the requests to stop. They cancel the sampling of a batch.
        ends: function that returns whether no more batches are needed. It is a collective call.
    """

    def __init__(
        self,
        session: TrainingSession,
        sampling: RewardedSampling,
        loader: Loader,
        stop: StopRequests,
        ends: Callable[[], bool],
    ) -> None:
        self.session = session
        self.sampling = sampling
        self.loader = loader
        self.stop = stop
        self.ends = ends
        self.without_variance: list[dict[str, float]] = []

    def __exit__(self, *exc: object) -> None:
        self.loader.close()
        self.sampling.reward.close()

    def __iter__(self) -> Iterator[GlobalBatch]:
        step = self.loader.start_step
        while not self.ends():
            began = time.perf_counter()
            batch = self._batch(step, began)
            if batch is None:
                return
            yield batch
            step += 1

    def _batch(self, step: int, began: float) -> GlobalBatch | None:
        """Return the batch of a step, or None if the sampling was cancelled."""
        session = self.session
        run = session.run
        indices = session.data.schedule.examples(step)
        groups = self.sampling.sample(
            session.data.train,
            indices,
            Decoding(
                run.method.answer_tokens, temperature=run.method.temperature, seed=run.train.seed
            ),
            answers=run.method.group,
            step=step,
            stop=self.stop,
        )
        if groups is None:
            return None
        tokens = session.data.train
        prompts = [prompt_of(tokens[i], i) for i in indices]
        with session.ranks.raise_on_all_ranks():
            if session.ranks.is_main_process:
                texts = [
                    (decode(session.files.tokenizer, prompt.ids), tokens.where(prompt.row))
                    for prompt in prompts
                ]
                path = Path(run.output_dir) / ROLLOUTS / f"step-{step + 1}.safetensors"
                write_rollouts(path, groups, texts)
                for old in outdated_rollouts(path.parent, step + 1):
                    old.unlink(missing_ok=True)
        return self._make_batch(step, prompts, groups, time.perf_counter() - began)

    def _make_batch(
        self, step: int, prompts: list[Prompt], groups: list[list[Rollout]], seconds: float
    ) -> GlobalBatch:
        session = self.session
        run = session.run
        rewards = np.array([[each.reward for each in group] for group in groups])
        lengths = np.array([[len(each.answer.ids) for each in group] for group in groups])
        finished = [each.answer.finished for group in groups for each in group]
        weights = answer_weights(rewards, lengths, run.method)
        has_variance = (rewards != rewards[:, :1]).any(1)
        values = {
            "reward": float(rewards.mean()),
            # As in TRL: the mean of the standard deviations within the groups.
            "reward_std": float(rewards.std(1, ddof=1).mean()),
            "answer_length": float(lengths.mean()),
            "cut_share": 1 - float(np.mean(finished)),
            "groups_with_variance": float(has_variance.mean()),
            "rollout_seconds": seconds,
        }
        scores = [each.scores for group in groups for each in group]
        for name in _score_names(scores):
            values[f"reward/{name}"] = fmean(each[name] for each in scores if name in each)
        self._warn_without_variance(values)
        # A group of equal rewards has no gradient, unless there is a KL penalty.
        computed = has_variance | (run.method.beta > 0)
        if not computed.any():
            # The optimizer needs a micro batch, so compute the first group. Its weights are 0.
            computed[0] = True
        limit = max_group_tokens(run, self.loader)
        examples: list[Example] = []
        for prompt, group, group_weights, is_computed in zip(
            prompts, groups, weights, computed, strict=True
        ):
            if is_computed:
                answers = [each.answer for each in group]
                examples += group_examples(prompt, answers, group_weights.tolist(), limit)
        micro = answer_batches(run, self.loader, examples)
        return GlobalBatch(
            step=step,
            epoch=session.data.schedule.epoch(step),
            micro=[batch.to(session.device) for batch in micro],
            tokens=sum(len(prompt.ids) for prompt in prompts) * run.method.group
            + int(lengths.sum()),
            supervised=int(lengths.sum()),
            examples=len(prompts),
            indices=[prompt.row for prompt in prompts],
            first_micro=session.share[0] * len(micro),
            idle_share=0.0,
            chosen_tokens=0,
            mismatched=[],
            source=session.data.train,
            data_seconds=0.0,
            extra=values,
            is_sampled=True,
        )

    def _warn_without_variance(self, values: dict[str, float]) -> None:
        if values["groups_with_variance"]:
            self.without_variance.clear()
            return
        self.without_variance.append(values)
        if len(self.without_variance) == STEPS_WITHOUT_VARIANCE:
            log.warning(f"the model learns nothing: {explain_equal_rewards(self.without_variance)}")


def write_rollouts(
    path: Path, groups: Sequence[Sequence[Rollout]], prompts: Sequence[tuple[str, str]]
) -> None:
    """Write the sampled answers of one step: token ids, log-probabilities, rewards, and texts.

    Args:
        prompts: the text of each group's prompt, and the file and line of its row.
    """
    answers = [each for group in groups for each in group]
    names = _score_names([a.scores for a in answers])
    texts = {"prompts": prompts, "answers": [a.text for a in answers], "scorers": names}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(
        {
            "ids": np.concatenate([np.array(a.answer.ids, np.int32) for a in answers]),
            "logprobs": np.concatenate([np.array(a.answer.logprobs) for a in answers]),
            "lengths": np.array([len(a.answer.ids) for a in answers], np.int32),
            "finished": np.array([a.answer.finished for a in answers]),
            "rewards": np.array([a.reward for a in answers]),
            # NaN: a scorer has left the answer out.
            "scores": np.array([[a.scores.get(name, np.nan) for name in names] for a in answers]),
            # The header of the file, which has at most 100 MB, is too small for the texts.
            "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
        },
        partial,
    )
    partial.replace(path)


def _score_names(scores: Sequence[AnswerScores]) -> list[str]:
    """Return the names of all scores, in the order of the recipe's scorers."""
    return list(dict.fromkeys(chain.from_iterable(scores)))
