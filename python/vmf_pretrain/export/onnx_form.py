"""ONNX: the network as a graph, for inputs of its own size and any number of images.

Legend: B images.
"""

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmf_pretrain.export.form import Exportable, Features, Loading

GRAPH = "model.onnx"
LARGEST = 2**30  # bytes of weights in the graph's own file, which can hold 2 GiB in all; more lie beside it
EXAMPLES = 2  # images of the example input: of one image, B would be taken for a constant


class OnnxForm:
    """Written by torch; ``onnx``'s reference evaluator checks it, so that no runtime is needed."""

    name = "onnx"
    needs: tuple[str, ...] = ("onnx", "onnxscript")

    def write(self, exported: Exportable, folder: Path) -> Loading:
        """``model.onnx``: ``inputs`` [B, ...] to ``features`` [B, F], float32."""
        example = torch.zeros(EXAMPLES, *exported.input_shape)
        size = sum(tensor.numel() * tensor.element_size() for tensor in exported.network.state_dict().values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch about torch
            program: Any = torch.onnx.export(
                exported.network,
                (example,),
                None,
                dynamo=True,
                verbose=False,
                input_names=["inputs"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("images")},),
            )
        facts = {**exported.facts, "input": exported.fed.facts()}
        program.model.metadata_props["vmf_pretrain"] = json.dumps(facts)
        program.save(folder / GRAPH, external_data=size > LARGEST)
        code = (
            "import onnxruntime\n\n"
            f'model = onnxruntime.InferenceSession("FOLDER/{GRAPH}")\n'
            '(features,) = model.run(None, {"inputs": inputs})  # float32 NumPy arrays'
        )
        return Loading("onnx", code)

    def read(self, exported: Exportable, folder: Path) -> Features | None:
        """What the reference evaluator computes."""
        reference: Any = importlib.import_module("onnx.reference")
        graph = reference.ReferenceEvaluator(str(folder / GRAPH))

        def features(inputs: Tensor) -> Tensor:
            (found,) = graph.run(None, {"inputs": inputs.numpy()})
            return torch.from_numpy(found)

        return features
