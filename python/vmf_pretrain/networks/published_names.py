"""Networks in published files and in ours: which there are, their parts, and their parameters by our names.

Known are files of DINO, iBOT, DINOv2, MAE, I-JEPA, V-JEPA and timm, and those of our runs. A network is found by its patch
embedding, whose name they all share.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class UnfitWeightsError(Exception):
    """Why weights cannot be used: the end of a sentence.

    Args:
        reason: without what can be done.
        remedy: what follows it, of settings that a run has.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason + remedy)
        self.reason = reason


MARK = "patch_embed.proj.weight"
# of distributed training, compilation, FSDP and activation checkpointing; anywhere in a name
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
EVALUATED = ("teacher", "target_encoder")  # what the sources evaluate; a student or a context encoder comes after
PARTS = {  # beside a backbone: by the name in a file, ours
    "head": "head",
    "dino_head": "head",
    "ibot_head": "patch_head",
    "patch_head": "patch_head",
    "decoder": "decoder",
}
DECODER = "decoder_"  # MAE's parts stand in its backbone
PREDICTOR = "predictor_"
RENAMED = (
    (re.compile(r"^blocks\.\d+\.(\d+)\."), r"blocks.\1."),  # DINOv2's chunks of blocks, which count on
    (re.compile(r"\.gamma_([12])$"), r".ls\1.gamma"),  # iBOT's scale of branches
    (re.compile(r"\.mlp\.w12\."), ".mlp.fc1."),  # SwiGLU: gate and values in one layer
    (re.compile(r"\.mlp\.w3\."), ".mlp.fc2."),
    (re.compile(r"^register_tokens$"), "reg_token"),
    (re.compile(r"^masked_embed$"), "mask_token"),  # iBOT
)
MOST_NAMES = 12  # that an error lists


@dataclass(frozen=True)
class Network(Generic[T]):
    """One network of a file.

    Attributes:
        name: its name there; "" if it has none.
        parts: tensors by our names: "backbone", and "head", "patch_head", "decoder", "predictor" where there are any.
        others: what else the file holds, by the first part of its names.
    """

    name: str
    parts: dict[str, dict[str, T]]
    others: list[str]


def network_in(tensors: Mapping[str, T], name: str | None = None) -> Network[T]:
    """One network among the tensors of a file.

    Args:
        tensors: by dotted name.
        name: of the network, such as "student"; None takes a teacher or a target encoder, or else the only one.

    Raises:
        UnfitWeightsError: there is none, none of that name, or none to prefer; the error lists what there is.
    """
    plain = {_unwrapped(key): value for key, value in tensors.items()}
    root = _root(plain, name)
    above, predictor = _above(root), _predictor_root(plain, _above(root))
    with_decoder = any(key.startswith(root + DECODER) for key in plain)
    parts: dict[str, dict[str, T]] = {"backbone": {}}
    others: dict[str, None] = {}
    for key, value in plain.items():
        if predictor is not None and key.startswith(predictor):
            part, own = "predictor", _predictor_name(key.removeprefix(predictor))
        elif key.startswith(root):
            part, own = _in_backbone(key.removeprefix(root), with_decoder=with_decoder)
        else:
            part, own = _beside_backbone(key, above) if above != root else ("", key)
        if part:
            parts.setdefault(part, {})[own] = value
        else:
            others[own.partition(".")[0]] = None
    return Network(above.rstrip("."), parts, list(others))


def _root(names: Iterable[str], name: str | None) -> str:
    """What stands before the names of the wanted backbone."""
    names = list(names)
    roots = [key.removesuffix(MARK) for key in names if key == MARK or key.endswith(f".{MARK}")]
    if not roots:
        had = _listed(key.partition(".")[0] for key in names)
        raise UnfitWeightsError(
            f"it holds no vision transformer by names that are known: no {MARK}, but {had or 'no tensor'}"
        )
    there = _listed(_above(root).rstrip(".") or "one without a name" for root in roots)
    if name is not None:
        found = [root for root in roots if name in root.split(".")]
        if len(found) != 1:
            raise UnfitWeightsError(f"start_from.network is {name} but it holds {there}")
        return found[0]
    preferred = [[root for root in roots if re.search(rf"(^|\.){wanted}", root)] for wanted in EVALUATED]
    best: list[str] = next((found for found in preferred if found), roots)
    if len(best) > 1:
        raise UnfitWeightsError(f"it holds {there}", "; say which with start_from.network")
    return best[0]


def _above(root: str) -> str:
    """The network of a backbone: "teacher." of "teacher.backbone."."""
    return root.removesuffix("backbone.")


def _predictor_root(names: Iterable[str], above: str) -> str | None:
    """What stands before a predictor's names: that of the network itself, or the only one."""
    found = {match[0] for name in names if (match := re.match(r"(?:.*\.)?predictor\.(?:backbone\.)?", name))}
    own = [root for root in found if root.startswith(f"{above}predictor.")]
    return next(iter(own or (found if len(found) == 1 else [])), None)


def _in_backbone(name: str, *, with_decoder: bool) -> tuple[str, str]:
    """Part and name of what stands among a backbone's tensors; a classifier has no part."""
    if with_decoder and (name == "mask_token" or name.startswith(DECODER)):
        return "decoder", name.removeprefix(DECODER)
    if name.startswith("head."):
        return "", "classifier"
    for pattern, ours in RENAMED:
        name = pattern.sub(ours, name)
    return "backbone", name


def _beside_backbone(name: str, above: str) -> tuple[str, str]:
    """Part and name of what stands beside a backbone; what belongs to another network has no part."""
    if name.startswith(above):
        beside, _, rest = name.removeprefix(above).partition(".")
        return PARTS.get(beside, ""), rest if beside in PARTS else beside
    return "", name.removeprefix(above.removesuffix(".").rpartition(".")[0] + ".")


def _predictor_name(name: str) -> str:
    return "mask_tokens.0" if name == "mask_token" else name.removeprefix(PREDICTOR)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _listed(names: Iterable[str]) -> str:
    each = list(dict.fromkeys(names))
    return ", ".join(each[:MOST_NAMES]) + (f" and {len(each) - MOST_NAMES} more" if len(each) > MOST_NAMES else "")
