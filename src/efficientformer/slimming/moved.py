"""A final training whose teacher is a file of the run folder, which may lie elsewhere when the run goes on."""

from __future__ import annotations

from pathlib import Path

import torch

from efficientformer.training.recipe import Recipe
from efficientformer.training.state import STATE, RunFolder
from efficientformer.weights.files import atomic_write


def point_at_teacher(folder: Path, teacher: str) -> None:
    """Let a training that was begun go on with its teacher's file at another path.

    Its recipe is written last: a process killed before that does it again.

    Args:
        folder: The run folder of the training; it holds a state.
        teacher: Where the file is now.
    """
    recipe = RunFolder(folder).recipe()
    if recipe.teacher == teacher:
        return
    recipe = recipe.with_changes(teacher=teacher)
    _write_state(folder / STATE, recipe)
    with atomic_write(folder / "recipe.json") as file:
        file.write(f"{recipe.to_json()}\n".encode())


def _write_state(path: Path, recipe: Recipe) -> None:
    """Change the recipe in a state, which is refused with any other; one that is damaged is refused in any case."""
    try:
        data = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # whatever a damaged file makes torch raise
        return
    with atomic_write(path) as file:
        torch.save({**data, "recipe": recipe.to_json()}, file)
