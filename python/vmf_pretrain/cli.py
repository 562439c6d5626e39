"""The command ``vmf-pretrain``: a demo, a run on images of yours, evaluations, reports, recipes, and a look before a run."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vmf_pretrain.config.data import BUNDLED
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import config_text, options_layer
from vmf_pretrain.config.method import METHODS
from vmf_pretrain.config.paths import expanded
from vmf_pretrain.config.resume import KINDS, MAY_CHANGE, flat, kinds_of
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.typed import merged, names_of
from vmf_pretrain.doctor_command import NAME as DOCTOR
from vmf_pretrain.doctor_command import add_doctor, run_doctor, visit_of
from vmf_pretrain.embed_command import NAME as EMBED
from vmf_pretrain.embed_command import add_embed, run_embed, wish_of
from vmf_pretrain.evaluation_command import NAME as EVALUATION
from vmf_pretrain.evaluation_command import add_evaluation, question_of, run_evaluation
from vmf_pretrain.export_command import NAME as EXPORT
from vmf_pretrain.export_command import add_export, order_of, run_export
from vmf_pretrain.launch import first_to_say, many_ranks, rank, restarted
from vmf_pretrain.report_command import NAME as REPORT
from vmf_pretrain.report_command import add_report, ask_of, run_report
from vmf_pretrain.start import Wish, require_free, settings, settings_to_go_on, start
from vmf_pretrain.watch_command import NAME as WATCH
from vmf_pretrain.watch_command import add_watch, run_watch

DONE = 0  # exit code
CRASHED = 1  # exit code
BLOCKED = 1  # exit code of the doctor: a run would fail
BAD_INPUT = 2  # exit code
INTERRUPTED = 130  # exit code, as shells report a SIGINT
Command = Callable[[argparse.Namespace, list[Path]], int]  # of the options, and where to put the folder; an exit code
FIELD = re.compile(r"--([a-z]\w*(?:\.\w+)+)(?:=(.*))?", re.DOTALL)  # --section.field VALUE, or --section.field=VALUE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those of the command line; None takes the process's own.

    Returns:
        The exit code: 0 done, 1 crashed, or the doctor found that a run would fail, 2 bad input, 130 or 143 stopped by a
        signal after a checkpoint.
    """
    folder: list[Path] = []  # of the run, once it is known
    try:
        chosen = _parsed(sys.argv[1:] if arguments is None else arguments)
        return COMMANDS[chosen.command](chosen, folder)
    except PretrainError as error:
        _complain(str(error))
        return BAD_INPUT
    except KeyboardInterrupt:  # only before or after the training; during it, a signal first writes a checkpoint
        _complain("stopped; a run that has begun goes on with --resume.")
        return INTERRUPTED
    except BrokenPipeError:  # ``vmf-pretrain recipes | head``: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CRASHED
    except Exception as error:  # whatever it is, a person gets a sentence, and the traceback as a file to send
        from vmf_pretrain.crash import explained

        _complain(explained(error, folder[0] if folder else None))
        return CRASHED


def _train(chosen: argparse.Namespace, folder: list[Path]) -> int:
    """Both commands that train; the run's folder is put into ``folder`` as soon as it is known."""
    fields = _fields(chosen)
    allowed = kinds_of(kind for text in chosen.allow_changed for kind in text.split(","))
    out = None if chosen.out is None else expanded(chosen.out, "--out")
    if out is not None:
        folder.append(out)
    goes_on = chosen.resume or _restarted_in(out)
    if chosen.resume:
        _refuse_beside_resume(chosen)
    if goes_on:
        if out is None:
            raise PretrainError("--resume got no run; expected --out with its folder.")
        kept = fields if chosen.resume else _changeable(fields)
        config = settings_to_go_on(out, kept, allow_changed=allowed, allow_code=chosen.allow_code)
    else:
        if out is not None and not chosen.print_config and rank() == 0:
            require_free(out)
        from vmf_pretrain.recipes.table import bundled_recipe

        demo = chosen.command == "demo"
        recipe = bundled_recipe(chosen.bundled or BUNDLED[0], chosen.method) if demo else chosen.recipe
        config = settings(Wish(recipe, chosen.config, fields, chosen.allow_code), _say)
    if chosen.print_config:
        print(config_text(config, sys.stdout.encoding or "ascii"), end="")
        return DONE
    from vmf_pretrain.report.console import run_console

    console = run_console()
    found = start(
        config,
        out,
        name=chosen.command,
        resume=goes_on,
        console=console,
        allow_code=chosen.allow_code,
        allow_changed=allowed,
        began=folder.append,
    )
    return found.code


