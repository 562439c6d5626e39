"""Settings of the command: any field is an option, a mistake is answered at once and in one sentence, and no run is harmed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pretrain.test_cli import refused
from tests.pretrain.tiny import changed, digits_config, photos_config, save_photos, yaml_of
from vmf_pretrain import launch
from vmf_pretrain.cli import main
from vmf_pretrain.config.file import read_config
from vmf_pretrain.crash import explained
from vmf_pretrain.recipes.table import recipe_names, recipe_of, recipe_text

pytestmark = pytest.mark.quick

MISTAKES: list[tuple[str, list[str], str]] = [
    ("no command", [], "arguments are required: command"),
    ("unknown command", ["train"], "invalid choice: 'train'"),
    ("unknown method", ["demo", "--method", "simclr"], "method is simclr but must be one of dino-vmf, dino"),
    ("seed of letters", ["demo", "--seed", "x"], '--seed is "x"; expected a whole number'),
    ("wrong type", ["fit", "--optim.learning_rate", "abc"], '--optim.learning_rate is "abc"; expected a finite number'),
    ("wrong type, =", ["fit", "--optim.learning_rate=abc"], "expected a finite number"),
    ("misspelt field", ["fit", "--optim.learnin_rate=1"], "did you mean optim.learning_rate?"),
    ("field without section", ["fit", "--learning_rate", "1"], "did you mean --optim.learning_rate?"),
    ("unknown option", ["fit", "--zebra", "1"], "unrecognized arguments: --zebra 1; see vmf-pretrain --help"),
    ("field without value", ["fit", "--optim.clip"], "--optim.clip got no value"),
    ("field before an option", ["fit", "--optim.clip", "--resume"], "--optim.clip got no value"),
    ("out of range", ["fit", "--data", "/", "--optim.learning_rate", "-1"], "optim.learning_rate is -1.0"),
    ("two sources", ["fit", "--recipe", "digits", "--config", "x"], "--recipe and --config are both given"),
    ("unknown recipe", ["fit", "--recipe", "dino_vits61"], "dino_vits61 is no recipe; did you mean dino_vits16"),
    ("file as recipe", ["fit", "--recipe", "mine.yaml"], "a file is given with --config"),
    (
        "recipe without images",
        ["fit", "--recipe", "dino_vits16"],
        "data.folder is missing; expected the path of a folder",
    ),
    ("images for digits", ["fit", "--recipe", "digits", "--data", "/"], 'data.kind "digits" reads none'),
    ("no field", ["fit", "--section", "1"], "unrecognized arguments: --section 1; see vmf-pretrain --help."),
    ("unknown bundled images", ["demo", "--data", "plants"], "invalid choice: 'plants'"),
    ("field twice", ["fit", "--data", "a", "--data.folder", "b"], "data.folder is given twice"),
    ("no folder", ["fit", "--data", "/nowhere/photos"], "data.folder /nowhere/photos is not a folder"),
    ("code", ["fit", "--recipe", "digits", "--method", "own.module:Own"], "add --allow-code if you trust it"),
    ("code, images alone", ["fit", "--data", "/", "--method", "own.module:Own"], "add --allow-code if you trust it"),
    ("unknown method, images alone", ["fit", "--data", "/", "--method", "DINO"], "method is DINO but must be one of"),
    ("seed, images alone", ["fit", "--data", "/", "--seed", "-1"], "seed is -1 but must lie between"),
    ("resume without run", ["fit", "--resume"], "--resume got no run"),
    ("unknown kind of change", ["fit", "--resume", "--allow-changed", "data,lr"], '--allow-changed "lr" is not known'),
    ("doctor of no folder", ["doctor", "--data", "/nowhere/photos"], "data.folder /nowhere/photos is not a folder"),
    ("doctor of no recipe", ["doctor", "--recipe", "dino_vits61"], "did you mean dino_vits16"),
    ("doctor without images", ["doctor", "--recipe", "dino_vits16"], "data.folder is missing"),
    ("doctor's field", ["doctor", "--optim.clip", "x"], "optim.clip"),
    ("doctor's report", ["doctor", "--json", "/nowhere/found.json"], "there is no folder /nowhere"),
    ("field of recipes", ["recipes", "--optim.clip", "1"], "--optim.clip does not go with recipes"),
    ("unknown recipe to print", ["recipes", "digit"], "did you mean digits?"),
]
DEMOS = {"no option": [], "digits": ["--data", "digits"], "animals": ["--data=animals"]}


@pytest.mark.parametrize(("arguments", "message"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_mistake_is_answered_in_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(arguments, capsys)


def test_mistake_is_answered_before_torch_is_imported() -> None:
    """In a process of its own; every mistake of the table, one after the other."""
    program = (
        "import sys\nfrom vmf_pretrain.cli import main\nimport vmf_pretrain\n"
        f"for arguments in {[row[1] for row in MISTAKES]!r}:\n"
        "    assert main(arguments) == 2, arguments\n"
        "    heavy = {'torch', 'torchvision', 'timm', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "    assert not heavy, (arguments, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]


def printed_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*arguments, "--print-config"]) == 0
    values: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return values


def test_fields_win_over_a_file_and_all_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = yaml_of(photos_config(tmp_path), tmp_path / "config.yaml")
    fields = [
        "--views.photos.blur",
        "[1, 0.5, 0]",
        "--optim.learning_rate=1e-3",
        "--backbone.width",
        "null",
        "--seed",
        "4",
    ]
    values = printed_config(["fit", "--config", str(path), *fields], capsys)
    assert values["views"]["photos"]["blur"] == [1.0, 0.5, 0.0]
    assert values["optim"]["learning_rate"] == 0.001
    assert values["backbone"]["width"] is None
    assert (values["seed"], values["backbone"]["depth"]) == (4, read_config(path).backbone.depth)


def test_last_of_two_values_of_a_field_counts(capsys: pytest.CaptureFixture[str]) -> None:
    values = printed_config(["demo", "--train.epochs", "30", "--train.epochs", "40"], capsys)
    assert values["train"]["epochs"] == 40


def test_printed_settings_are_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--recipe", "dino_vits16", "--data", "~/photos", "--print-config"]) == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    config = read_config(tmp_path / "config.yaml")
    assert config.data.folder == str(Path("~/photos").expanduser())
    assert config == changed(recipe_of("dino_vits16").config, data={"folder": config.data.folder})


def test_folder_alone_chooses_a_recipe_and_says_which_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_photos(tmp_path / "photos", 20, side=64)
    assert main(["fit", "--data", str(tmp_path / "photos"), "--train.device", "cpu", "--print-config"]) == 0
    out, said = capsys.readouterr()
    first, second = said.splitlines()
    assert first == "Recipe small_photos: no GPU here, and 20 images of 64 pixels (median shorter side)."
    assert "200 epochs (about" in second
    values = yaml.safe_load(out)
    assert (values["data"]["batch_size"], values["train"]["epochs"], values["train"]["device"]) == (16, 200, "cpu")
    assert values["data"]["folder"] == str(tmp_path / "photos")


def test_settings_are_printed_whatever_the_terminal_can_show(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "vmf_pretrain",
        "fit",
        "--recipe",
        "small_photos",
        "--data",
        "/é",
        "--print-config",
    ]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "config.yaml").write_bytes(done.stdout)
    assert read_config(tmp_path / "config.yaml").data.folder == "/é"


def test_recipes_are_listed_with_what_they_stand_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    table = capsys.readouterr().out
    for name in recipe_names():
        found = recipe_of(name)
        row = next(line for line in table.splitlines() if line.startswith(f"{name} "))
        assert row.split()[1] == found.config.method
        assert row.split()[-1] == str(found.config.data.batch_size)
        for part in ("title", "stands_for", "memory", "time"):
            assert getattr(found.about, part) in table, f"the table lacks {part} of {name}"


def test_recipe_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "digits"]) == 0
    assert capsys.readouterr().out == recipe_text("digits")


def taken(tmp_path: Path, kind: str) -> Path:
    """A run folder that cannot be one."""
    if kind == "file":
        (tmp_path / "run").write_text("a thesis")
    elif kind == "full":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.txt").write_text("precious")
    elif kind == "below a file":
        (tmp_path / "notes").write_text("a thesis")
        return tmp_path / "notes" / "run"
    elif kind == "name too long":
        return tmp_path / ("x" * 300)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "is a file; expected a new folder"),
        ("full", "already exists and holds other files; choose another with --out."),
        ("below a file", "cannot be made"),
        ("name too long", "cannot be made: File name too long"),
        ("locked", "may not be written to"),
        ("disk full", "is on a disk with 3 MiB left; a run needs at least 64"),
    ],
)
def test_run_folder_is_checked_before_anything_slow(
    kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = taken(tmp_path, kind)
    if kind == "disk full":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3 << 20}))
    if kind == "locked":  # root may write anywhere, so the question is answered for it
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("vmf_pretrain.cli.settings", lambda *arguments: pytest.fail("the folder was checked too late"))
    assert message in refused(["demo", "--out", str(out)], capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_home_folder_is_filled_in_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").write_text("")
    assert f"--out {tmp_path / 'run'} is a file" in refused(["demo", "--out", "~/run"], capsys)
    assert f"config {tmp_path / 'absent'} cannot be read" in refused(["fit", "--config", "~/absent"], capsys)


def begun(folder: Path) -> Path:
    """The folder of a run, as far as its settings go."""
    folder.mkdir()
    yaml_of(digits_config(), folder / "config.yaml")
    return folder


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--optim.learning_rate", "1"], "optim.learning_rate is 0.003 in this run but 1.0 is given"),
        (["--train.epochs", "30"], "start a new run for another"),
        (["--data.batch_size", "32"], "or add --allow-changed batch"),
        (["--views.digits.noise", "0", "--allow-changed", "batch"], "or add --allow-changed views"),
        (["--seed", "3"], "seed is 0 in this run but 3 is given, which would change what it computes; start a new run"),
        (["--recipe", "digits"], "--recipe does not go with --resume"),
        (["--data.workers", "-1"], "data.workers is -1"),
    ],
)
def test_resumed_run_keeps_what_it_computes(
    extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = begun(tmp_path / "run")
    assert message in refused(["fit", "--resume", "--out", str(out), *extra], capsys)


def test_resumed_run_may_be_computed_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = begun(tmp_path / "run")
    fields = [
        "--data.workers",
        "3",
        "--train.accumulate",
        "2",
        "--data.batch_size",
        "64",
        "--allow-changed",
        "batch,seed",
        "--seed",
        "3",
    ]
    values = printed_config(["fit", "--resume", "--out", str(out), *fields], capsys)
    assert (values["data"]["workers"], values["train"]["accumulate"], values["data"]["batch_size"]) == (3, 2, 64)
    assert values["seed"] == 3


def test_restart_by_torchrun_goes_on_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    arguments = ["fit", "--recipe", "digits", "--seed", "9", "--optim.clip", "1", "--data.workers", "3"]
    assert "give one" in refused(arguments, capsys)
    values = printed_config([*arguments, "--out", str(begun(tmp_path / "run"))], capsys)
    kept = read_config(tmp_path / "run" / "config.yaml")
    assert (values["seed"], values["optim"]["clip"], values["data"]["workers"]) == (kept.seed, kept.optim.clip, 3)
    assert printed_config([*arguments, "--out", str(tmp_path / "other")], capsys)["seed"] == 9


def test_unexpected_error_is_a_sentence_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = begun(tmp_path / "run")
    for error, message in [
        (KeyError("weight"), "an unexpected error ended the run (KeyError: 'weight'); the run goes on from its last"),
        (MemoryError("2 GiB"), f"go on with: vmf-pretrain fit --resume --out {out} --train.accumulate 2"),
    ]:

        def fail(*arguments: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr("vmf_pretrain.cli.start", fail)
        assert main(["fit", "--resume", "--out", str(out)]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1, said
        assert str(out / "crash.txt") in said
        assert "Traceback" in (out / "crash.txt").read_text()


def test_memory_that_runs_out_before_a_run_has_begun_may_be_the_networks_own() -> None:
    assert "add one of them, or take a smaller head and backbone" in explained(MemoryError("2 GiB"), None)


def test_lost_rank_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:62110.")
    assert "an unexpected error" in explained(error, begun(tmp_path / "alone"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert explained(error, tmp_path / "alone").startswith("another rank has ended or cannot be reached")
    assert "an unexpected error" in explained(RuntimeError("sizes do not match"), tmp_path / "alone")


def test_ctrl_c_before_training_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vmf_pretrain.cli.settings", interrupt)
    assert main(["demo"]) == 130
    assert "goes on with --resume" in capsys.readouterr().err


def test_one_rank_speaks_for_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    said = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["fit", "--optim.clip", "x"]) == 2
        said.append(capsys.readouterr().err)
    assert [text.count("\n") for text in said] == [1, 0, 0], said
    assert main(["fit", "--optim.clip", "y"]) == 2
    assert "y" in capsys.readouterr().err, "another error was swallowed"
    monkeypatch.setenv("MASTER_PORT", "x")
    assert launch.first_to_say("nobody to ask"), "an error was lost"


def test_srun_s_ranks_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (launch.many_ranks(), launch.rank(), launch.restarted()) == (False, 0, False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert (launch.many_ranks(), launch.rank()) == (True, 2)
    monkeypatch.setenv("RANK", "1")
    assert launch.rank() == 1


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmf_pretrain", "fit", "--help"], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("usage: vmf-pretrain fit "), done.stdout + done.stderr


def test_demo_takes_the_bundled_images_that_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {name: printed_config(["demo", *options], capsys) for name, options in DEMOS.items()}
    found = {name: (values["data"]["kind"], values["views"]["global_size"]) for name, values in kinds.items()}
    assert found == {"no option": ("digits", 16), "digits": ("digits", 16), "animals": ("animals", 40)}
    out = str(begun(tmp_path / "run"))
    assert "--data does not go with --resume" in refused(
        ["demo", "--data", "animals", "--resume", "--out", out], capsys
    )
