"""The command ``vmf-pretrain``: a demo on bundled digits, or a run on a folder of images."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from rich.console import Console

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import read_config
from vmf_pretrain.config.run import Config

BAD_INPUT = 2  # exit code
INTERRUPTED = 130  # exit code, as shells report a SIGINT
METHODS = ("dino-vmf", "dino")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0 done, 2 bad input, 130 or 143 stopped by a signal after a checkpoint."""
    chosen = _parser().parse_args(arguments)
    try:
        return _run(chosen)
    except PretrainError as error:
        print(f"vmf-pretrain: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:  # only before or after the training; during it, a signal first writes a checkpoint
        print("vmf-pretrain: stopped; a run that has begun goes on with --resume.", file=sys.stderr)
        return INTERRUPTED


def _run(chosen: argparse.Namespace) -> int:
    from vmf_pretrain.engine.run import Run

    if chosen.out is None:
        if chosen.resume:
            raise PretrainError("--resume got no run; expected --out with its folder.")
        chosen.out = _new_folder(Path("runs"), chosen.command)
    config = _config(chosen)
    run = Run(config, chosen.out, resume=chosen.resume, console=Console())
    return run.train()


def _config(chosen: argparse.Namespace) -> Config:
    if chosen.resume:
        ignored = [name for name in ("config", "seed", "method") if getattr(chosen, name, None) is not None]
        if ignored:
            raise PretrainError(
                f"--{ignored[0]} does not go with --resume: a run keeps its configuration, {chosen.out / 'config.yaml'}."
            )
        return read_config(chosen.out / "config.yaml")
    overrides = {"seed": chosen.seed, "method": chosen.method}
    if chosen.command == "demo":
        with resources.as_file(resources.files("vmf_pretrain") / "recipes" / "digits.yaml") as recipe:
            return read_config(recipe, **overrides)
    if chosen.config is None:
        raise PretrainError("fit got no configuration; expected --config FILE, or --resume with the --out of a run.")
    return read_config(chosen.config, **overrides)


def _new_folder(parent: Path, name: str) -> Path:
    """``parent/name``, or the first of ``parent/name-2``, ``-3``, ... that does not exist."""
    candidates = itertools.chain([parent / name], (parent / f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in candidates if not path.exists())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vmf-pretrain", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="pretrain a small ViT on bundled digits: a few minutes on a CPU")
    fit = commands.add_parser("fit", help="pretrain with a configuration file")
    fit.add_argument("--config", type=Path, metavar="FILE", help="YAML file; vmf_pretrain/recipes has examples")
    for command in (demo, fit):
        command.add_argument("--out", type=Path, help="new run folder (default: the next free runs/demo or runs/fit)")
        command.add_argument("--seed", type=int, help="seed of initialisation, data order and augmentation")
        command.add_argument("--method", choices=METHODS, help="the method (default: that of the configuration)")
        command.add_argument("--resume", action="store_true", help="continue the run in --out exactly where it stopped")
    return parser


if __name__ == "__main__":
    sys.exit(main())
