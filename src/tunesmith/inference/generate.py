"""Rows in, rows with the model's answers out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.data.source import Rows, from_list
from tunesmith.inference.decoding import Decoding, answer_all, never
from tunesmith.inference.prompts import check_prompt_lengths, make_prompts

if TYPE_CHECKING:
    from tunesmith.inference.load_run import LoadedModel


def generate(
    loaded: LoadedModel,
    rows: Rows | Sequence[dict[str, Any]],
    decoding: Decoding | None = None,
    *,
    format_name: str = "auto",
    batch_size: int = 16,
    start: int = 0,
    cancelled: Callable[[], bool] = never,
) -> Iterator[dict[str, Any]]:
    """Answer rows of any format that trains, rendered with the template that was trained.

    Args:
        loaded: from `load_run`.
        rows: such as `[{"prompt": "Hello"}]`; an answer that a row holds is not shown to the model.
        decoding: how tokens are chosen; None is greedy, up to 256 tokens.
        format_name: `auto` looks at the columns of each row.
        batch_size: rows answered at once; with sampling, it changes what is drawn.
        start: the first row to answer; the answers are those of a job that began at row 0.
        cancelled: asked after each token; once true, the iterator ends after the rows already answered.

    Returns:
        an iterator over the rows from `start` on, in their order, each with `output` added, and `reference` where it
        held an answer.

    Raises:
        DataError: at the call, not in the iterator: a broken row, or a prompt that leaves no room for its answer.
    """
    decoding = decoding or Decoding()
    rows = rows if isinstance(rows, Rows) else from_list(list(rows))
    prompts = make_prompts(rows, loaded, format_name)
    check_prompt_lengths(prompts, decoding.max_new_tokens, loaded.context)
    options: dict[str, Any] = {"batch_size": batch_size, "start": start, "cancelled": cancelled}
    ids, stops = [prompt.ids for prompt in prompts], loaded.template.stops
    answers = answer_all(loaded.model, loaded.tokenizer, ids, decoding, stops=stops, **options)
    return (
        {**prompt.row, "output": text} | ({} if prompt.reference is None else {"reference": prompt.reference})
        for prompt, text in ((prompts[i], answer.text) for i, answer in answers)
    )
