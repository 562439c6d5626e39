"""The sub-command ``vmf-pretrain doctor``."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmf_pretrain.config.data import BUNDLED
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import check_sections, options_layer
from vmf_pretrain.config.method import METHODS
from vmf_pretrain.config.paths import expanded
from vmf_pretrain.config.run import Config
from vmf_pretrain.crash import out_of_memory
from vmf_pretrain.launch import many_ranks
from vmf_pretrain.start import Wish, free_folder, require_free, settings

if TYPE_CHECKING:
    from rich.console import Console

    from vmf_pretrain.doctor.finding import Finding

NAME = "doctor"
LOOKING, COMPARING, STEPPING = 15.0, 5.0, 40.0  # seconds, of parts of the examination
SCANNED = ("folder", "shards")  # kinds of data whose files are looked at
STYLES = {"fine": "green", "note": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Visit:
    """What a person asked for.

    Attributes:
        wish: the run that is meant, as for ``fit``.
        out: the folder that it would be written to, or None for the next free one.
        json: a file for all that was found, or None.
    """

    wish: Wish
    out: Path | None = None
    json: Path | None = None


def add_doctor(commands: Any) -> None:
    """Add the sub-command's options to argparse's sub-commands."""
    command = commands.add_parser(
        NAME,
        help="look at machine, images and the first steps before a run",
        epilog="settings are options too, as for fit: --data.workers 8, --data.batch_size 32",
        allow_abbrev=False,
    )
    command.add_argument("--data", metavar="FOLDER", help="images of the run that is meant (default: bundled ones)")
    command.add_argument("--recipe", metavar="NAME", help="its settings by name (default: those that fit would take)")
    command.add_argument("--config", type=Path, metavar="FILE", help="its settings as a YAML file")
    command.add_argument("--method", help=f"{' or '.join(METHODS)}, or module:Class")
    command.add_argument("--out", type=Path, help="folder that it would be written to; nothing is written")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all that was found to a file")
    command.add_argument("--allow-code", action="store_true", help="let the settings name modules of yours to run")


def visit_of(chosen: argparse.Namespace) -> Visit:
    """What the command line asks for.

    Raises:
        PretrainError: a setting is unknown or does not fit, or there is no such folder.
    """
    if many_ranks():
        raise PretrainError("doctor looks at one machine; start it by itself, without torchrun or srun.")
    fields = options_layer({"data.folder": chosen.data, "method": chosen.method}, chosen.fields)
    recipe = chosen.recipe
    folder = fields.get("data", {}).get("folder")
    if recipe is None and chosen.config is None and not fields.get("data", {}).keys() & {"folder", "kind"}:
        from vmf_pretrain.recipes.table import bundled_recipe

        recipe = bundled_recipe(BUNDLED[0], chosen.method)
    check_sections(fields)
    if folder is not None and not Path(folder).is_dir():
        raise PretrainError(f"data.folder {folder} is not a folder; expected one with images.")
    out = None if chosen.out is None else expanded(chosen.out, "--out")
    report = None if chosen.json is None else expanded(chosen.json, "--json")
    if report is not None and not report.parent.is_dir():
        raise PretrainError(f"--json is {report}, but there is no folder {report.parent}.")
    visit = Visit(Wish(recipe, chosen.config, fields, chosen.allow_code), out, report)
    if recipe is not None or chosen.config is not None:
        settings(visit.wish, lambda line: None)  # a mistake is answered before anything slow
    return visit


def run_doctor(visit: Visit) -> bool:
    """Examine, on standard output; whether nothing is in the way of a run.

    Raises:
        PretrainError: the file for what was found cannot be written.
    """
    from vmf_pretrain.doctor.finding import verdict
    from vmf_pretrain.report.console import run_console
    from vmf_pretrain.storage.durable import replace_durably

    examination = _Examination(visit, run_console())
    examination.of_the_machine()
    config = examination.of_the_settings()
    if config is not None and examination.of_the_images(config):
        examination.of_the_first_steps(config)
    found = examination.findings
    blocked = any(one.severity == "problem" for one in found)
    examination.console.print(f"\n{verdict(found)}", markup=False, highlight=False, soft_wrap=True)
    if visit.json is not None:
        report = {"ready": not blocked, "findings": [asdict(one) for one in found], **examination.facts}
        try:
            replace_durably(visit.json, json.dumps(report, indent=1, default=str).encode())
        except OSError as error:
            raise PretrainError(f"--json {visit.json} cannot be written: {error.strerror or error}.") from None
    return not blocked


class _Examination:
    """Parts of an examination, printed as they are done.

    Args:
        visit: what was asked for.
        console: where findings are printed.

    Attributes:
        findings: so far.
        facts: what was read and measured, as JSON can hold it.
    """

    def __init__(self, visit: Visit, console: "Console") -> None:
        self.visit, self.console = visit, console
        self.findings: list[Finding] = []
        self.facts: dict[str, Any] = {}
        self._cores = 1

    def of_the_machine(self) -> None:
        """Processor, GPUs, packages, and the backends of the losses."""
        self._title("Machine")
        from vmf_pretrain.doctor.packages import judge_versions, read_versions

        versions = read_versions()
        self.facts["versions"] = versions
        if not self._add(judge_versions(versions)):
            return
        import torch

        from vmf_pretrain.doctor.host import judge_host, read_host
        from vmf_pretrain.doctor.kernels import check_kernels, judge_kernels

        host = read_host()
        self._cores = host.cores
        self.facts["machine"] = asdict(host)
        self._add(judge_host(host))
        self._title("Kernels, each compared with the published loss in fp64")
        devices = ["cpu", *(["cuda"] if host.gpus else [])]
        records = [record for device in devices for record in check_kernels(torch.device(device))]
        self.facts["backends"] = records
        self._add(judge_kernels(records))

    def of_the_settings(self) -> Config | None:
        """The run that is meant; None if there can be none."""
        from vmf_pretrain.doctor.finding import problem
        from vmf_pretrain.doctor.judge_dry_run import judge_settings

        self._title("Settings")
        if any(one.severity == "problem" and one.subject == "packages" for one in self.findings):
            return None
        try:
            config = settings(self.visit.wish, self._say)
        except PretrainError as error:
            self._add([problem("settings", str(error))])
            return None
        if self.visit.wish.recipe is not None:
            self._say(f"Recipe {self.visit.wish.recipe}.")
        self.facts["config"] = asdict(config)
        self._add(judge_settings(config, self._cores))
        self._add([self._place()])
        return config

    def of_the_images(self, config: Config) -> bool:
        """The files, as many as there is time for; whether any can be read."""
        if config.data.kind not in SCANNED:
            return True
        from vmf_pretrain.data.load import source_of
        from vmf_pretrain.doctor.finding import problem
        from vmf_pretrain.doctor.images import equal_files, look_at
        from vmf_pretrain.doctor.judge_images import judge_classes, judge_equal, judge_look

        self._title(f"Images in {config.data.folder} (at most {LOOKING + COMPARING:.0f} s)")
        try:
            source = source_of(config.data, allow_code=False)[0]
        except PretrainError as error:
            return self._add([problem("images", str(error))])
        self._add(judge_classes(source, config.data.kind))
        look = look_at(source, LOOKING)
        self._add(judge_look(look, config))
        equal = equal_files(source, COMPARING)
        self._add([judge_equal(equal, source)])
        self.facts["images"] = {**look.facts, "equal": asdict(equal)}
        return len(look.bad) < look.looked

    def of_the_first_steps(self, config: Config) -> None:
        """Twenty steps in memory."""
        from vmf_pretrain.doctor.dry_run import STEPS, dry_run
        from vmf_pretrain.doctor.finding import problem
        from vmf_pretrain.doctor.judge_dry_run import judge_dry_run, room_needed
        from vmf_pretrain.doctor.place import judge_room

        self._title(f"First steps: {STEPS} in memory, or as many as {STEPPING:.0f} s allow")
        try:
            found = dry_run(config, STEPPING, self._say, allow_code=self.visit.wish.allow_code)
        except PretrainError as error:
            self._add([problem("first steps", str(error))])
            return
        except Exception as error:  # whatever it is, it would end the run
            reason = " ".join(str(error).split("\n")[0].split())
            if out_of_memory(error):
                less = "add --train.accumulate 2 or more, or --train.activation_checkpointing true"
                self._add([problem("memory", f"it ran out with a few images ({reason})", less)])
            else:
                self._add(
                    [problem("first steps", f"{type(error).__name__}: {reason}", "vmf-pretrain fit has the rest")]
                )
            return
        self.facts["first_steps"] = {**asdict(found), "hours": found.hours}
        self._add(judge_dry_run(found, config))
        self._add([judge_room(self._out, room_needed(found, config))])

    @property
    def _out(self) -> Path:
        return free_folder("fit") if self.visit.out is None else self.visit.out

    def _place(self) -> "Finding":
        from vmf_pretrain.doctor.finding import fine, problem
        from vmf_pretrain.doctor.place import SUBJECT, judge_run

        if (self._out / "config.yaml").is_file():
            return judge_run(self._out)
        try:
            require_free(self._out)
        except PretrainError as error:
            return problem(SUBJECT, str(error), "choose another with --out")
        return fine(SUBJECT, f"a run can be written to {self._out}")

    def _title(self, text: str) -> None:
        self.console.print(f"\n{text}" if self.findings else text, style="bold", markup=False, soft_wrap=True)

    def _say(self, line: str) -> None:
        self.console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)

    def _add(self, findings: "Iterable[Finding]") -> bool:
        """Print findings as they come; whether none is a problem."""
        from rich.text import Text

        good = True
        for one in findings:
            self.findings.append(one)
            good &= one.severity != "problem"
            words = Text.assemble(
                (f"  {one.severity:<8}", STYLES[one.severity]), f"{one.subject}: {one.words.rstrip('.')}."
            )
            self.console.print(words, highlight=False, soft_wrap=True)
            if one.advice:
                self.console.print(f"          -> {one.advice}.", markup=False, highlight=False, soft_wrap=True)
        return good
