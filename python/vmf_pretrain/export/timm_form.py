"""timm: a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` takes, or its file as ``checkpoint_path``."""

from pathlib import Path
from typing import Any

import timm

from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.export.form import (
    CROPPED,
    WEIGHTS,
    Exportable,
    Features,
    Loading,
    not_taken,
    read_settings,
    write_settings,
)
from vmf_pretrain.export.names import without_mask_token
from vmf_pretrain.export.transformer import Shape, shape_of
from vmf_pretrain.storage.tensor_file import write_tensors

ANY_SCALE = 1e-5  # that makes timm's blocks have scales; the weights replace their values


class TimmForm:
    """The same names and classes as in the run."""

    name = "timm"
    needs: tuple[str, ...] = ()

    def write(self, exported: Exportable, folder: Path) -> Loading:
        """``model.safetensors`` and ``config.json``."""
        shape = shape_of(exported.network, self.name)
        arguments = model_arguments(shape)
        write_tensors(folder / WEIGHTS, without_mask_token(exported.network.state_dict()), {"format": "pt"})
        settings = {
            "architecture": shape.name,
            "num_classes": 0,
            "num_features": shape.width,
            "global_pool": shape.pool,
            "pretrained_cfg": pretrained_settings(exported.fed),
            "model_args": arguments,
        }
        write_settings(folder, settings)
        given = ",\n    ".join(f"{name}={value!r}" for name, value in arguments.items())
        code = (
            'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
            "# or, without config.json:\n"
            f'model = timm.create_model(\n    "{shape.name}",\n    checkpoint_path="FOLDER/{WEIGHTS}",\n    num_classes=0,\n'
            f"    {given},\n).eval()\n\nfeatures = model(inputs)"
        )
        return Loading("timm", code)

    def read(self, exported: Exportable, folder: Path) -> Features | None:
        """The network that timm makes of the file."""
        settings = read_settings(folder)
        network: Features
        try:
            network = timm.create_model(
                settings["architecture"],
                checkpoint_path=str(folder / WEIGHTS),
                num_classes=0,
                **settings["model_args"],
            ).eval()
        except RuntimeError as error:  # names every tensor that is missing or left over
            raise not_taken(self.name, error) from None
        return network


def model_arguments(shape: Shape) -> dict[str, Any]:
    """What ``timm.create_model`` is told beside the name."""
    return {
        "img_size": shape.size,
        "patch_size": shape.patch,
        "in_chans": shape.channels,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "class_token": shape.class_token,
        "reg_tokens": shape.registers,
        "no_embed_class": not shape.class_position,
        "init_values": ANY_SCALE if shape.layer_scale else None,
        "global_pool": shape.pool,
        "fc_norm": False,
        "dynamic_img_size": True,
    }


def pretrained_settings(fed: NetworkInput) -> dict[str, Any]:
    """How images are prepared, as timm's transforms read it."""
    return {
        "input_size": [fed.channels, fed.size, fed.size],
        "mean": list(fed.mean),
        "std": list(fed.deviation),
        "interpolation": "bicubic",
        "crop_pct": CROPPED,
        "crop_mode": "center",
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
