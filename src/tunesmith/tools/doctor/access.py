"""Checks that a recipe's model can be had: a token, the license, and room for it."""

import shutil
from pathlib import Path

from tunesmith.config.schema import Model
from tunesmith.errors import TunesmithError
from tunesmith.host.files import existing_folder
from tunesmith.tools.doctor.system import GIB, Finding, finding

HUB_TIMEOUT_SECONDS = 5.0


def check_model(model: Model) -> list[Finding]:
    """The findings; a network that fails is one of them.

    Only the Hub's description of the model is fetched.
    """
    from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url

    from tunesmith.hub.fetch import cached_model, list_repo, local_model
    from tunesmith.hub.hub_calls import hub_calls

    name = model.name
    findings = []
    try:
        if local_model(model) or cached_model(model):
            return [finding("model/ok", name=name)]
        if not get_token():
            findings.append(finding("token/none"))
        listing = list_repo(name, model.revision, "model", timeout=HUB_TIMEOUT_SECONDS, tries=1)
        with hub_calls(name, model.revision):
            # Anybody may read the description of a gated model; its files answer with 401.
            config = hf_hub_url(name, "config.json", revision=listing.commit)
            get_hf_file_metadata(config, timeout=HUB_TIMEOUT_SECONDS)
    except TunesmithError as error:
        # The words of `hub_calls` tell which of the three it is.
        if "gated" in error.what:
            case = "licence/gated"
        elif "cannot be reached" in error.what:
            case = "hub/unreachable"
        else:
            case = "model/refused"
        return [*findings, finding(case, message=error.what, why=error.why, fix=error.fix)]
    findings.append(finding("licence/ok", name=name, licence=listing.license))
    weights = [file for file in listing.files.values() if file.name.endswith(".safetensors")]
    size = sum(file.size for file in weights)
    # The cache may not exist yet: the disk is that of the first folder above it.
    folder = existing_folder(Path(constants.HF_HUB_CACHE))
    free = shutil.disk_usage(folder).free
    case = "room/ok" if free > size else "room/none"
    room = finding(case, name=name, size=size / GIB, folder=folder, free=free / GIB)
    return [*findings, room]
