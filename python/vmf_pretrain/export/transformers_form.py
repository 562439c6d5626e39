"""transformers: a folder that ``from_pretrained`` takes, with the names that checkpoints of its releases 4 and 5 have."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.export.form import (
    CROPPED,
    WEIGHTS,
    Exportable,
    Features,
    Loading,
    installed,
    not_taken,
    read_settings,
    write_settings,
)
from vmf_pretrain.export.names import MASK_TOKEN, split_attention, translated, with_class_position, without_mask_token
from vmf_pretrain.export.transformer import Shape, plain_shape, require_fitting
from vmf_pretrain.storage.tensor_file import write_tensors

BICUBIC = 3  # Pillow's number
QKV = {"q": "query", "k": "key", "v": "value"}
LAYER = r"encoder.layer.\1."
SHARED = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
    *(
        (rf"blocks\.(\d+)\.attn\.{one}\.(weight|bias)", LAYER + rf"attention.attention.{name}.\2")
        for one, name in QKV.items()
    ),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", LAYER + r"attention.output.dense.\2"),
    (r"norm\.(weight|bias)", r"layernorm.\1"),
)
VIT = (
    *SHARED,
    (r"blocks\.(\d+)\.norm1\.(weight|bias)", LAYER + r"layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(weight|bias)", LAYER + r"layernorm_after.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)", LAYER + r"intermediate.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)", LAYER + r"output.dense.\2"),
)
DINOV2 = (
    *SHARED,
    ("reg_token", "embeddings.register_tokens"),
    (MASK_TOKEN, "embeddings.mask_token"),
    (r"blocks\.(\d+)\.(norm[12]|mlp\.fc[12])\.(weight|bias)", LAYER + r"\2.\3"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", LAYER + r"layer_scale\2.lambda1"),
)


class TransformersForm:
    """``ViTModel``; ``IJepaModel`` without a class token; ``Dinov2Model`` with layer scale, its kin with registers."""

    name = "transformers"
    needs: tuple[str, ...] = ()

    def write(self, exported: Exportable, folder: Path) -> Loading:
        """``model.safetensors``, ``config.json``, and for images of three channels ``preprocessor_config.json``."""
        shape = plain_shape(exported.network, self.name)
        kind = _class_of(shape)
        tensors = _tensors(exported.network.state_dict(), shape, self.name)
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        settings = {"architectures": [kind], "torch_dtype": "float32", **_settings(shape)}
        write_settings(folder, settings)
        if shape.channels == 3:
            prepared = json.dumps(_preparation(exported.fed), indent=2) + "\n"
            (folder / "preprocessor_config.json").write_text(prepared, encoding="utf-8")
        option = ", add_pooling_layer=False" if kind in ("ViTModel", "IJepaModel") else ""
        chosen = "[:, 0]" if shape.pool == "token" else f"[:, {shape.prefix}:].mean(dim=1)"
        code = (
            f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("FOLDER"{option}).eval()\n'
            f"features = model(inputs).last_hidden_state{chosen}"
        )
        scaled = "Its blocks have no layer scale; the scales of the file are 1."
        return Loading("transformers", code, (scaled,) if shape.registers and not shape.layer_scale else ())

    def read(self, exported: Exportable, folder: Path) -> Features | None:
        """The network that transformers makes of the folder."""
        if not installed("transformers"):
            return None
        settings = read_settings(folder)
        (kind,) = settings["architectures"]
        library: Any = importlib.import_module("transformers")
        option = {"add_pooling_layer": False} if kind in ("ViTModel", "IJepaModel") else {}
        network, told = getattr(library, kind).from_pretrained(folder, output_loading_info=True, **option)
        wrong = {what: sorted(map(str, names)) for what, names in told.items() if names}
        if wrong:
            raise not_taken(self.name, f"{wrong}.")
        network.eval()
        pool, prefix = settings["vmf_pretrain_pool"], settings["vmf_pretrain_prefix"]

        def features(inputs: Tensor) -> Tensor:
            tokens: Tensor = network(inputs).last_hidden_state
            return tokens[:, 0] if pool == "token" else tokens[:, prefix:].mean(dim=1)

        return features


def _class_of(shape: Shape) -> str:
    form = TransformersForm.name
    require_fitting(
        not (shape.registers and shape.class_position),
        form,
        "its registers have positions, which those of transformers have not",
    )
    if shape.class_token:
        if shape.registers:
            return "Dinov2WithRegistersModel"
        return "Dinov2Model" if shape.layer_scale else "ViTModel"
    require_fitting(
        not shape.registers and not shape.layer_scale, form, "it has no class token, but registers or layer scale"
    )
    return "IJepaModel"


def _tensors(tensors: dict[str, Tensor], shape: Shape, form: str) -> dict[str, Tensor]:
    found = split_attention(without_mask_token(tensors))
    if shape.class_token and not shape.class_position:
        found = with_class_position(found)
    if shape.registers:
        found[MASK_TOKEN] = torch.zeros(1, shape.width)  # every file of this class has one
        if not shape.layer_scale:
            found |= {
                f"blocks.{place}.ls{branch}.gamma": torch.ones(shape.width)
                for place in range(shape.depth)
                for branch in (1, 2)
            }
    return translated(found, VIT if _class_of(shape) in ("ViTModel", "IJepaModel") else DINOV2, form)


def _settings(shape: Shape) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "hidden_act": "gelu",
        "layer_norm_eps": shape.epsilon,
        "image_size": shape.size,
        "patch_size": shape.patch,
        "num_channels": shape.channels,
        "qkv_bias": shape.qkv_bias,
        "vmf_pretrain_pool": shape.pool,
        "vmf_pretrain_prefix": shape.prefix,
    }
    kind = _class_of(shape)
    if kind in ("ViTModel", "IJepaModel"):
        return {"model_type": "vit" if kind == "ViTModel" else "ijepa", "intermediate_size": shape.hidden, **settings}
    whole = shape.hidden % shape.width == 0
    require_fitting(whole, TransformersForm.name, f"its hidden layer of {shape.hidden} is no multiple of {shape.width}")
    registers = {"num_register_tokens": shape.registers} if shape.registers else {"use_mask_token": False}
    model = "dinov2_with_registers" if shape.registers else "dinov2"
    return {
        "model_type": model,
        "mlp_ratio": shape.hidden // shape.width,
        "use_swiglu_ffn": False,
        **registers,
        **settings,
    }


def _preparation(fed: NetworkInput) -> dict[str, Any]:
    """How photographs are prepared: resized by the shorter side, and the central square cut out."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(fed.size / CROPPED)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": fed.size, "width": fed.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(fed.mean),
        "image_std": list(fed.deviation),
    }
