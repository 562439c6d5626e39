"""Nothing is unpickled from training to export, in no process of it; what would be is noticed."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.pretrain.tiny import two_classes, yaml_of
from tests.reliability.guarded import POISON, run_guarded
from tests.reliability.runs import small_photos

WHOLE_WAY = """
    import os, signal, sys
    from pathlib import Path
    from vmf_pretrain.cli import main
    from vmf_pretrain.data.batches import ViewBatches
    import vmf_pretrain.engine.run
    vmf_pretrain.engine.run.draw_plots = lambda *arguments: None

    data, folder, batches = {data!r}, Path({folder!r}), ViewBatches.batch

    def in_worker(self, step):
        (folder / f"batch_{{os.getpid()}}").touch()
        return batches(self, step)

    ViewBatches.batch = in_worker  # here, for a worker imports the program under another name

    if __name__ == "__main__":
        run = str(folder / "run")
        advance = vmf_pretrain.engine.run.Run._advance

        def stopping(self, *arguments):
            if self.step == 1:
                signal.raise_signal(signal.SIGTERM)
            return advance(self, *arguments)

        vmf_pretrain.engine.run.Run._advance = stopping
        codes = [main(["fit", "--config", str(folder / "run.yaml"), "--out", run])]
        vmf_pretrain.engine.run.Run._advance = advance
        codes.append(main(["fit", "--resume", "--out", run]))
        codes.append(main(["eval", run, "--task", "knn", "--data", data, "--out", str(folder / "found")]))
        codes.append(main(["embed", run, "--data", data, "--out", str(folder / "features.npz")]))
        codes += [main(["export", run, "--to", form]) for form in ("timm", "safetensors")]
        print("codes", codes)
"""
CONTROLS = {
    "pickle": "import pickle, fractions; pickle.loads(b'cfractions\\nFraction\\n.')",
    "C's": "import _pickle, fractions; _pickle.loads(b'cfractions\\nFraction\\n.')",
    "numpy": "import io, numpy as np; f = io.BytesIO(); np.save(f, np.array([None])); f.seek(0); np.load(f, allow_pickle=True)",
}


def test_a_run_from_training_to_export_unpickles_nothing_in_any_process(tmp_path: Path) -> None:
    data = two_classes(tmp_path / "data", 12)
    yaml_of(
        small_photos(data, data={"workers": 1, "start_method": "forkserver"}, train={"epochs": 2}),
        tmp_path / "run.yaml",
    )
    program = textwrap.dedent(WHOLE_WAY).format(data=str(data), folder=str(tmp_path))
    code, said, unpickled = run_guarded(tmp_path, POISON + program)
    assert not unpickled, unpickled
    assert code == 0, said[-3000:]
    assert "codes [143, 0, 0, 0, 0, 0]" in said, said[-3000:]
    assert len(list(tmp_path.glob("batch_*"))) == 2, "the batches were not made in a worker of each part of the run"


@pytest.mark.parametrize("way", CONTROLS)
def test_what_is_unpickled_is_noticed(way: str, tmp_path: Path) -> None:
    code, said, unpickled = run_guarded(tmp_path, CONTROLS[way])
    assert code == 1, said
    assert len(unpickled) == 1, unpickled
    assert "unpickled" in said
