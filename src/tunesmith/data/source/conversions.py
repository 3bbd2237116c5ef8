"""The commands that make rows or text of files that are not read."""

from pathlib import Path

from tunesmith.host.shell import shell_path

_PANDOC = "pandoc -t plain --wrap=none {file} -o {stem}.txt"
_OFFICE = "soffice --headless --convert-to {kind} --outdir {folder} {file}"
_PDF = "pdftotext {stem}.pdf {stem}.txt"
_CONVERSION_COMMANDS = {
    ".pdf": "pdftotext {file} {stem}.txt",
    ".djvu": "djvutxt {file} {stem}.txt",
    **dict.fromkeys(
        (".docx", ".odt", ".epub", ".html", ".htm", ".rtf", ".tex", ".rst", ".org", ".ipynb"),
        _PANDOC,
    ),
    **dict.fromkeys((".mobi", ".azw3"), "ebook-convert {file} {stem}.txt"),
    ".doc": _OFFICE.replace("{kind}", "txt:Text"),
    **dict.fromkeys((".pptx", ".ppt", ".odp"), f"{_OFFICE.replace('{kind}', 'pdf')} && {_PDF}"),
    **dict.fromkeys((".xlsx", ".xlsm", ".xlsb", ".xls", ".ods"), _OFFICE.replace("{kind}", "csv")),
    ".tsv": "cp {file} {stem}.csv",
    ".gz": "gunzip -k {file}",
    ".bz2": "bunzip2 -k {file}",
    ".xz": "unxz -k {file}",
    ".zst": "zstd -d {file}",
    ".zip": "unzip {file} -d {stem}",
    ".tar": "mkdir -p {stem} && tar -xf {file} -C {stem}",
    ".tgz": "mkdir -p {stem} && tar -xf {file} -C {stem}",
}
CONVERTED_SUFFIXES = tuple(_CONVERSION_COMMANDS)


def conversion(path: Path) -> str:
    """The command that makes text or rows of a file, beside it; empty where none is known."""
    command = _CONVERSION_COMMANDS.get(path.suffix.lower(), "")
    # `{stem}.txt` as one word of the shell, whatever is in the name.
    for ending in (".txt", ".csv", ".pdf", ""):
        word = shell_path(f"{path.with_suffix('')}{ending}")
        command = command.replace(f"{{stem}}{ending}", word)
    return command.replace("{file}", shell_path(path)).replace("{folder}", shell_path(path.parent))
