"""Which folder of a run directory holds the model that the run has trained."""

from pathlib import Path
from typing import NamedTuple

from tunesmith.checkpoint import manifest
from tunesmith.errors import CheckpointError
from tunesmith.host.shell import shell_path
from tunesmith.run_dir import FINAL, RECIPE


class SavedModel(NamedTuple):
    """A folder of a run that holds model files.

    Attributes:
        note: a line for the user: which folder it is, and which ones were passed over, and why.
        is_unfinished: it stands for a run without a final/.
    """

    folder: Path
    note: str
    is_unfinished: bool


def find_saved_model(run_dir: Path) -> SavedModel:
    """final/ of a run directory, else the newest whole checkpoint that holds model files.

    CheckpointError where there is none.
    """
    skipped: list[str] = []
    checkpoints = [checkpoint.path for checkpoint in manifest.list_checkpoints(run_dir)]
    for candidate in (run_dir / FINAL, *checkpoints):
        if not candidate.is_dir():
            continue
        # Sizes only: reading every byte takes minutes, and comes before weights are used.
        damage = manifest.find_damage(candidate, contents=False)
        configs = (candidate / "adapter_config.json", candidate / "config.json")
        if damage is None and any(config.is_file() for config in configs):
            note = f"from {candidate}"
            is_unfinished = not (run_dir / FINAL).is_dir()
            if is_unfinished:
                note += ": the run has not finished"
            if skipped:
                note += f" (skipped {'; '.join(skipped)})"
            return SavedModel(candidate, note, is_unfinished)
        # The user sees which checkpoints were passed over, and why.
        skipped.append(f"{candidate.name}: {damage or 'has training state only'}")
    raise CheckpointError(
        "this run has no finished checkpoint",
        where=str(run_dir),
        why="; ".join(skipped) or "neither final/ nor a checkpoint-N/ exists",
        fix=f"continue it: tunesmith train {shell_path(run_dir / RECIPE)}",
    )
