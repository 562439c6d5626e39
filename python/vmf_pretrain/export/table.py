"""The forms by name."""

from vmf_pretrain.export.form import Form
from vmf_pretrain.export.onnx_form import OnnxForm
from vmf_pretrain.export.safetensors_form import SafetensorsForm
from vmf_pretrain.export.timm_form import TimmForm
from vmf_pretrain.export.torchvision_form import TorchvisionForm
from vmf_pretrain.export.transformers_form import TransformersForm

FORMS: dict[str, Form] = {
    form.name: form for form in (TimmForm(), TorchvisionForm(), TransformersForm(), SafetensorsForm(), OnnxForm())
}
