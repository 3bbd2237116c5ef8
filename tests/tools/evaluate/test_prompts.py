"""One prompt everywhere: the same token ids in training, generate, eval and Transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from conftest import CHATML, byte_tokenizer
from errors import refuses
from pairwise import name_of, pairwise
from recipes import make_run as recipe_run
from runs import make_run, peft_model
from tunesmith.answers.load_run import LoadedModel, _template, load_run
from tunesmith.answers.scoring.scorers import ScoredRow
from tunesmith.checkpoint.contents import tokenizer_files
from tunesmith.config.schema import Data, Source
from tunesmith.errors import DataError
from tunesmith.rows.source.open_source import from_list, read_rows
from tunesmith.start.run import train
from tunesmith.tokens.text.select_template import select_template
from tunesmith.tokens.text.template import Template
from tunesmith.tokens.tokenize import tokenize
from tunesmith.tools.evaluate import generate
from tunesmith.tools.evaluate.evaluate import _eval_tokens
from tunesmith.tools.evaluate.row_source import find_source

ASKED, SAID = "Which bird  sings?\n", " A wren."
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("prompt-completion", {"prompt": ASKED, "completion": SAID}),
    "turns": ("prompt-completion", {"prompt": TURNS[:1], "completion": TURNS[1:]}),
    "messages": ("messages", {"messages": TURNS}),
    "alpaca": ("alpaca", {"instruction": ASKED, "input": "", "output": SAID}),
}
MODELS = {"chat": CHATML, "base": None}
CHOICES = ("auto", "chat", "alpaca", "file", "arguments", "raw")
COVERED_PROMPTS = pairwise(
    {"model": [*MODELS], "choice": CHOICES, "row": [*ROWS]},
    tier_1={"model": [*MODELS], "choice": ["auto"], "row": [*ROWS]},
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    f"### Instruction:\n{ASKED}\n\n### Response:\n"
)
WRITTEN = {
    "chat": f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n",
    "alpaca": ALPACA,
    "file": f"<|pad|>[{ASKED}]",
    "arguments": f"<|pad|>[{ASKED}]2031 no ",
    "raw": ASKED,
}
OWN = (
    "{% for m in messages %}{{ '<|pad|>[' + m.content + ']' if m.role == 'user' else m.content + '<|im_end|>' }}"
    "{% endfor %}"
)
OPENED = OWN.replace("']'", "']' + strftime_now('%Y') + ' ' + opening")


@pytest.fixture(scope="module")
def loaded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("prompts") / "run"
    make_run(folder, tiny, peft_model(tiny))
    return load_run(folder, device="cpu")


def expected(model: str, choice: str, row: str) -> str | None:
    """The prompt's text; None where the pair is refused."""
    bare = row == "text"
    if choice == "auto" and model == "base":
        if row == "turns":
            return None  # no template, and none is guessed for a format whose rows need none
        choice = "raw" if bare else "alpaca"
    if (choice, model) == ("chat", "base") or (choice == "raw" and not bare):
        return None
    return WRITTEN["chat" if choice == "auto" else choice]


def prompt_of(loaded: LoadedModel, row: dict[str, Any]) -> generate.Prompt:
    source = find_source(from_list([row]), loaded.location.sources, "auto", None)
    return generate.make_prompt(row, "row 1", loaded, source)


def scored_of(loaded: LoadedModel, row: dict[str, Any]) -> ScoredRow:
    prompt = prompt_of(loaded, row)
    assert prompt.scored.is_answered
    return prompt.scored


@pytest.mark.slow
@pytest.mark.parametrize("case", COVERED_PROMPTS, ids=name_of)
def test_one_prompt_in_training_and_use(
    loaded: LoadedModel, case: dict[str, str], tmp_path: Path
) -> None:
    model, choice, (form, values) = case["model"], case["choice"], ROWS[case["row"]]
    source = Source(source=str(tmp_path / "rows.jsonl"), format=form)  # type: ignore[arg-type]
    Path(source.source).write_text(json.dumps(values) + "\n")
    data = Data(train=(source,), template=choice)
    if choice in ("file", "arguments"):
        file = tmp_path / "own.jinja"
        file.write_text(OWN if choice == "file" else OPENED)
        data = replace(data, template=str(file))
    if choice == "arguments":
        data = replace(data, template_args={"opening": "no ", "strftime_now": "2031-02-03"})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = MODELS[model]
    stops = {tokenizer.eos_token_id}
    read, text = [(source, read_rows(source))], expected(**case)
    if text is None:
        with pytest.raises(DataError) as refused:
            tokenize(read, data, select_template(data, tokenizer, stops), cache=None, what="train")
        assert refused.value.fix
        return
    template = select_template(data, tokenizer, stops)
    (example,) = tokenize(read, data, template, cache=None, what="train")
    first = int(np.flatnonzero(example.trained)[0])
    trained = example.ids[:first].tolist()
    assert tokenizer.decode(trained) == text
    assert tokenizer.decode(example.ids[first:]).removesuffix("\n") == f"{SAID}<|im_end|>"

    final = tmp_path / "final"
    final.mkdir()
    for name, content in tokenizer_files(tokenizer, template, tmp_path).items():
        (final / name).write_bytes(content)
    saved = AutoTokenizer.from_pretrained(final)
    unanswered = {k: v for k, v in values.items() if k not in ("completion", "output")}
    unanswered |= {"messages": TURNS[:1]} if form == "messages" else {}
    for run in (replace(loaded.recipe, data=data), None):  # None: the folder alone
        location = replace(loaded.location, run=run)
        used = replace(
            loaded,
            files=replace(loaded.files, tokenizer=saved),
            template=_template(location, saved, stops, final, None),
            location=location,
        )
        for asked, answer in ((values, SAID), (unanswered, None)):
            prompt = prompt_of(used, asked)
            assert prompt.ids == trained
            assert (prompt.scored.reference if prompt.scored.is_answered else None) == answer
        (scored,) = _eval_tokens([(source, from_list([values]))], used, "held-out")
        assert scored.ids.tolist() == example.ids.tolist()
        assert scored.trained.tolist() == example.trained.tolist()
        sample = generate.convert_sample({"messages": TURNS}, Source(source="x"), where="r")
        assert used.template.prompt(sample) == trained
    theirs = saved.apply_chat_template(TURNS[:1], add_generation_prompt=True)["input_ids"]
    assert theirs == trained


