"""The settings of generation beside what was trained: where an answer ends, for other programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from recipes import built_model, make_run
from tunesmith.checkpoint.contents import tokenizer_files, write_model_files
from tunesmith.data.text.select_template import select_template
from tunesmith.model.tokenizer import eos_ids


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_what_is_written_stops_at_each_end_of_an_answer(
    kind: str, tiny: Path, tmp_path: Path
) -> None:
    """An adapter's folder too, with the sampling defaults of its base."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    other_end = tokenizer.eos_token_id + 1
    stated = {"eos_token_id": [other_end], "temperature": 0.6, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(stated))
    run = make_run(base, tmp_path, adapter={"kind": kind})
    template = select_template(run.data, tokenizer, eos_ids(base, tokenizer))
    assert template.end_ids >= {other_end, tokenizer.eos_token_id}
    written = tmp_path / "written"
    written.mkdir()
    files = tokenizer_files(tokenizer, template, base)
    write_model_files(written, run, built_model(run, base), files)
    settings = GenerationConfig.from_pretrained(written)
    assert set(settings.eos_token_id) == set(template.end_ids)
    assert (settings.temperature, settings.do_sample) == (0.6, True)
    assert settings.pad_token_id == tokenizer.pad_token_id
