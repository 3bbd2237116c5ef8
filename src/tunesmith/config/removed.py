"""Keys and values that recipes had once.

A removed key at its default said nothing, and is ignored: config.yaml of an older run has every
key. Anything else is refused with what to use, but by those who only read what an older run wrote.
"""

from collections.abc import Collection
from dataclasses import replace

from tunesmith.config.tree import Node
from tunesmith.errors import RemovedError

FAST_PATHS = "train.fast_paths"
QUANTIZE = "model.quantize"
REMOVED = (FAST_PATHS, QUANTIZE)


def without_removed(tree: Node, ignored: Collection[str] = ()) -> Node:
    """The tree of a recipe without what was removed; RemovedError for a removed value, with what to
    use.

    `ignored`: of REMOVED, the keys whose removed values are left out too. The key is then at its
    default.
    """
    for key in REMOVED:
        node = _find(tree, key)
        if node is None or (key == QUANTIZE and node.value != "int8"):
            continue
        if key not in ignored and node.plain() != []:
            raise _error(key, node)
        tree = _drop(tree, key)
    return tree


def _find(tree: Node, key: str) -> Node | None:
    section_name, _, name = key.partition(".")
    section = dict(tree.children()).get(section_name)
    if section is None:
        return None
    return dict(section.children()).get(name)


def _drop(tree: Node, key: str) -> Node:
    section_name, _, name = key.partition(".")
    sections = dict(tree.children())
    values = dict(sections[section_name].children())
    del values[name]
    sections[section_name] = replace(sections[section_name], value=values)
    return replace(tree, value=sections)


def _error(key: str, node: Node) -> RemovedError:
    if key == QUANTIZE:
        return RemovedError(
            "model.quantize: int8 was removed",
            where=node.where,
            why="it was never measured on a GPU",
            fix="model.quantize=fp8 on a Hopper, Ada or Blackwell GPU, model.quantize=nf4 to save"
            " memory, or model.quantize=none: bf16, the fastest on an A100",
        )
    why = "no GPU had measured what it named"
    if "fp32-weight-gradients" in str(node.plain()):
        why += (
            ", and weight gradients are added up in fp32 without a key now, wherever one GPU"
            " trains all weights"
        )
    fix = f"remove the key, or {key}=[] on the command line"
    return RemovedError(f"{key} was removed", where=node.where, why=why, fix=fix)
