"""Whether a recipe's model can be had: a token, the licence, and room for it."""

import shutil
from pathlib import Path

from tunesmith.config.schema import Model
from tunesmith.errors import TunesmithError
from tunesmith.host.files import existing_folder
from tunesmith.launch.doctor.system import GIB, Finding, say

WAIT = 5.0  # seconds for the Hub


def check_model(model: Model) -> list[Finding]:
    """The findings. Only the Hub's description of the model is asked for; a network that fails is a finding."""
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url

    from tunesmith.hub.fetch import cached_model, local_model
    from tunesmith.hub.hub_calls import hub_calls

    found = []
    try:
        if local_model(model) or cached_model(model):
            return [say("model/ok", name=model.name)]
        found += [] if get_token() else [say("token/none")]
        with hub_calls(model.name, model.revision):
            info = HfApi().model_info(
                model.name, revision=model.revision, files_metadata=True, timeout=WAIT
            )
            # 401: gated
            get_hf_file_metadata(
                hf_hub_url(model.name, "config.json", revision=info.sha), timeout=WAIT
            )
    except TunesmithError as error:
        case = "hub/unreachable" if "cannot be reached" in error.what else "model/refused"
        case = "licence/gated" if "gated" in error.what else case
        return [*found, say(case, said=error.what, why=error.why, fix=error.fix)]
    size = sum(
        file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors")
    )
    folder = existing_folder(Path(constants.HF_HUB_CACHE))
    free, licence = (
        shutil.disk_usage(folder).free,
        info.card_data.to_dict().get("license") if info.card_data else None,
    )
    case = "room/ok" if free > size else "room/none"
    room = say(case, name=model.name, size=size / GIB, folder=folder, free=free / GIB)
    return [*found, say("licence/ok", name=model.name, licence=licence or "not stated"), room]