def _restarted_in(out: Path | None) -> bool:
    """Whether torchrun starts this again after a rank was lost, and the run had begun."""
    if not restarted():
        return False
    if out is None:
        raise PretrainError("torchrun has restarted the ranks, but there is no --out to go on in; give one.")
    return (out / "config.yaml").is_file()


def _refuse_beside_resume(chosen: argparse.Namespace) -> None:
    """A run keeps its method and where its settings came from."""
    given = [name for name in ("config", "recipe", "bundled", "method") if getattr(chosen, name, None) is not None]
    if given and chosen.out is not None:
        option = "data" if given[0] == "bundled" else given[0]
        raise PretrainError(
            f"--{option} does not go with --resume: a run keeps its configuration, {chosen.out / 'config.yaml'}."
        )


def _changeable(fields: dict[str, Any]) -> dict[str, Any]:
    """Those of a run's first settings that a restart may apply again; its config.yaml has the others."""
    kept = {name: value for name, value in flat(fields).items() if name in MAY_CHANGE}
    nested: dict[str, Any] = {}
    for name, value in kept.items():
        section, _, key = name.partition(".")
        nested = merged(nested, {section: {key: value}})
    return nested


def _fields(chosen: argparse.Namespace) -> dict[str, Any]:
    """The settings of the command line."""
    short = {"seed": chosen.seed, "method": chosen.method, "data.folder": getattr(chosen, "data", None)}
    return options_layer(short, chosen.fields)


def _evaluation(chosen: argparse.Namespace, _: list[Path]) -> int:
    question = question_of(chosen)
    if chosen.print_config:
        print(config_text(question.config, sys.stdout.encoding or "ascii"), end="")
        return DONE
    return DONE if run_evaluation(question) else BAD_INPUT


def _doctor(chosen: argparse.Namespace, _: list[Path]) -> int:
    return DONE if run_doctor(visit_of(chosen)) else BLOCKED


def _pictures(chosen: argparse.Namespace, _: list[Path]) -> int:
    run = expanded(chosen.run, "RUN")
    out = run / "pictures" if chosen.out is None else expanded(chosen.out, "--out")
    if not (run / "config.yaml").is_file():
        raise PretrainError(f"{run} holds no run; expected a config.yaml in it.")
    from vmf_pretrain.report.gallery import draw_gallery

    for path in draw_gallery(run, out, weights=chosen.weights, allow_code=chosen.allow_code):
        print(path)
    return DONE


def _recipes(chosen: argparse.Namespace, _: list[Path]) -> int:
    from vmf_pretrain.recipes.table import recipe_text, recipes

    if chosen.name is not None:
        print(recipe_text(chosen.name, sys.stdout.encoding or "ascii"), end="")
        return DONE
    heads = ("recipe", "method", "backbone", "global batch")
    rows = [
        (found.name, found.config.method, _backbone(found.config), str(found.config.data.batch_size))
        for found in recipes()
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row, found in zip([heads, *rows], [None, *recipes()], strict=True):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if found is not None:
            about = found.about
            print(
                f"    {about.title}\n    stands for: {about.stands_for}\n    memory: {about.memory}; time: {about.time}"
            )
    print("\nvmf-pretrain recipes NAME prints one; vmf-pretrain fit --recipe NAME --data FOLDER runs it.")
    return DONE


def _backbone(config: Config) -> str:
    """The backbone's name, and what differs from it."""
    chosen = config.backbone
    shape = {"patch": chosen.patch_size, "width": chosen.width, "depth": chosen.depth}
    if f"patch{chosen.patch_size}_" in chosen.name:
        del shape["patch"]
    changed = [f"{name} {value}" for name, value in shape.items() if value is not None]
    return chosen.name + (f" ({', '.join(changed)})" if changed else "")


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, with ``--section.field VALUE`` collected in ``fields``.

    Raises:
        PretrainError: it is no command line of ours.
    """
    rest: list[str] = []
    fields: dict[str, str] = {}
    left = iter(arguments)
    for word in left:
        found = FIELD.fullmatch(word)
        if found is None:
            rest.append(word)
            continue
        value = found[2] if found[2] is not None else next(left, None)
        if value is None or (found[2] is None and value.startswith("--")):
            raise PretrainError(f"--{found[1]} got no value; expected --{found[1]} VALUE.")
        fields[found[1]] = value
    chosen = _parser().parse_args(rest)
    if fields and chosen.command in WITHOUT_SETTINGS:
        raise PretrainError(
            f"--{next(iter(fields))} does not go with {chosen.command}; vmf-pretrain fit --print-config shows settings."
        )
    chosen.fields = fields
    return chosen


class _Parser(argparse.ArgumentParser):
    """Raises PretrainError instead of printing its usage on every rank."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: --(\w+)", message)
        place = None if unknown is None else _place_of(unknown[1])
        hint = f"see {self.prog} --help." if place is None else f"did you mean --{place}?"
        raise PretrainError(f"{' '.join(message.split())}; {hint}")


