"""Nested dicts and lists with tensors in them, as files that run no code when they are read.

`tree.json` holds everything but the tensors, which are in `tensors.safetensors`: a dict is a list
of its items, since JSON knows no keys that are numbers, and a tensor is its name.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

TREE, TENSORS = "tree.json", "tensors.safetensors"


def save_tree(tree: Any, folder: Path) -> None:
    """Writes the tree into a new folder.

    Raises:
        TypeError: it holds what is neither a tensor nor in JSON.
    """
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()

    def outline(node: Any) -> Any:
        if isinstance(node, Tensor):
            there = node.detach().cpu().contiguous()
            # Two names for one place in memory are refused: several optimizers share a table.
            there = there.clone() if there.data_ptr() in places else there
            places.add(there.data_ptr())
            tensors[name := str(len(tensors))] = there
            return {"tensor": name}
        if isinstance(node, dict):
            return {"dict": [[key, outline(value)] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return [outline(value) for value in node]
        return node

    (folder / TREE).write_text(json.dumps(outline(tree)))
    save_file(tensors, folder / TENSORS)


def load_tree(folder: Path) -> Any:
    """What `save_tree` wrote; a tuple has become a list. Tensors are on the CPU."""
    tensors = load_file(folder / TENSORS)

    def grown(node: Any) -> Any:
        if isinstance(node, list):
            return [grown(value) for value in node]
        if not isinstance(node, dict):
            return node
        if "tensor" in node:
            return tensors[node["tensor"]]
        return {key: grown(value) for key, value in node["dict"]}

    return grown(json.loads((folder / TREE).read_text()))
