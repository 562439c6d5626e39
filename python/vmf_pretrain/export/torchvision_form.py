"""torchvision: the state dict of its ``VisionTransformer`` without heads."""

from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models import VisionTransformer

from vmf_pretrain.export.form import WEIGHTS, Exportable, Features, Loading, not_taken, read_settings, write_settings
from vmf_pretrain.export.names import scales_multiplied, translated, with_class_position, without_mask_token
from vmf_pretrain.export.transformer import Shape, plain_shape, require_fitting
from vmf_pretrain.storage.tensor_file import read_tensors, write_tensors

CHANNELS = 3  # the only number that torchvision's network takes
EPSILON = 1e-6  # of its layer normalisation, unless a class of one's own is given
LAYER = r"encoder.layers.encoder_layer_\1."
RULES = (
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    (r"patch_embed\.proj\.(weight|bias)", r"conv_proj.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(weight|bias)", LAYER + r"ln_\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", LAYER + r"self_attention.in_proj_\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", LAYER + r"self_attention.out_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)", LAYER + r"mlp.0.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)", LAYER + r"mlp.3.\2"),
    (r"norm\.(weight|bias)", r"encoder.ln.\1"),
)


class TorchvisionForm:
    """A class token, three channels, no registers; layer scales are multiplied into the weights."""

    name = "torchvision"
    needs: tuple[str, ...] = ()

    def write(self, exported: Exportable, folder: Path) -> Loading:
        """``model.safetensors``, and ``config.json`` with the arguments of the class."""
        shape = plain_shape(exported.network, self.name)
        self._require_fitting(shape)
        tensors = scales_multiplied(without_mask_token(exported.network.state_dict()))
        if not shape.class_position:
            tensors = with_class_position(tensors)
        write_tensors(folder / WEIGHTS, translated(tensors, RULES, self.name), {"format": "pt"})
        settings = class_arguments(shape)
        write_settings(folder, settings)
        given = ",\n    ".join(f"{name}={value!r}" for name, value in settings.items())
        code = (
            "from safetensors.torch import load_file\nfrom torch import nn\n"
            "from torchvision.models import VisionTransformer\n\n"
            f"model = VisionTransformer(\n    {given},\n)\nmodel.heads = nn.Identity()\n"
            f'model.load_state_dict(load_file("FOLDER/{WEIGHTS}"), strict=True)\nmodel.eval()\n\nfeatures = model(inputs)'
        )
        scaled = "The scales of the blocks' branches are multiplied into the weights, as torchvision has none."
        return Loading("torchvision", code, (scaled,) if shape.layer_scale else ())

    def read(self, exported: Exportable, folder: Path) -> Features | None:
        """torchvision's network with the file's tensors."""
        settings = read_settings(folder)
        network: Any = VisionTransformer(**settings)
        network.heads = nn.Identity()
        tensors, _ = read_tensors(folder / WEIGHTS)
        try:
            network.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise not_taken(self.name, error) from None
        features: Features = network.eval()
        return features

    def _require_fitting(self, shape: Shape) -> None:
        require_fitting(shape.class_token, self.name, "it has no class token, which torchvision's has")
        require_fitting(shape.pool == "token", self.name, "its feature is the mean of the patches, not the class token")
        require_fitting(shape.registers == 0, self.name, f"it has {shape.registers} registers, and torchvision's none")
        require_fitting(
            shape.channels == CHANNELS,
            self.name,
            f"its input has {shape.channels} channel(s), not {CHANNELS}",
        )
        require_fitting(
            shape.qkv_bias, self.name, "its queries, keys and values have no biases, which torchvision's have"
        )
        require_fitting(
            shape.epsilon == EPSILON, self.name, f"its layer normalisation adds {shape.epsilon}, not {EPSILON}"
        )


def class_arguments(shape: Shape) -> dict[str, int]:
    """Those of torchvision's ``VisionTransformer``."""
    return {
        "image_size": shape.size,
        "patch_size": shape.patch,
        "num_layers": shape.depth,
        "num_heads": shape.heads,
        "hidden_dim": shape.width,
        "mlp_dim": shape.hidden,
    }