@pytest.mark.slow
def test_a_base_model_without_a_template_is_given_prompts_as_they_stand(
    tiny: Path, tmp_path: Path
) -> None:
    """Before it is trained, and after; its final folder elsewhere asks alike."""
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "chat_template.jinja").unlink()
    found = load_run(base, device="cpu")
    ids = [prompt_of(found, row).ids for row in ({"prompt": ASKED}, {"messages": TURNS})]
    assert [found.tokenizer.decode(i) for i in ids] == [ASKED, ALPACA]
    train(recipe_run(base, tmp_path, held=False, train={"duration": "2 steps"}), quiet=True)
    for place in (tmp_path / "run", shutil.copytree(tmp_path / "run/final", tmp_path / "alone")):
        found = load_run(place, device="cpu")
        assert found.tokenizer.decode(prompt_of(found, {"prompt": ASKED}).ids) == ASKED
        plain = AutoTokenizer.from_pretrained(found.location.folder)
        theirs = plain.apply_chat_template(TURNS[:1], add_generation_prompt=True, tokenize=False)
        assert theirs == ASKED


def test_the_system_message_reaches_prompt_and_completion(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    data = Data(train=(Source(source="x", format="prompt-completion"),), system="Be brief.")
    row = {"prompt": "a", "completion": "b"}
    sample = generate.convert_sample(row, data.train[0], where="r", system=data.system)
    text = tokenizer.decode(select_template(data, tokenizer, {1}).prompt(sample))
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert text == f"{system}<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = None
    with refuses(DataError, where="data.system", fix=["data.template=alpaca"]):
        select_template(data, tokenizer, {1})


def test_references_are_the_row_s_text_whatever_its_tokens_say(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an answer of which the end token alone is supervised; what ends an answer is no part."""
    monkeypatch.setattr(Template, "encode_many", lambda *_, **__: pytest.fail("read from tokens"))
    end = loaded.tokenizer.eos_token_id
    raw = replace(loaded, template=Template(loaded.tokenizer, {end}, jinja=None, name="raw"))
    history = [*TURNS, {"role": "user", "content": "b"}]
    for asked, row, reference in (
        (loaded, {"prompt": "Sentiment: ", "completion": "good"}, "good"),
        (raw, {"prompt": "Who? ", "completion": f"He.{loaded.tokenizer.eos_token}"}, "He."),
        (loaded, {"messages": [*history, {**TURNS[1], "train": False}]}, SAID),
        (loaded, {"prompt": ASKED, "chosen": SAID, "rejected": "No."}, SAID),
    ):
        assert scored_of(asked, row).reference == reference


def test_a_reference_of_special_tokens_alone_keeps_them(loaded: LoadedModel) -> None:
    """As labels of `model.added_tokens`, which answers are decoded without."""
    label = {"prompt": "a", "completion": "<|pad|>"}
    found = scored_of(loaded, label)
    assert (found.reference, found.is_special) == ("<|pad|>", True)
    found = scored_of(loaded, {"prompt": "a", "completion": "<|pad|> b"})
    assert (found.reference, found.raw_reference, found.is_special) == (" b", "<|pad|> b", False)
    for row in ({"prompt": "a", "completion": " \n"}, {"messages": TURNS[:1]}):
        assert not prompt_of(loaded, row).scored.is_answered, "an empty answer is no reference"


def test_a_reference_has_composed_letters_where_the_tokenizer_makes_them(
    loaded: LoadedModel,
) -> None:
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    row = {"prompt": "a", "completion": "e\u0301"}
    assert scored_of(loaded, row).reference == "e\u0301"
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    template = Template(tokenizer, {tokenizer.eos_token_id}, jinja=CHATML, name="chat")
    files = replace(loaded.files, tokenizer=tokenizer)
    composing = replace(loaded, files=files, template=template)
    assert scored_of(composing, row).reference == "\u00e9"
