"""safetensors: the backbone's tensors by their own names, with the network's input in the header; any network has this form."""

import copy
import json
from pathlib import Path

from vmf_pretrain.export.form import WEIGHTS, Exportable, Features, Loading
from vmf_pretrain.storage.tensor_file import read_tensors, write_tensors
from vmf_pretrain.storage.weights import FACTS


class SafetensorsForm:
    """One file; which network reads it is for the reader to build."""

    name = "safetensors"
    needs: tuple[str, ...] = ()

    def write(self, exported: Exportable, folder: Path) -> Loading:
        """``model.safetensors``."""
        facts = json.dumps({**exported.facts, "input": exported.fed.facts()}, indent=2)
        write_tensors(folder / WEIGHTS, exported.network.state_dict(), {"format": "pt", FACTS: facts})
        code = (
            f'from safetensors.torch import load_file\n\ntensors = load_file("FOLDER/{WEIGHTS}")\n'
            "model.load_state_dict(tensors, strict=True)  # of the network that the settings below describe"
        )
        return Loading("safetensors", code)

    def read(self, exported: Exportable, folder: Path) -> Features | None:
        """The network itself, with the tensors of the file."""
        network, (tensors, _) = copy.deepcopy(exported.network), read_tensors(folder / WEIGHTS)
        network.load_state_dict(tensors, strict=True)
        return network
