"""Search for the folder in a run directory that contains the trained model."""

from pathlib import Path

from tunesmith.checkpoint import manifest
from tunesmith.errors import CheckpointError
from tunesmith.host.shell import shell_path
from tunesmith.run_dir import FINAL, RECIPE, describe_weights, read_manifest


def find_saved_model(run_dir: Path) -> tuple[Path, str, bool]:
    """Find final/ in a run directory, or else the newest complete checkpoint with model files.

    Returns:
        A tuple of three values: the folder; a line for the user with the name of the folder, and
        each skipped folder with the reason; and True if the model is not from the last step of a
        finished run.

    Raise CheckpointError if there is no such folder.
    """
    skipped: list[str] = []
    for candidate in (run_dir / FINAL, *manifest.list_checkpoints(run_dir).values()):
        if not candidate.is_dir():
            continue
        # Check only the sizes, because reading every byte takes minutes. `check_sums` reads every
        # byte before the weights are used.
        damage = manifest.find_damage(candidate, contents=False)
        configs = (candidate / "adapter_config.json", candidate / "config.json")
        if damage is None and any(config.is_file() for config in configs):
            note = f"from {candidate}"
            weights = read_manifest(candidate)
            is_earlier = weights is not None and weights["step"] != weights["last_step"]
            is_unfinished = not (run_dir / FINAL).is_dir()
            if weights and is_earlier:
                note += f": {describe_weights(weights['step'], weights['last_step'])}"
            elif is_unfinished:
                note += ": the run has not finished"
            if skipped:
                note += f" (skipped {'; '.join(skipped)})"
            return candidate, note, is_unfinished or is_earlier
        # Collect the skipped folders with the reason, because the user sees them in `note` or the
        # error.
        skipped.append(f"{candidate.name}: {damage or 'it has only training state'}")

    raise CheckpointError(
        "this run has no finished checkpoint",
        where=run_dir,
        why="; ".join(skipped) or "neither final/ nor a checkpoint-N/ exists",
        fix=f"continue the run with `tunesmith train {shell_path(run_dir / RECIPE)}`",
    )
