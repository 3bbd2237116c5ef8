"""One prompt everywhere: its token ids in training, in generate, in eval, and by Transformers from
the saved folder.
"""

from __future__ import annotations

import itertools
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
from recipes import make_run as recipe_run
from runs import make_run, peft_model
from tunesmith.checkpoint.contents import tokenizer_files
from tunesmith.config.schema import Data, Source
from tunesmith.data.source.open_source import from_list, read_rows
from tunesmith.data.text.select_template import select_template
from tunesmith.data.text.template import Template
from tunesmith.data.tokens.tokenize import tokenize
from tunesmith.errors import DataError
from tunesmith.inference.load_run import LoadedModel, _template, load_run
from tunesmith.tools.evaluate import generate
from tunesmith.tools.evaluate.evaluate import _eval_tokens
from tunesmith.tools.evaluate.scorers import ScoredRow
from tunesmith.training.run import train

ASKED, SAID = "Which bird  sings?\n", " A wren."
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt-completion text": ("prompt-completion", {"prompt": ASKED, "completion": SAID}),
    "prompt-completion messages": (
        "prompt-completion",
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
    ),
    "messages": ("messages", {"messages": TURNS}),
    "alpaca": ("alpaca", {"instruction": ASKED, "input": "", "output": SAID}),
}
MODELS = {"chat": CHATML, "base": None}
CHOICES = ("auto", "chat", "alpaca", "file", "arguments", "raw")
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


@pytest.fixture(scope="module")
def loaded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("prompts") / "run"
    make_run(folder, tiny, peft_model(tiny))
    return load_run(folder, device="cpu")


def expected(model: str, choice: str, row: str) -> str | None:
    """The prompt's text; None where the pair is refused."""
    bare = row == "prompt-completion text"
    if choice == "auto" and model == "base":
        if row == "prompt-completion messages":
            return None  # no template, and none is guessed for a format whose rows need none
        choice = "raw" if bare else "alpaca"
    if (choice, model) == ("chat", "base") or (choice == "raw" and not bare):
        return None
    return WRITTEN["chat" if choice == "auto" else choice]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "choice", "row"), itertools.product(MODELS, CHOICES, ROWS))
def test_one_prompt_in_training_and_use(
    loaded: LoadedModel, model: str, choice: str, row: str, tmp_path: Path
) -> None:
    form, values = ROWS[row]
    file = tmp_path / "own.jinja"
    jinja = (
        "{% for m in messages %}{{ '<|pad|>[' + m.content + ']' if m.role == 'user' else m.content + '<|im_end|>' }}"
        "{% endfor %}"
    )
    if choice == "arguments":
        jinja = jinja.replace("']'", "']' + strftime_now('%Y') + ' ' + opening")
    file.write_text(jinja)
    source = Source(source=str(tmp_path / "rows.jsonl"), format=form)  # type: ignore[arg-type]
    Path(source.source).write_text(json.dumps(values) + "\n")
    data = Data(train=(source,), template=choice)
    if choice in ("file", "arguments"):
        data = replace(data, template=str(file))
    if choice == "arguments":
        data = replace(data, template_args={"opening": "no ", "strftime_now": "2031-02-03"})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = MODELS[model]
    stops = {tokenizer.eos_token_id}
    text = expected(model, choice, row)
    if text is None:
        with pytest.raises(DataError) as refused:
            tokenize(
                [(source, read_rows(source))],
                data,
                select_template(data, tokenizer, stops),
                cache=None,
                what="train",
            )
        assert refused.value.fix
        return
    template = select_template(data, tokenizer, stops)
    (example,) = tokenize([(source, read_rows(source))], data, template, cache=None, what="train")
    first = int(np.flatnonzero(example.trained)[0])
    trained = example.ids[:first].tolist()
    assert tokenizer.decode(trained) == text
    assert tokenizer.decode(example.ids[first:]).removesuffix("\n") == f"{SAID}<|im_end|>"

    (tmp_path / "final").mkdir()
    for name, content in tokenizer_files(tokenizer, template, tmp_path).items():
        (tmp_path / "final" / name).write_bytes(content)
    saved = AutoTokenizer.from_pretrained(tmp_path / "final")
    run = replace(loaded.recipe, data=data)
    unanswered = {k: v for k, v in values.items() if k not in ("completion", "output")}
    unanswered |= {"messages": TURNS[:1]} if form == "messages" else {}
    # And the folder alone
    for location in (
        replace(loaded.location, run=run),
        replace(loaded.location, run=None),
    ):
        used = replace(
            loaded,
            files=replace(loaded.files, tokenizer=saved),
            template=_template(location, saved, stops, tmp_path / "final", None),
            location=location,
        )
        for asked in (values, unanswered):
            prompt = prompt_of(used, asked)
            ids = prompt.ids
            reference = prompt.scored.reference if prompt.scored else None
            assert ids == trained
            assert reference == (SAID if asked is values else None)
        (scored,) = _eval_tokens([(source, from_list([values]))], used, "held-out")
        assert (scored.ids.tolist(), scored.trained.tolist()) == (
            example.ids.tolist(),
            example.trained.tolist(),
        )
        assert (
            used.template.prompt(
                generate.convert_sample({"messages": TURNS}, Source(source="x"), where="r")
            )
            == trained
        )
    theirs = saved.apply_chat_template(TURNS[:1], add_generation_prompt=True)["input_ids"]
    assert theirs == trained


