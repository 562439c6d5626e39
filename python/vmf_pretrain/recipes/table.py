"""The recipes by name: what each says of itself, and its settings."""

import difflib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmf_pretrain.config.data import BUNDLED
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import HEADER, config_of, read_header, read_layer, read_parent, settings_text
from vmf_pretrain.config.method import VMF
from vmf_pretrain.config.recipe import RecipeHeader
from vmf_pretrain.config.run import Config

FOLDER = Path(__file__).parent
# by device: the recipe of DINO-vMF, which fits DINO too, and the beginning of the names of the other methods' recipes
PHOTO_RECIPES = {"cpu": ("small_photos", "small"), "cuda": ("imagefolder_vits16", "imagenette")}
CIFAR = "cifar"
DINO = "dino"
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


def bundled_recipe(images: str, method: str | None = None) -> str:
    """The recipe for a method on bundled images: its own where there is one, and that of the images for all others."""
    own = f"{images}_{(method or '').removesuffix(VMF)}"
    return own if own in recipe_names() else images


def photo_recipe(device: str, method: str | None = None, *, small: bool = False) -> str:
    """The recipe for a method on photographs: its own where there is one, and that of DINO-vMF for all others.

    Args:
        device: "cpu" or "cuda".
        method: by name; None is that of the recipe.
        small: whether the images are as small as CIFAR's.
    """
    usual, own = PHOTO_RECIPES[device]
    family = (method or "").removesuffix(VMF)
    chosen = f"{CIFAR if small and device == 'cuda' else own}_{family}"
    return chosen if family != DINO and chosen in recipe_names() else usual


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


def recipe_layer(name: str) -> dict[str, Any]:
    """The settings of a recipe over those of the ones that it extends; what none of them says keeps its default.

    Raises:
        PretrainError: there is none of this name.
    """
    return read_layer(recipe_path(name), recipe_path)


def recipes() -> list[Recipe]:
    """Every recipe."""
    return [recipe_of(name) for name in recipe_names()]


def recipe_of(name: str) -> Recipe:
    """One recipe.

    Raises:
        PretrainError: there is none of this name.
    """
    layer = recipe_layer(name)
    images_of_user = layer.get("data", {}).get("kind") not in BUNDLED
    return Recipe(name, read_header(recipe_path(name)), config_of(ANY_FOLDER if images_of_user else {}, layer))


def recipe_text(name: str, encoding: str = "utf-8") -> str:
    """A recipe as a file that needs no other: where its settings are from, its description, and every field.

    Raises:
        PretrainError: there is none of this name.
    """
    found, comments, place = recipe_of(name), "", recipe_path(name)
    while True:
        lines = place.read_text(encoding="utf-8").splitlines(keepends=True)
        comments += "".join(line for line in lines if line.startswith("#"))
        parent = read_parent(place)
        if parent is None:
            break
        comments += f"#\n# What it takes from {parent}:\n"
        place = recipe_path(parent)
    values = asdict(found.config)
    if values["data"]["folder"] == ANY_FOLDER["data"]["folder"]:
        values["data"]["folder"] = None
    return comments + settings_text({HEADER: asdict(found.about), **values}, encoding)
