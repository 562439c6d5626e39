"""The recipes by name: what each says of itself, and its settings."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import config_of, read_header, read_layer
from vmf_pretrain.config.recipe import RecipeHeader
from vmf_pretrain.config.run import Config

FOLDER = Path(__file__).parent
ANY_FOLDER: dict[str, Any] = {"data": {"folder": "FOLDER"}}  # recipes leave it to --data


@dataclass(frozen=True)
class Recipe:
    """A recipe of this package.

    Attributes:
        name: of its file.
        about: what it says of itself.
        config: its settings; ``data.folder`` is a placeholder where it trains on images of the user's.
    """

    name: str
    about: RecipeHeader
    config: Config


def recipe_names() -> list[str]:
    """Names of all recipes, in alphabetic order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe.

    Raises:
        PretrainError: there is none of this name; names the nearest one.
    """
    names = recipe_names()
    if name in names:
        return FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}."
    if name.endswith((".yaml", ".yml")):
        hint = "a file is given with --config."
    raise PretrainError(f"{name} is no recipe; {hint}")


def recipes() -> list[Recipe]:
    """Every recipe."""
    return [_recipe(name, recipe_path(name)) for name in recipe_names()]


def _recipe(name: str, path: Path) -> Recipe:
    layer = read_layer(path)
    images_of_user = layer.get("data", {}).get("kind") != "digits"
    return Recipe(name, read_header(path), config_of(ANY_FOLDER if images_of_user else {}, layer))
