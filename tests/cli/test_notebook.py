"""The notebooks of the docs run, and a run in a notebook looks as it should: in a real kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from conftest import write_tiny_llama
from errors import holds, lines_with
from export.tiny_gguf import chat_tokenizer
from recipes import recipe
from tunesmith.config.dump import to_yaml

pytestmark = pytest.mark.nightly

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def client() -> Iterator[NotebookClient]:
    """Of one kernel for all notebooks: to start it and to import torch takes seconds."""
    kept = NotebookClient(new_notebook(), timeout=300, kernel_name="python3")
    kept.execute(cleanup_kc=False)
    yield kept
    kept.nb = new_notebook()
    kept.execute(cleanup_kc=True)


def executed(
    client: NotebookClient, notebook: NotebookNode, folder: Path, *, allow_errors: bool = False
) -> NotebookNode:
    """A notebook after its run in a folder, without the names of those before it."""
    fresh = new_notebook(cells=[new_code_cell(f"%reset -f\n%cd -q {folder}")])
    for client.nb, client.allow_errors in ((fresh, False), (notebook, allow_errors)):
        client.execute(cleanup_kc=False)
    return notebook


def text_of(cell: NotebookNode) -> str:
    """All that a cell shows, in its order, as plain text."""
    shown = [
        o.get("text") or o.get("data", {}).get("text/plain") or "\n".join(o.get("traceback", ()))
        for o in cell.outputs
    ]
    return "\n".join(shown)


def shown_by(
    client: NotebookClient, notebook: NotebookNode, folder: Path, **parameters: object
) -> str:
    """What the cells of a notebook show, run in a folder with other values of its parameters."""
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    names = [line.partition(" = ")[0] for line in cell.source.splitlines()]
    assert names == list(parameters)
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    cells = [cell for cell in executed(client, notebook, folder).cells if cell.cell_type == "code"]
    return "\n".join(map(text_of, cells))


def test_the_notebook_of_the_docs_runs_from_rows_to_a_merged_model(
    client: NotebookClient, tiny: Path, tmp_path: Path
) -> None:
    notebook = nbformat.read(DOCS / "first-tune.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    shown = shown_by(client, notebook, tmp_path, model=str(tiny), epochs=2)
    assert shown.count("step   1  loss") == 1
    assert "exact, 95 % interval" in shown
    assert shown.rstrip().endswith("checked: True")
    assert (tmp_path / "runs" / "first-tune-merged" / "model.safetensors").is_file()


def test_the_notebook_that_compares_runs_exports_the_better_one(
    client: NotebookClient, tmp_path: Path
) -> None:
    tokenizer = chat_tokenizer()
    model = write_tiny_llama(
        tmp_path / "base", vocab_size=len(tokenizer), hidden_size=256, intermediate_size=256
    )
    tokenizer.save_pretrained(model)
    notebook = nbformat.read(DOCS / "compare-runs.ipynb", as_version=4)
    shown = shown_by(client, notebook, tmp_path, model=str(model), steps=6)
    assert Path(shown.partition("best: ")[2].split()[0]).name in ("lr-0.001", "lr-0.0001")
    assert (tmp_path / "complaints.gguf").read_bytes()[:4] == b"GGUF"


def test_a_run_in_a_notebook_shows_its_steps_and_stops_without_a_traceback(
    client: NotebookClient, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe(tiny, tmp_path)))
    sources = [
        "import signal, tunesmith",
        "tunesmith.train('recipe.yaml', on_record=lambda r: print('mine', r.step) if r.step in (3, 7) else None)",
        "def stop(record):\n    if record.step == 10:\n        signal.raise_signal(signal.SIGINT)  # as the stop button",
        "tunesmith.train('recipe.yaml', {'train.duration': '20 steps'}, on_record=stop)",
        "tunesmith.train('recipe.yaml', {'train.duration': '20 steps'}, on_record=lambda record: 1 / 0)",
        "tunesmith.train('recipe.yaml', {'train.duration': '20 steps'}, quiet=True)",
    ]
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    _, trained, _, stopped, mine, quiet = executed(
        client, notebook, tmp_path, allow_errors=True
    ).cells
    assert lines_with(text_of(trained), "step 8/8")
    assert re.findall(r"^mine .*", text_of(trained), re.MULTILINE) == ["mine 3", "mine 7"]
    error = stopped.outputs[-1]
    assert (error.output_type, error.ename) == ("error", "StoppedError")
    assert holds(error.traceback[0], "SIGINT", "step 10")
    assert len(error.traceback) == 3
    assert mine.outputs[-1].ename == "ZeroDivisionError"
    assert len(mine.outputs[-1].traceback) > 3, "an error of the user's own keeps its traceback"
    assert [output.output_type for output in quiet.outputs] == ["execute_result"]
