"""A pretraining run from its configuration to its summary."""

import math
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import write_config
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batches import ViewBatches, load_from
from vmf_pretrain.data.images import Images, digits, folder_images
from vmf_pretrain.data.network_input import NetworkInput, network_input
from vmf_pretrain.engine.interruption import Interruption
from vmf_pretrain.engine.loop import Training
from vmf_pretrain.engine.progress import RunProgress
from vmf_pretrain.evaluation.agreement import BATCHES_LOGGED, agreement
from vmf_pretrain.evaluation.judge import BASELINES, Judge
from vmf_pretrain.report.figures import draw_plots
from vmf_pretrain.report.summary import print_summary, write_summary
from vmf_pretrain.storage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vmf_pretrain.storage.run_folder import MetricsLog, RunFolder, read_metrics
from vmf_pretrain.storage.weights import save_weights


class Run:
    """One run in its folder.

    Args:
        config: the whole run.
        out: the run's folder; new, or with ``resume`` one that holds a checkpoint.
        resume: continue from the newest checkpoint.
        console: where progress and summary are printed.

    Raises:
        PretrainError: the folder, the data or the checkpoint do not fit; the error says what was given and expected.
    """

    def __init__(self, config: Config, out: Path, *, resume: bool, console: Console) -> None:
        self.started = time.perf_counter()
        self.config = config
        self.fed = network_input(config)
        self.console = console
        if not resume:
            RunFolder.refuse_existing(out)
        train, held_out = load_images(config)
        self.batches = ViewBatches(train, config)
        self.judge = Judge(train, held_out, config)
        self.training = Training(config, self.batches.steps_per_epoch, _fabric(config))
        self.step = 0
        self.facts: dict[str, Any] = {"seconds_before": 0.0, "best_knn": None}
        if resume:
            self.folder = RunFolder.reopen(out)
            self._restore(load_checkpoint(self.folder.checkpoints))
            console.print(f"Going on from step {self.step} of {len(self.batches)}.")
        else:
            self.facts |= self._judged_before_training()
            self.folder = RunFolder.create(out)
            write_config(config, self.folder.config)
            self.save()  # step 0: so that --resume works even if something stops the first epoch

    def train(self) -> int:
        """Train to the end, or until a signal; returns the program's exit code."""
        log = MetricsLog(self.folder, self.step)
        if self.step == 0:
            log.write({"step": 0, "knn": self.facts["knn_untrained"]})
        with Interruption() as interruption, RunProgress(self.console, len(self.batches), self.step) as progress:
            for views in load_from(self.batches, self.step):
                if isinstance(views, PretrainError):
                    raise views
                self._advance(views, log, progress)
                if interruption.requested is not None:
                    break
        log.close()
        if interruption.requested is not None and self.step < len(self.batches):
            self._keep()
            self.console.print(
                f"Stopped by {interruption.requested.name} at step {self.step}; a checkpoint is written. "
                f"Go on with: vmf-pretrain fit --resume --out {shlex.quote(str(self.folder.path))}",
                soft_wrap=True,
                highlight=False,
            )
            return interruption.exit_code
        self.finish()
        return 0

    def save(self) -> None:
        """Write a checkpoint of this step."""
        state = {**self.facts, "seconds_before": self.seconds}
        kept = self.config.train.keep_checkpoints
        save_checkpoint(self.folder.checkpoints, self.step, self.training.tensors(), state, keep=kept)

    def finish(self) -> None:
        """Evaluate the teacher, draw the plots, and print the summary."""
        report = self.judge.report(self.training)
        teacher, train = self.training.teacher, self.judge.train
        if self.facts["best_knn"] is None:  # without labels, the last weights are the best known
            self.facts["best_knn"] = report.figures["knn"]
            self._save_weights("best", report.figures["knn"])
        baselines = {"untrained": self.facts["knn_untrained"], "raw pixels": self.facts["knn_pixels"]}
        known = {name: value for name, value in baselines.items() if value is not None}
        draw_plots(self.folder, self.config, report.head, teacher, self.judge.held_out or train, known)
        figures = {
            **report.figures,
            **self._compared(report.information),
            **{name: self.facts[name] for name in (*BASELINES, "best_knn")},
            "seconds": round(self.seconds, 1),
            "method": self.config.method,
            "seed": self.config.seed,
            "steps": self.step,
        }
        write_summary(self.folder.summary, figures)
        print_summary(self.console, figures, self.config.head.prototypes, self.folder.path, self._next_command())

    @property
    def seconds(self) -> float:
        """Wall time of the run in seconds, added up over interruptions."""
        return float(self.facts["seconds_before"]) + time.perf_counter() - self.started

    def _advance(self, views: list[torch.Tensor], log: MetricsLog, progress: RunProgress) -> None:
        numbers = self.training.step(self.step, views)
        rates = self.training.rates(self.step)
        self.step += 1
        progress.advance(self.step)
        last, epoch_ends = self.step == len(self.batches), self.step % self.batches.steps_per_epoch == 0
        if last or self.step % self.config.train.log_every == 0:
            values = {name: value.item() for name, value in numbers.items()}
            log.write({"step": self.step, "epoch": self._epoch, **values, **rates, "seconds": round(self.seconds, 2)})
            shown = {"loss": values["loss"], "H(q)": values["teacher_entropy"], "KL": values["kl"]}
            progress.tell(self.step, {**shown, "MI": values["mutual_information"], "lr": rates["learning_rate"]})
        if last or (epoch_ends and self._epoch % self.config.evaluate.every == 0):
            self._evaluate(log, progress)
        if last or (epoch_ends and self._epoch % self.config.train.checkpoint_every == 0):
            self._keep()

    def _keep(self) -> None:
        """Write a checkpoint, and the teacher's weights of the same step."""
        self.save()
        self._save_weights("last", None)

    def _evaluate(self, log: MetricsLog, progress: RunProgress) -> None:
        accuracy = self._knn()
        if accuracy is None:
            return
        log.write({"step": self.step, "epoch": self._epoch, "knn": accuracy})
        progress.tell(self.step, {"k-NN %": accuracy})
        if self.facts["best_knn"] is None or accuracy > self.facts["best_knn"]:
            self.facts["best_knn"] = accuracy
            self._save_weights("best", accuracy)

    def _knn(self) -> float | None:
        return self.judge.knn(self.training.teacher.backbone)

    @property
    def _epoch(self) -> int:
        """Epochs done, including the current one."""
        return -(-self.step // self.batches.steps_per_epoch)

    def _save_weights(self, name: str, knn: float | None) -> None:
        facts = {"network": "teacher", "step": self.step, "knn": knn, "config": asdict(self.config)}
        save_weights(self.folder, name, self.training.teacher, self.fed, facts)

    def _judged_before_training(self) -> dict[str, Any]:
        """The network input and the accuracies of the untrained network, for checkpoints; call before the first step."""
        return {"input": self.fed.facts(), **self.judge.baselines(self.training.teacher.backbone)}

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.step, self.facts = checkpoint.step, checkpoint.state
        if "input" not in self.facts:
            # the first version trained on the same scale, but evaluated photographs on another
            self.facts |= {**self._judged_before_training(), "best_knn": None}
            self.console.print(
                f"Checkpoint {checkpoint.path.name} does not say what its network is fed, so it was judged by an earlier "
                "version; baselines are judged anew, and the best accuracy from here on.",
                soft_wrap=True,
            )
        trained = NetworkInput.from_facts(self.facts["input"])
        if trained != self.fed:
            raise PretrainError(
                f"checkpoint {checkpoint.path} is of a network fed with {trained} but the configuration asks for {self.fed}."
            )
        self.training.restore(checkpoint)

    def _compared(self, judged: tuple[list[float], list[float]]) -> dict[str, Any]:
        """The summary's comparison of mutual information in the log and in evaluated images; nulls if it is impossible."""
        lines = [record["mutual_information"] for record in read_metrics(self.folder) if "mutual_information" in record]
        logged = [math.nan if value is None else value for value in lines[-BATCHES_LOGGED:]]
        found = agreement(logged, *judged)
        return {
            "mutual_information_logged": None if found is None else found.logged,
            "mutual_information_judged": None if found is None else list(found.judged),
            "mutual_information_tolerance": None if found is None else found.tolerance,
            "mutual_information_agrees": None if found is None else found.holds,
        }

    def _next_command(self) -> str:
        if self.config.data.kind == "digits":
            other = "dino" if self.config.method == "dino-vmf" else "dino-vmf"
            return f"vmf-pretrain demo --method {other}"
        return f"tensorboard --logdir {shlex.quote(str(self.folder.path))}"


def _fabric(config: Config) -> Fabric:
    try:
        return Fabric(accelerator=config.train.device, devices=1, precision=config.train.precision)
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise PretrainError(f"train.device {config.train.device} cannot be used here: {reason}.") from None


def load_images(config: Config) -> tuple[Images, Images | None]:
    """Training and held-out images of a configuration."""
    if config.data.kind == "digits":
        return digits()
    return folder_images(Path(str(config.data.folder)), config.views.global_size, config.data.held_out)
