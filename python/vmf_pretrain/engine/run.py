"""A pretraining run from its configuration to its summary, on one rank or many.

Every rank runs this; the first one owns the folder, the log, the evaluation and the console.
"""

import functools
import io
import shlex
import signal
import time
from collections.abc import Set
from pathlib import Path
from typing import Any

from rich.console import Console

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import write_config
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.bad_images import BadImages
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.load import load_images
from vmf_pretrain.data.loader import load_from
from vmf_pretrain.data.network_input import NetworkInput, network_input
from vmf_pretrain.engine.interruption import Interruption
from vmf_pretrain.engine.keeping import Keeping
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.engine.parallel import choose_device
from vmf_pretrain.engine.progress import RunProgress
from vmf_pretrain.engine.skipping import Skipping
from vmf_pretrain.engine.votes import Taken
from vmf_pretrain.evaluation.agreement import compared
from vmf_pretrain.evaluation.judge import BASELINES, Judge
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks import ranks
from vmf_pretrain.report.figures import draw_plots
from vmf_pretrain.report.summary import print_summary, write_summary
from vmf_pretrain.storage.checkpoint import Checkpoint
from vmf_pretrain.storage.metrics import MetricsLog, read_metrics
from vmf_pretrain.storage.run_folder import RunFolder

SHOWN = {
    "loss": "loss",
    "H(q)": "teacher_entropy",
    "KL": "kl",
    "MI": "mutual_information",
    "lr": "learning_rate",
}


