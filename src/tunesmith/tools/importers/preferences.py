"""Keys of other tools that learn from preferences, as `method` and its numbers.

All three train with TRL's trainers or code derived from them, so that a number of one name means
the same. The part `preferences` of a tool's table has its defaults, by trainer.
"""

from collections.abc import Collection

from tunesmith.config.schema import METHOD_KEYS
from tunesmith.tools.importers.source_config import TRL_TRAINERS
from tunesmith.tools.importers.translation import Translation

# TRL's loss_type of DPO: ours.
_DPO_LOSSES = ("sigmoid", "ipo", "hinge", "robust")
# Losses that one trainer of TRL alone has.
_TRAINERS_OF_LOSSES = {"kto": "kto", "simpo": "cpo"}
_AXOLOTL_METHODS = {"dpo": "dpo", "ipo": "dpo", "orpo": "orpo", "kto": "kto", "simpo": "simpo"}
_LLAMAFACTORY_METHODS = {
    **dict.fromkeys(("sigmoid", "ipo", "hinge"), "dpo"),
    "orpo": "orpo",
    "simpo": "simpo",
}
_NUMBERS_OF_METHODS = {
    "kto": ("desirable_weight", "undesirable_weight"),
    "simpo": ("simpo_gamma",),
}
_WHOLE_SEQUENCE = "the prompt's tokens are in its cross-entropy there; here those of the answer"
_NO_CROSS_ENTROPY = "the chosen answer's cross-entropy is added with this weight there; not here"
_OTHER_SMOOTHING = (
    "the loss takes that share of pairs as swapped there; here loss_type: robust does, by another"
    " formula"
)
_OLD_REFERENCE = (
    "the reference is the base without this adapter there, unless another key names it; here it is"
    " this adapter as it came"
)


def trl_trainer(recipe: Translation) -> str:
    """Find the trainer of TRL that reads these keys: method=NAME tells, or the keys."""
    method = recipe.overrides.get("method", recipe.overrides.get("method.name"))
    if method is not None:
        return "cpo" if method == "simpo" else str(method)
    trainer_of_loss = _TRAINERS_OF_LOSSES.get(str(recipe.get("loss_type")))
    if trainer_of_loss is not None:
        return trainer_of_loss
    for trainer, names in recipe.table["preferences"]["identified_by"].items():
        marks = [name for name in names if recipe.is_set(name)]
        if not marks:
            continue
        if trainer not in TRL_TRAINERS:
            fix = f"what can be imported is {', '.join(TRL_TRAINERS)}"
            raise recipe.error(marks[0], f"it is a key of TRL's {trainer} trainer", fix)
        if marks == ["beta"]:
            why = "DPO, ORPO, KTO and CPO have it: here it is DPO; for another give method=NAME"
            recipe.note("beta", why)
        return trainer
    return "sft"


def set_trl_method(recipe: Translation, trainer: str) -> str:
    """The method of a trainer of TRL, with its numbers; its name."""
    if trainer not in TRL_TRAINERS:
        fix = f"method= one of {', '.join(METHOD_KEYS)}"
        raise recipe.error("loss_type", f"no trainer of TRL is known as {trainer}", fix)
    if trainer == "sft":
        if recipe.get("loss_type") in ("nll", "chunked_nll"):
            recipe.note("loss_type", "it is the cross-entropy", differs=False)
        return "sft"
    name = "simpo" if trainer == "cpo" else trainer
    _set_method(recipe, name, trainer, "loss_type")
    if name in ("simpo", "kto"):
        require_value(recipe, "loss_type", (name,))
    if name == "dpo":
        _set_trl_losses(recipe)
    if name == "simpo":
        _note_cross_entropy(recipe)
        if recipe.number("label_smoothing"):
            recipe.note("label_smoothing", _OTHER_SMOOTHING)
    if name == "orpo":
        recipe.note("beta", _WHOLE_SEQUENCE)
    return name


