"""The rows of TRL's scripts: one data set, or a mixture of several.

A mixture has one of two forms: TRL's list `datasets`, or `dataset_mixture` of the
alignment-handbook and open-r1.
"""

from collections.abc import Mapping
from typing import Any

from tunesmith.tools.importers.common import NAME_ROWS, entries_below, note_replaced
from tunesmith.tools.importers.translation import Translation

# Where a list of data sets stands, and what its keys are called there.
_LISTS: dict[str, Mapping[str, str]] = {
    "dataset_mixture.datasets": {"source": "id", "name": "config", "split": "split"},
    "datasets": {"source": "path", "name": "name", "split": "split"},
}
_OTHER_KEYS = ("data_files", "columns", "weight")
_TEST_SIZES = ("dataset_mixture.test_split_size", "test_split_size")
_DRAWN_ROWS = "a share of the rows is drawn at random there; here it is the first ones"
_ALL_ROWS = (
    "all rows of each data set are trained on here; to take fewer, give each its"
    " data.train.0.max_examples"
)
_NO_ROWS = "none of its rows are trained on, here as there: the data set is left away"
# As TRL tells a format by the columns of the rows.
_FORMATS_OF_COLUMNS = {
    "messages": "messages",
    "conversations": "sharegpt",
    "completion": "prompt-completion",
    "text": "text",
}


def trl_format(recipe: Translation, usual_format: str) -> str:
    """The format of the rows: as the command line has it, by the columns that the file names, or
    the usual one of the method.
    """
    if "data.train.format" in recipe.overrides:
        return str(recipe.overrides["data.train.format"])
    if usual_format != "messages":
        return usual_format
    columns: list[str] = []
    for prefix in _LISTS:
        for entry in entries_below(recipe, prefix):
            columns += recipe.listed(f"{entry}.columns")
    for column, format_ in _FORMATS_OF_COLUMNS.items():
        if column in columns:
            return format_
    # Many files name a column of messages there, which TRL then reads as such.
    return "messages" if _text_column(recipe) in _FORMATS_OF_COLUMNS else "text"


def _text_column(recipe: Translation) -> str:
    """The column that the file names for the text. UsageError unless it is one name."""
    column = recipe.get("dataset_text_field") or "text"
    if not isinstance(column, str):
        why = "the name of one column is expected"
        raise recipe.error("dataset_text_field", why, "write one name there")
    return column


def names_without_columns(recipe: Translation) -> list[str]:
    """The keys of data sets whose columns the file does not name: their format is a guess."""
    names = []
    has_mixture = False
    for prefix, theirs in _LISTS.items():
        for entry in entries_below(recipe, prefix):
            has_mixture = True
            if not recipe.is_set(f"{entry}.columns"):
                names.append(f"{entry}.{theirs['source']}")
    return names if has_mixture else ["dataset_name"]


def set_trl_rows(recipe: Translation, format_: str) -> None:
    """`data.train` and `data.validation`."""
    if "data.train.source" in recipe.overrides:
        note_replaced(recipe, "dataset_mixer")
    elif recipe.find("dataset_mixer") or recipe.find_below("dataset_mixer"):
        name = (*recipe.find_below("dataset_mixer"), "dataset_mixer")[0]
        why = "this older form of the alignment-handbook is not read: dataset_mixture is"
        raise recipe.error(name, why, NAME_ROWS)
    if _set_mixture(recipe, format_):
        recipe.note("dataset_name", "the mixture is taken in its place", differs=False)
        for name in ("dataset_config", "dataset_train_split", "dataset_test_split"):
            if recipe.is_set(name):
                recipe.note(name, "it is of dataset_name", differs=False)
    elif "data.train.source" not in recipe.overrides and recipe.find_below("dataset_mixture"):
        name = recipe.find_below("dataset_mixture")[0]
        raise recipe.error(name, "its key `datasets` lists the data sets", NAME_ROWS)
    elif recipe.get("dataset_name"):
        _set_single(recipe, "train", "dataset_train_split", format_)
        if _validates(recipe):
            _set_single(recipe, "validation", "dataset_test_split", format_)


def _validates(recipe: Translation) -> bool:
    """Tell whether eval_strategy asks for validation; without quotes its word `no` is false."""
    return str(recipe.get("eval_strategy")).lower() not in ("no", "none", "false")


