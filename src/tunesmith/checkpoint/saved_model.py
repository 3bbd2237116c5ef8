"""Which folder of a run directory holds the model that the run has trained."""

from pathlib import Path

from tunesmith.checkpoint import manifest
from tunesmith.errors import CheckpointError
from tunesmith.host.shell import shell_path
from tunesmith.run_dir import FINAL, RECIPE, describe_weights, read_manifest


def find_saved_model(run_dir: Path) -> tuple[Path, str, bool]:
    """Find final/ of a run directory, else the newest whole checkpoint that holds model files.

    Returns:
        The folder; a line for the user that says which it is, and which ones were passed over and
        why; and whether it does not hold the last step of a run that has finished.

    CheckpointError where there is none.
    """
    skipped: list[str] = []
    for candidate in (run_dir / FINAL, *manifest.list_checkpoints(run_dir).values()):
        if not candidate.is_dir():
            continue
        # Sizes only: reading every byte takes minutes, and comes before weights are used.
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
        # The user sees which checkpoints were passed over, and why.
        skipped.append(f"{candidate.name}: {damage or 'has training state only'}")
    raise CheckpointError(
        "this run has no finished checkpoint",
        where=str(run_dir),
        why="; ".join(skipped) or "neither final/ nor a checkpoint-N/ exists",
        fix=f"continue it: tunesmith train {shell_path(run_dir / RECIPE)}",
    )