class _Version(argparse.Action):
    """Prints the version. It is read only when it is asked for, because that imports torch."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from vmf_pretrain import __version__

        print(f"{parser.prog} {__version__}")
        parser.exit()


def _place_of(key: str) -> str | None:
    """The dotted name of a field whose section was left out."""
    return next((name for name in names_of(Config) if name.rsplit(".", 1)[-1] == key), None)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vmf-pretrain", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version, and end")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    fields = "any setting is an option too: --optim.learning_rate 1e-3, --views.photos.blur '[1.0, 0.1, 0.5]'"
    demo = commands.add_parser(
        "demo", help="pretrain a small ViT on bundled images: a few minutes on a CPU", epilog=fields, allow_abbrev=False
    )
    fit = commands.add_parser("fit", help="pretrain on images of yours", epilog=fields, allow_abbrev=False)
    fit.add_argument("--data", metavar="FOLDER", help="images, searched recursively; sub-folders are classes of k-NN")
    fit.add_argument("--recipe", metavar="NAME", help="settings by name (default: chosen by machine and images)")
    fit.add_argument("--config", type=Path, metavar="FILE", help="settings as a YAML file")
    demo.add_argument("--data", dest="bundled", choices=BUNDLED, help=f"bundled images (default: {BUNDLED[0]})")
    demo.set_defaults(config=None, recipe=None)
    for command in (demo, fit):
        command.add_argument(
            "--out", type=Path, help=f"run folder (default: the next free runs/{command.prog.split()[-1]})"
        )
        command.add_argument(
            "--method", help=f"{' or '.join(METHODS)}, or module:Class (default: that of the settings)"
        )
        command.add_argument("--seed", help="seed of initialisation, data order and augmentation")
        command.add_argument("--resume", action="store_true", help="continue the run in --out exactly where it stopped")
        command.add_argument(
            "--allow-changed",
            action="append",
            default=[],
            metavar="KIND",
            help=f"resume although this has changed: {', '.join(KINDS)}",
        )
        command.add_argument("--allow-code", action="store_true", help="let the settings name modules of yours to run")
        command.add_argument("--print-config", action="store_true", help="print all settings as YAML, and end")
    add_evaluation(commands)
    add_embed(commands)
    add_export(commands)
    add_doctor(commands)
    add_report(commands)
    add_watch(commands)
    table = commands.add_parser("recipes", help="list the recipes, or print one", allow_abbrev=False)
    table.add_argument("name", nargs="?", metavar="NAME", help="recipe to print as YAML")
    _add_pictures(commands)
    return parser


def _add_pictures(commands: Any) -> None:
    drawn = commands.add_parser("pictures", help="draw what a finished run makes of images", allow_abbrev=False)
    drawn.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    drawn.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the PNGs (default: RUN/pictures)")
    drawn.add_argument("--weights", choices=("last", "best"), default="last", help="which weights (default: last)")
    drawn.add_argument("--allow-code", action="store_true", help="let the run's settings name modules of yours to run")


def _say(line: str) -> None:
    """On stderr, so that what --print-config prints stays YAML; once for all ranks."""
    if rank() == 0:
        print(line, file=sys.stderr)


def _complain(sentence: str) -> None:
    """One error for all ranks: the first rank that has it says it."""
    if not many_ranks() or first_to_say(sentence):
        print(f"vmf-pretrain: {sentence}", file=sys.stderr)


def _done(run: Callable[[Any], object], asked: Callable[[argparse.Namespace], Any]) -> Command:
    """A command that either does what is asked or raises."""

    def command(chosen: argparse.Namespace, _: list[Path]) -> int:
        run(asked(chosen))
        return DONE

    return command


COMMANDS: dict[str, Command] = {
    "demo": _train,
    "fit": _train,
    EVALUATION: _evaluation,
    EMBED: _done(run_embed, wish_of),
    EXPORT: _done(run_export, order_of),
    DOCTOR: _doctor,
    REPORT: _done(run_report, ask_of),
    WATCH: _done(run_watch, lambda chosen: chosen),
    "recipes": _recipes,
    "pictures": _pictures,
}
WITHOUT_SETTINGS = ("recipes", "pictures", EXPORT, REPORT, WATCH)


if __name__ == "__main__":
    sys.exit(main())