def _set_single(recipe: Translation, part: str, split_name: str, format_: str) -> None:
    names = {"source": "dataset_name", "name": "dataset_config", "split": split_name}
    source = {key: recipe.get(name) for key, name in names.items() if recipe.get(name)}
    recipe.set_key(f"data.{part}", _with_format(recipe, source, format_), *names.values())


def _with_format(recipe: Translation, source: dict[str, Any], format_: str) -> dict[str, Any]:
    """The source with its format, and the column of the text where the file names one."""
    source["format"] = format_
    text_column = _text_column(recipe)
    if format_ == "text" and text_column != "text":
        source["columns"] = {"text": text_column}
    return source


def _set_mixture(recipe: Translation, format_: str) -> bool:
    """`data.train` from a list of data sets; False where there is none."""
    for prefix, theirs in _LISTS.items():
        entries = entries_below(recipe, prefix)
        if not entries:
            continue
        sources: list[dict[str, Any]] = []
        names: list[str] = []
        for entry in entries:
            if "data.train.source" in recipe.overrides:
                note_replaced(recipe, entry)
                continue
            sources += _sources_of_entry(recipe, entry, theirs, format_)
            names += [f"{entry}.{name}" for name in (*theirs.values(), *_OTHER_KEYS)]
        if not sources and "data.train.source" not in recipe.overrides:
            why = "none of its rows are trained on, nor any of another data set"
            raise recipe.error(f"{entries[0]}.{theirs['source']}", why, NAME_ROWS)
        if sources:
            value = sources[0] if len(sources) == 1 else sources
            recipe.set_key("data.train", value, *names)
        for name in _TEST_SIZES:
            _set_hold_out(recipe, name)
        why = "data.hold_out_seed and train.seed draw the rows"
        recipe.note("dataset_mixture.seed", why, differs=False)
        return True
    return False


def _set_hold_out(recipe: Translation, name: str) -> None:
    size = recipe.number(name)
    if size:
        share = f"{size * 100:g} %" if size < 1 else f"{size:g} examples"
        recipe.set_key("data.hold_out", share, name)


def _sources_of_entry(
    recipe: Translation, entry: str, theirs: Mapping[str, str], format_: str
) -> list[dict[str, Any]]:
    """The sources of our recipe that one data set of a list makes."""
    folder = f"{entry}.data_dir"
    if recipe.get(folder):
        raise recipe.error(folder, "a folder of files is no source here", NAME_ROWS)
    source: dict[str, Any] = {}
    for key, name in theirs.items():
        value = recipe.get(f"{entry}.{name}")
        if value:
            source[key] = value
    source.setdefault("split", "train")
    files = _data_files(recipe, entry)
    if not files and "source" not in source:
        raise recipe.error(f"{entry}.{theirs['source']}", "it names the rows", NAME_ROWS)
    weight, fraction = f"{entry}.weight", f"{entry}.fraction"
    for name in (weight, fraction):
        if recipe.is_set(name) and recipe.number(name) == 0:
            recipe.note(name, _NO_ROWS, differs=False)
            return []
    if recipe.is_set(weight):
        _take_share(recipe, source, recipe.number(weight), weight)
        if "[" in source["split"]:
            recipe.note(weight, _DRAWN_ROWS)
    recipe.note(fraction, _ALL_ROWS)
    source = _with_format(recipe, source, format_)
    return [{**source, "source": file} for file in files] or [source]


def _data_files(recipe: Translation, entry: str) -> list[str]:
    """The files of a data set: one, a list, or those of its split."""
    key = f"{entry}.data_files"
    split = recipe.get(f"{entry}.split") or "train"
    of_split = f"{key}.{str(split).partition('[')[0]}"
    name = of_split if recipe.is_set(of_split) else key
    files = recipe.get(name)
    if not files:
        return []
    return list(files) if isinstance(files, list) else [str(files)]


def _take_share(recipe: Translation, source: dict[str, Any], share: float, name: str) -> None:
    """Bound the rows of a source to its share of them, from 0 to 1."""
    if share == 1:
        return
    percent = round(100 * share, 6)
    split = str(source["split"])
    if not 0 < percent < 100 or percent != int(percent) or "[" in split:
        why = f"this share of {split} is not taken here: give data.train.0.max_examples"
        recipe.note(name, why)
        return
    source["split"] = f"{split}[:{percent:g}%]"