class Run:
    """One run in its folder.

    Args:
        config: the whole run.
        out: the run's folder; new, or with ``resume`` one that holds a checkpoint.
        resume: continue from the newest checkpoint.
        console: where progress and summary are printed.
        allow_code: whether the configuration may name modules to import.
        allow_changed: what may differ from the checkpoint's run although step numbers then mean something else.

    Raises:
        PretrainError: the folder, the data or the checkpoint do not fit; the error says what was given and expected.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        *,
        resume: bool,
        console: Console,
        allow_code: bool = False,
        allow_changed: Set[str] = frozenset(),
    ) -> None:
        self.started = time.perf_counter()
        self.config, self.fed = config, network_input(config)
        self.first = ranks.rank() == 0
        self.console = console if self.first else Console(file=io.StringIO())
        method = method_class(config, allow_code=allow_code)
        if not resume and self.first:
            RunFolder.refuse_existing(out)
        train, held_out, found = load_images(config, allow_code=allow_code)
        self.console.print(found.text, soft_wrap=True, highlight=False)
        self.batches = ViewBatches(train, config, method.plan(config), ranks.rank(), ranks.count())
        self.judge = Judge(train, held_out, config)
        self.loop = Loop(config, method, self.batches.steps_per_epoch, choose_device(config))
        self.step = 0
        self.facts: dict[str, Any] = {"seconds_before": 0.0, "best_knn": None}
        self.folder = RunFolder(out)
        self.keeping = Keeping(self.folder, config, self.loop)
        scaled = self.loop.loss_scale.active
        self.skipping = Skipping(self.folder, train.name, config.train.max_skipped, scaled=scaled)
        if resume:
            RunFolder.reopen(out)
            self._restore(self.keeping.newest())
            self.console.print(f"Going on from step {self.step} of {len(self.batches)}.")
            return
        if self.first:
            self.facts |= self._judged_before_training()
            RunFolder.create(out)
            write_config(config, self.folder.config)
        self.save()  # step 0: so that --resume works even if something stops the first epoch

    def train(self) -> int:
        """Train to the end, or until a signal; returns the program's exit code."""
        log = MetricsLog(self.folder, self.step) if self.first else None
        if self.step == 0:
            self._write(log, {"step": 0, "knn": self.facts.get("knn_untrained")})
        stopped = None
        listed, most = self.folder.path / "bad_files.jsonl", self.config.data.max_bad_share
        self.bad = BadImages(listed, most, self.step, writes=self.first)
        with Interruption() as interruption, RunProgress(self.console, len(self.batches), self.step) as progress:
            for batch in load_from(self.batches, self.step):
                stopped = self._advance(batch, log, progress, interruption)
                if stopped is not None:
                    break
        if log is not None:
            log.close()
        if stopped is not None and self.step < len(self.batches):
            self._keep()
            self.console.print(
                f"Stopped by {stopped.name} at step {self.step}; a checkpoint is written. "
                f"Go on with: vmf-pretrain fit --resume --out {shlex.quote(str(self.folder.path))}",
                soft_wrap=True,
                highlight=False,
            )
            return 128 + stopped
        if self.first:
            self.finish()
        return 0

    def finish(self) -> None:
        """Evaluate the network, draw the plots, and print the summary."""
        method, train = self.loop.method, self.judge.train
        report = self.judge.report(method, self.loop.place(self.step))
        if self.facts["best_knn"] is None:  # without labels, the last weights are the best known
            self.facts["best_knn"] = report.figures["knn"]
            self.keeping.weights("best", self.step, report.figures["knn"])
        baselines = {"untrained": self.facts["knn_untrained"], "raw pixels": self.facts["knn_pixels"]}
        known = {name: value for name, value in baselines.items() if value is not None}
        draw_plots(self.folder, self.config, report.head, method.evaluated, self.judge.held_out or train, known)
        self.figures = {
            **report.figures,
            **compared(read_metrics(self.folder), report.information),
            **{name: self.facts[name] for name in (*BASELINES, "best_knn")},
            "seconds": round(self.seconds, 1),
            "method": self.config.method,
            "seed": self.config.seed,
            "steps": self.step,
        }
        write_summary(self.folder.summary, self.figures)
        print_summary(self.console, self.figures, self.config.head.prototypes, self.folder.path, self._next_command())

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self.keeping.checkpoint(self.step, {**self.facts, "seconds_before": self.seconds})

    @property
    def seconds(self) -> float:
        """Wall time of the run in seconds, added up over interruptions."""
        return float(self.facts["seconds_before"]) + time.perf_counter() - self.started

    def _advance(
        self, batch: Batch, log: MetricsLog | None, progress: RunProgress, interruption: Interruption
    ) -> signal.Signals | None:
        """One step, and what falls due after it; returns the signal that stops all ranks, or None."""
        number, every = self.step + 1, self.config.train
        last, epoch_ends = number == len(self.batches), number % self.batches.steps_per_epoch == 0
        logged = last or number % every.log_every == 0
        self.bad.note(batch.bad, self.step)
        taken = self.loop.step(self.step, batch, log=logged, mine=functools.partial(interruption.votes, len(batch.bad)))
        self.step = number
        progress.advance(number)
        evaluating = last or (epoch_ends and self._epoch % self.config.evaluate.every == 0)
        saving = last or (epoch_ends and self._epoch % every.checkpoint_every == 0)
        saving |= any(one.counts.save for one in taken)
        if evaluating or saving or any(one.counts.stop for one in taken):
            taken += self.loop.drain()
        for one in taken:
            self._learn(one, log, progress)
        if evaluating and self.first:
            self._evaluate(log, progress)
        if saving:
            self._keep()
        return next((one.counts.stop for one in taken if one.counts.stop is not None), None)

    def _learn(self, taken: Taken, log: MetricsLog | None, progress: RunProgress) -> None:
        """Write down what is known of a step."""
        number = taken.step + 1
        self.skipping.learn(taken)
        self.bad.learn(taken.counts.bad_images, number * self.config.data.batch_size)
        if taken.numbers:
            rates = self.loop.rates(taken.step)
            epoch = -(-number // self.batches.steps_per_epoch)
            record = {"step": number, "epoch": epoch, **taken.numbers, **rates, "seconds": round(self.seconds, 2)}
            self._write(log, record)
            progress.tell(number, {name: record[key] for name, key in SHOWN.items() if key in record})

    def _keep(self) -> None:
        """Write a checkpoint, and the weights of the same step."""
        self.save()
        self.keeping.weights("last", self.step, None)

    def _evaluate(self, log: MetricsLog | None, progress: RunProgress) -> None:
        accuracy = self.judge.knn(self.loop.method.evaluated)
        if accuracy is None:
            return
        self._write(log, {"step": self.step, "epoch": self._epoch, "knn": accuracy})
        progress.tell(self.step, {"k-NN %": accuracy})
        if self.facts["best_knn"] is None or accuracy > self.facts["best_knn"]:
            self.facts["best_knn"] = accuracy
            self.keeping.weights("best", self.step, accuracy)

    @property
    def _epoch(self) -> int:
        """Epochs done, including the current one."""
        return -(-self.step // self.batches.steps_per_epoch)

    def _write(self, log: MetricsLog | None, record: dict[str, Any]) -> None:
        if log is not None:
            log.write(record)

    def _judged_before_training(self) -> dict[str, Any]:
        """The network input and the accuracies of the untrained network, for checkpoints; call before the first step."""
        return {"input": self.fed.facts(), **self.judge.baselines(self.loop.method.evaluated)}

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
        self.loop.restore(checkpoint)

    def _next_command(self) -> str:
        if self.config.data.kind == "digits":
            other = "dino" if self.config.method == "dino-vmf" else "dino-vmf"
            return f"vmf-pretrain demo --method {other}"
        return f"tensorboard --logdir {shlex.quote(str(self.folder.path))}"