@pytest.mark.slow
@pytest.mark.parametrize(("model", "choice"), [("chat", "auto"), ("chat", "raw"), ("base", "auto")])
def test_a_run_and_its_final_folder_elsewhere_ask_alike(
    tiny: Path, tmp_path: Path, model: str, choice: str
) -> None:
    """Trained for two steps by `train`; the answers and the prompts of the run and of the copied
    folder are equal.
    """
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    if model == "base":
        (base / "chat_template.jinja").unlink()
    run = recipe_run(
        base, tmp_path, held=False, data={"template": choice}, train={"duration": "2 steps"}
    )
    train(run, quiet=True)
    shutil.copytree(tmp_path / "run" / "final", tmp_path / "alone")
    asked = {"prompt": "Say amber 2 times: "}
    text = asked["prompt"] if "raw" in (choice, "raw" if model == "base" else "") else None
    text = text or f"<|im_start|>user\n{asked['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    for place in (tmp_path / "run", tmp_path / "alone"):
        found = load_run(place, device="cpu")
        assert found.tokenizer.decode(prompt_of(found, asked).ids) == text
        plain = AutoTokenizer.from_pretrained(found.location.folder)
        question = [{"role": "user", "content": asked["prompt"]}]
        assert (
            plain.apply_chat_template(question, add_generation_prompt=True, tokenize=False) == text
        )
    assert json.loads((tmp_path / "run" / "env.json").read_text())["template"] == (
        "chat" if "<" in text else "raw"
    )


def test_a_base_model_without_a_template_is_given_prompts_as_they_stand(
    tiny: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "chat_template.jinja").unlink()
    found = load_run(base, device="cpu")
    ids = [prompt_of(found, row).ids for row in ({"prompt": ASKED}, {"messages": TURNS})]
    assert [found.tokenizer.decode(i) for i in ids] == [ASKED, ALPACA]


def test_the_system_message_reaches_prompt_and_completion(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    data = Data(train=(Source(source="x", format="prompt-completion"),), system="Be brief.")
    row = {"prompt": "a", "completion": "b"}
    sample = generate.convert_sample(row, data.train[0], where="r", system=data.system)
    text = tokenizer.decode(select_template(data, tokenizer, {1}).prompt(sample))
    assert (
        text
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
    tokenizer.chat_template = None
    with refuses(DataError, where="data.system", fix=["data.template=alpaca"]):
        select_template(data, tokenizer, {1})


def prompt_of(loaded: LoadedModel, row: dict[str, Any]) -> generate.Prompt:
    source = generate.find_source(from_list([row]), loaded.location.sources, "auto", None)
    return generate.make_prompt(row, "row 1", loaded, source)


def scored_of(prompt: generate.Prompt) -> ScoredRow:
    assert prompt.scored is not None
    return prompt.scored


def test_references_are_the_row_s_text_whatever_its_tokens_say(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an answer of which the end token alone is supervised."""

    def end_alone(self: Template, *args: Any, **keys: Any) -> Any:
        return [pytest.fail("an answer was read from tokens")]

    monkeypatch.setattr(Template, "encode_many", end_alone)
    raw = replace(loaded, template=Template(loaded.tokenizer, {1}, jinja=None, name="raw"))
    for asked in (loaded, raw):
        found = prompt_of(asked, {"prompt": "Sentiment: ", "completion": "good"})
        assert (scored_of(found).reference, scored_of(found).raw_reference) == ("good", "good")
    history = [*TURNS, {"role": "user", "content": "b"}]
    for last in ({"content": SAID}, {"content": SAID, "train": False}):
        row = {"messages": [*history, {"role": "assistant", **last}]}
        assert scored_of(prompt_of(loaded, row)).reference == SAID
    row = {"prompt": ASKED, "chosen": SAID, "rejected": "No."}
    assert scored_of(prompt_of(loaded, row)).reference == SAID


def test_what_ends_an_answer_is_no_part_of_its_reference(loaded: LoadedModel) -> None:
    end = loaded.tokenizer.eos_token
    raw = replace(
        loaded,
        template=Template(
            loaded.tokenizer, {loaded.tokenizer.eos_token_id}, jinja=None, name="raw"
        ),
    )
    row = {"prompt": "Who? ", "completion": f"He.{end}"}
    assert scored_of(prompt_of(raw, row)).reference == "He."


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": " \n"},
        {"messages": [TURNS[0], {"role": "assistant", "content": ""}]},
        {"messages": [TURNS[0], {"role": "assistant", "content": " \n"}]},
        {"instruction": "a", "input": "", "output": ""},
        {"messages": TURNS[:1]},
    ],
)
def test_an_empty_answer_is_no_reference(loaded: LoadedModel, row: dict[str, Any]) -> None:
    assert prompt_of(loaded, row).scored is None


def test_a_reference_of_special_tokens_alone_keeps_them(loaded: LoadedModel) -> None:
    """As labels of `model.added_tokens`, which answers are decoded without."""
    found = prompt_of(loaded, {"prompt": "a", "completion": "<|pad|>"})
    assert (scored_of(found).reference, scored_of(found).is_special) == ("<|pad|>", True)
    found = prompt_of(loaded, {"prompt": "a", "completion": "<|pad|> b"})
    assert (scored_of(found).reference, scored_of(found).raw_reference) == (" b", "<|pad|> b")
    assert not scored_of(found).is_special
    (row,) = generate.generate(
        loaded, [{"prompt": "a", "completion": "<|pad|>"}], generate.Decoding(4)
    )
    assert row["reference"] == "<|pad|>"


def test_a_reference_has_composed_letters_where_the_tokenizer_makes_them(
    loaded: LoadedModel,
) -> None:
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    row = {"prompt": "a", "completion": "e\u0301"}
    assert scored_of(prompt_of(loaded, row)).reference == "e\u0301"
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    template = Template(tokenizer, {tokenizer.eos_token_id}, jinja=CHATML, name="chat")
    files = replace(loaded.files, tokenizer=tokenizer)
    composing = replace(loaded, files=files, template=template)
    assert scored_of(prompt_of(composing, row)).reference == "\u00e9"