def _set_trl_losses(recipe: Translation) -> None:
    """TRL's list of losses: one of ours, and `sft` with its weight."""
    losses = recipe.listed("loss_type")
    given = recipe.get("loss_weights")
    weights = given if isinstance(given, list) else [given or 1.0] * len(losses)
    weight_of = dict(zip(losses, weights, strict=False))
    main = [loss for loss in losses if loss != "sft"]
    has_counterpart = len(main) == 1 and main[0] in _DPO_LOSSES
    if not has_counterpart or not len(weight_of) == len(losses) == len(weights):
        fix = f"one of {', '.join(_DPO_LOSSES)}, optionally with sft; one weight per loss"
        raise recipe.error("loss_type", "it has no counterpart here", fix)
    if weight_of[main[0]] != 1:
        raise recipe.error("loss_weights", "it has no counterpart here", f"1 for {main[0]}")
    recipe.set_key("method.loss_type", main[0], "loss_type")
    if "sft" in losses:
        recipe.set_key("method.sft_weight", weight_of["sft"], "loss_type", "loss_weights")
    if main[0] == "robust":
        recipe.carry("label_smoothing")
    else:
        recipe.note("label_smoothing", "no loss but robust reads it", differs=False)
    is_usual = recipe.get("f_divergence_type") in (None, "reverse_kl")
    why = "it is what DPO is" if is_usual else "not supported: here it is reverse_kl"
    recipe.note("f_divergence_type", why, differs=not is_usual)


def set_axolotl_method(recipe: Translation) -> str:
    """The method of Axolotl's `rl`; its name."""
    rl = recipe.get("rl")
    if rl is None:
        return "sft"
    require_value(recipe, "rl", _AXOLOTL_METHODS)
    name = _AXOLOTL_METHODS[str(rl)]
    _set_method(recipe, name, str(rl), "rl")
    if name == "dpo":
        recipe.set_key("method.loss_type", "ipo" if rl == "ipo" else "sigmoid", "rl")
        _set_sft_weight(recipe, "rpo_alpha")
        recipe.note("dpo_label_smoothing", "no loss of TRL but robust reads it", differs=False)
    if name == "simpo":
        _note_cross_entropy(recipe)
    if name == "orpo":
        recipe.note("rl", _WHOLE_SEQUENCE)
    recipe.note("adapter_name_or_path", _OLD_REFERENCE)
    return name


def set_llamafactory_method(recipe: Translation) -> str:
    """Set the method that LLaMA-Factory's `stage` and `pref_loss` mean, and return its name, or
    `pt` for sft on rows of plain text.
    """
    stage = str(recipe.get("stage"))
    if stage in ("sft", "pt"):
        recipe.set_key("method", "sft", "stage")
        return stage
    recipe.defaults.update(recipe.table["preferences"]["defaults"][stage])
    name = "kto"
    if stage == "dpo":
        require_value(recipe, "pref_loss", _LLAMAFACTORY_METHODS)
        name = _LLAMAFACTORY_METHODS[str(recipe.get("pref_loss"))]
    _set_method(recipe, name, stage, "stage", *["pref_loss"] * (stage == "dpo"))
    if name == "dpo":
        recipe.set_key("method.loss_type", recipe.get("pref_loss"), "pref_loss")
        _set_sft_weight(recipe, "pref_ftx")
        if recipe.number("dpo_label_smoothing"):
            recipe.note("dpo_label_smoothing", _OTHER_SMOOTHING)
    if recipe.number("pref_ftx"):
        why = _NO_CROSS_ENTROPY
        if name == "dpo":
            why = "a mean over answers of the mean over their tokens there; here one over tokens"
        recipe.note("pref_ftx", why)
    recipe.note("adapter_name_or_path", _OLD_REFERENCE)
    return name


def _set_method(recipe: Translation, name: str, trainer: str, *names: str) -> None:
    """`method.name`, which follows from their keys `names`, and the numbers of a method.

    TRL takes all dropout out of a model that is compared with a reference.
    """
    recipe.defaults.update(recipe.table["preferences"]["defaults"][trainer])
    recipe.set_key("method.name", name, *names)
    recipe.carry("beta", *_NUMBERS_OF_METHODS.get(name, ()))
    if recipe.values.get("adapter.dropout") and recipe.is_on("disable_dropout"):
        recipe.set_key("adapter.dropout", 0.0, "lora_dropout", "disable_dropout")


def _set_sft_weight(recipe: Translation, key: str) -> None:
    if recipe.number(key):
        recipe.set_key("method.sft_weight", recipe.number(key), key)


def _note_cross_entropy(recipe: Translation) -> None:
    """CPO's trainer adds a cross-entropy to SimPO's loss, unless its weight is 0."""
    differs = bool(recipe.number("cpo_alpha"))
    recipe.note("cpo_alpha", _NO_CROSS_ENTROPY if differs else "SimPO has none", differs=differs)


def require_value(recipe: Translation, name: str, counterparts: Collection[object]) -> None:
    """UsageError unless a value has a counterpart."""
    value = recipe.get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value not in counterparts:
        fix = f"known are {', '.join(map(str, counterparts))}"
        raise recipe.error(name, "it has no counterpart here", fix)
