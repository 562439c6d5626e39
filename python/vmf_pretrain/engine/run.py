"""A pretraining run from its configuration to its summary, on one rank or many.

Every rank runs this; the first one owns the folder, the log and the console. All compute the features that are evaluated; what
is made of them is the first one's work, and that of ranks that have only a part of the network.
"""

import contextlib
import functools
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from rich.console import Console

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import config_text
from vmf_pretrain.config.resume import resume_command
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.load import load_images
from vmf_pretrain.data.loader import load_from
from vmf_pretrain.data.network_input import NetworkInput, network_input
from vmf_pretrain.data.waiting import Waiting
from vmf_pretrain.engine.alarm import Alarm, CollapseError
from vmf_pretrain.engine.bad_images import BadImages
from vmf_pretrain.engine.beginning import beginning
from vmf_pretrain.engine.interruption import Interruption, no_requests
from vmf_pretrain.engine.keeping import Keeping
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.engine.parallel import choose_device
from vmf_pretrain.engine.progress import RunProgress
from vmf_pretrain.engine.records import Records
from vmf_pretrain.engine.skipping import Skipping
from vmf_pretrain.engine.speed import Speed
from vmf_pretrain.engine.votes import Taken
from vmf_pretrain.evaluation.agreement import compared
from vmf_pretrain.evaluation.judge import BASELINES, Judge
from vmf_pretrain.evaluation.online import improved, probe_sets
from vmf_pretrain.methods.method import Method
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks import ranks
from vmf_pretrain.report.figures import draw_plots, sample_attention, sample_pictures
from vmf_pretrain.report.summary import next_command, print_summary, summary_text
from vmf_pretrain.report.verdict import verdict
from vmf_pretrain.storage.checkpoint import Checkpoint
from vmf_pretrain.storage.durable import replace_durably
from vmf_pretrain.storage.lock import RunLock
from vmf_pretrain.storage.metrics import read_metrics
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.tolerant import TolerantWrites


class Run:
    """One run in its folder. The folder is locked until ``train`` returns, or ``close`` is called.

    Args:
        config: the whole run.
        out: the run's folder; new, or with ``resume`` one that holds a checkpoint.
        resume: continue from the newest checkpoint.
        console: where progress and summary are printed.
        allow_code: whether the configuration may name modules to import.
        allow_changed: what may differ from the checkpoint's run although step numbers then mean something else.

    Attributes:
        figures: the numbers of the summary, once the run has finished.
        found: what there was where the images were looked for.

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
        self.config, self.fed, self.folder = config, network_input(config), RunFolder(out)
        self.first = ranks.rank() == 0
        self.console = console if self.first else Console(quiet=True)
        self.tolerant = TolerantWrites(self._say)
        self.step, self.figures = 0, dict[str, Any]()
        self.facts: dict[str, Any] = {"seconds_before": 0.0, "best_knn": None, "bad_images": 0}
        self.facts |= {f"best_{config.evaluate.best}": None}
        self._on_disk = None if resume else 0
        with contextlib.ExitStack() as closing:
            closing.enter_context(no_requests())
            self._lock(out, resume, closing)
            self._build(allow_code, closing, begin=None if resume else beginning(config, self._say))
            if resume:
                self._restore(self.keeping.newest(allow_changed))
                if allow_changed and self.first:
                    self.folder.write_config(config_text(config))  # what --resume alone goes on with from here
                self._say(f"Going on from step {self.step} of {len(self.batches)}.")
            else:
                self._begin()
            self._closing = closing.pop_all()  # only now: what fails before this gives the lock back

    def train(self) -> int:
        """Train to the end, or until a signal; returns the program's exit code.

        Raises:
            CollapseError: ``train.stop_on_collapse`` has ended the run; its summary is written.
            PretrainError: the run cannot go on.
        """
        with self._closing, self._summary_of_a_collapse():
            with Interruption() as interruption:
                stopped = self._steps(interruption)
                if stopped is not None and self._saved_at != self.step:
                    self._keep()
                self.keeping.writer.wait()
            if stopped is None or self.step == len(self.batches):
                self.finish()
                return self._ending()
            self._say(
                f"Stopped by {stopped.name} at step {self.step}; {self._kept()} "
                f"Go on with: {resume_command(self.folder.path, self.config)}"
            )
            return 128 + stopped

    def close(self) -> None:
        """Give up the folder of a run that is not trained."""
        self._closing.close()

    def finish(self, ended: str | None = None) -> None:
        """Evaluate the network, draw the plots, write the summary, and print it unless it says why the run ended early."""
        method, train = self.loop.method, self.judge.train
        report = self.judge.report(method, self.loop.place(self.step))
        if report is None:
            return
        if self.facts[f"best_{self.config.evaluate.best}"] is None and ended is None:
            # without labels, the last weights are the best known, unless they have collapsed
            self.facts["best_knn"] = report.figures["knn"]
            self.keeping.weights("best", self.step, report.figures["knn"])
        baselines = {"untrained": self.facts["knn_untrained"], "raw pixels": self.facts["knn_pixels"]}
        known = {name: value for name, value in baselines.items() if value is not None}
        shown, backbone = self.judge.held_out or train, method.evaluated
        attention = sample_attention(self.config, backbone, shown)
        pictures = sample_pictures(self.config, backbone, shown, method.pictures)
        if self.first:
            draw = functools.partial(draw_plots, self.folder, self.config, report.head, attention, known, pictures)
            self.tolerant.attempt("plots", draw)
        self.figures = {
            **report.figures,
            **compared(read_metrics(self.folder), report.information),
            **{name: self.facts[name] for name in (*BASELINES, "best_knn")},
            "bad_images": self.facts["bad_images"],
            "verdict": verdict(read_metrics(self.folder), self.config).plain(),
            "warnings": self.alarm.warnings,
            "seconds": round(self.seconds, 1),
            "method": self.config.method,
            "seed": self.config.seed,
            "steps": self.step,
            "ended": ended,
        }
        if self.first:
            text = summary_text(self.figures).encode()
            self.tolerant.attempt("summary.json", lambda: replace_durably(self.folder.summary, text))
        if self.first and ended is None:
            following = next_command(self.config, self.folder.path)
            print_summary(self.console, self.figures, self.config.head.prototypes, self.folder.path, following)

    @contextlib.contextmanager
    def _summary_of_a_collapse(self) -> Iterator[None]:
        """A summary that an earlier process left is not this run's; one is written if the run ends by a collapse."""
        if self.first and self.step < len(self.batches):
            self.tolerant.attempt("summary.json", lambda: self.folder.summary.unlink(missing_ok=True))
        try:
            yield
        except CollapseError as collapse:
            self.keeping.writer.wait()
            try:
                self.finish(str(collapse))
            except PretrainError as error:  # features that are not finite must not hide why the run ends
                self._say(f"No summary is written: {error}")
            raise

    def _ending(self) -> int:
        """The exit code of a finished run: 1 if its last state is not on disk, also after another try."""
        writer = self.keeping.writer
        writer.wait()
        known = int(ranks.from_first(str(len(writer.failures))))
        if not known:
            return 0
        self._keep()
        writer.wait()
        if int(ranks.from_first(str(len(writer.failures)))) == known:
            return 0
        newest = self._on_disk if writer.saved is None else writer.saved
        self._say(
            f"THE RUN'S LAST STATE IS NOT ON DISK, or only in part: the newest checkpoint is of step {newest} of {self.step}. "
            f"Make room on the disk of {self.folder.path}, and go on from there with --resume."
        )
        return 1

    @property
    def seconds(self) -> float:
        """Wall time of the run in seconds, added up over interruptions."""
        return float(self.facts["seconds_before"]) + time.perf_counter() - self.started

    def save(self) -> None:
        """Write a checkpoint of this step, in the background."""
        self._save(None)

    def _lock(self, out: Path, resume: bool, closing: contextlib.ExitStack) -> None:
        if not self.first:
            return
        if resume:
            RunFolder.reopen(out)
        else:
            RunFolder.refuse_existing(out)
            if not out.exists():  # a run that ends before it begins leaves no folder
                closing.callback(RunFolder.remove_if_empty, out)
        closing.enter_context(RunLock.take(out, say=self._say))

    def _build(
        self, allow_code: bool, closing: contextlib.ExitStack, *, begin: Callable[[Method], None] | None
    ) -> None:
        """Data, networks and what belongs to them; nothing is written."""
        config, method = self.config, method_class(self.config, allow_code=allow_code)
        train, held_out, self.found = load_images(config, allow_code=allow_code)
        if len(set(ranks.gathered([json.dumps(self.found.facts, sort_keys=True)]))) > 1:
            raise PretrainError("the ranks do not find the same images; expected one disk, and all files on it.")
        self._say(self.found.text)
        self.batches = ViewBatches(train, config, method.plan(config), ranks.rank(), ranks.count())
        device = choose_device(config.train.device)
        self.loop = Loop(config, method, self.batches.steps_per_epoch, device, begin=begin)
        self.keeping = closing.enter_context(
            Keeping(self.folder, config, self.loop, self.batches, self.found.facts, self._say)
        )
        sets = probe_sets(config.evaluate, self.fed.size)
        self.judge = Judge(train, held_out, config, sets, judging=self.first or self.loop.wrapped.sharded)

    def _begin(self) -> None:
        self.facts |= self._judged_before_training()
        if self.first:
            RunFolder.create(self.folder.path)
        self.save()  # step 0: so that --resume works even if something stops the first epoch
        self.keeping.writer.wait()
        failures = ranks.done_by_first(lambda: self.keeping.writer.failures)
        if failures:
            raise PretrainError(f"the run cannot begin, as nothing could go on from it: {failures[0]}")
        if self.first:  # the sign that a run has begun, after what it can go on from
            self.folder.write_config(config_text(self.config))

    def _steps(self, interruption: Interruption) -> signal.Signals | None:
        """All steps that are left; returns the signal that stopped them."""
        records = Records(self.folder, self.step, self.tolerant, self.config, writes=self.first)
        self.skipping = Skipping(
            records.skipped.write,
            self._say,
            self.judge.train.name,
            self.config.train.max_skipped,
            scaled=self.loop.loss_scale.active,
        )
        self.bad = BadImages(records.bad.write, self.config.data.max_bad_share, self.facts.get("bad_images", 0))
        if self._on_disk == 0:  # a new run
            records.metrics.write({"step": 0, "knn": self.facts.get("knn_untrained")})
            records.histograms.write(self.judge.histograms(self.loop.method, self.loop.place(0)))
        before = read_metrics(self.folder) if self.first else []
        self.alarm = Alarm(self.config, records.metrics.write, self._say, before)
        stopped = None
        loading = load_from(self.batches, self.step)
        waiting = Waiting(loading)
        self._speed = Speed(waiting, self.config.data.batch_size, self.step, self.loop.device)
        bar = RunProgress(self.console, len(self.batches), self.step)
        with contextlib.closing(loading), contextlib.closing(records), bar as progress:
            for batch in waiting:
                stopped = self._advance(batch, records, progress, interruption)
                self.keeping.writer.check()
                if stopped is not None:
                    break
        return stopped

    def _advance(
        self, batch: Batch, records: Records, progress: RunProgress, interruption: Interruption
    ) -> signal.Signals | None:
        """One step, and what falls due after it; returns the signal that stops all ranks, or None."""
        number, every = self.step + 1, self.config.train
        last, epoch_ends = number == len(self.batches), number % self.batches.steps_per_epoch == 0
        logged = last or number % every.log_every == 0
        collapsed = int(self.first and self.alarm.stopped is not None)
        mine = functools.partial(interruption.votes, len(batch.bad), collapsed)
        taken = self.loop.step(self.step, batch, log=logged, mine=mine)
        self.step = number
        if logged:
            advice = self._speed.measure(number)
            if advice is not None:
                self.alarm.warn("data wait", number, advice, (), ())
        progress.advance(number)
        evaluating = last or (epoch_ends and self._epoch % self.config.evaluate.every == 0)
        saving = last or (epoch_ends and self._epoch % every.checkpoint_every == 0)
        saving |= any(one.counts.save for one in taken)
        if evaluating or saving or any(one.counts.stop for one in taken):
            taken += self.loop.drain()
            saving |= any(one.counts.save for one in taken)
        for one in taken:
            self._learn(one, records, progress)
        if evaluating:
            self._evaluate(records, progress)
            self._speed.restart(number)
        if saving:
            self._keep()
        return next((one.counts.stop for one in taken if one.counts.stop is not None), None)

    def _learn(self, taken: Taken, records: Records, progress: RunProgress) -> None:
        """Write down what is known of a step."""
        number = taken.step + 1
        self.skipping.learn(taken)
        self.bad.learn(taken, number * self.config.data.batch_size)
        self.facts["bad_images"] = self.bad.count
        if taken.counts.collapsed:
            raise CollapseError(
                f"the run is ended by train.stop_on_collapse: {ranks.from_first(self.alarm.stopped or '')} With "
                "--train.stop_on_collapse false, --resume goes on from the last checkpoint all the same."
            )
        if taken.numbers:
            rates = {**self.loop.rates(taken.step), **self._speed.of(number)}
            epoch = -(-number // self.batches.steps_per_epoch)
            where = {"step": number, "steps": len(self.batches), "epoch": epoch}
            record = {**where, **taken.numbers, **rates, "seconds": round(self.seconds, 2)}
            records.metrics.write(record)
            progress.learn(record)
            self.alarm.learn(record)

    def _keep(self) -> None:
        """Write a checkpoint, and the weights of the same step."""
        self._save("last")

    def _save(self, weights: str | None) -> None:
        self.keeping.checkpoint(self.step, {**self.facts, "seconds_before": self.seconds}, weights)
        self._saved_at = self.step

    def _kept(self) -> str:
        """What is on disk now, as a sentence."""
        saved = self.keeping.writer.saved
        if saved == self.step or ranks.rank():
            return "a checkpoint is written."
        saved = self._on_disk if saved is None else saved
        return f"its checkpoint COULD NOT BE WRITTEN; the newest one is of step {saved}."

    def _evaluate(self, records: Records, progress: RunProgress) -> None:
        records.histograms.write(self.judge.histograms(self.loop.method, self.loop.place(self.step)))
        figures = self.judge.online(self.loop.method.evaluated)
        if not figures:
            return
        record = {"step": self.step, "epoch": self._epoch, **figures}
        records.metrics.write(record)
        progress.learn(record)
        best = self.config.evaluate.best
        better = improved(figures, self.facts, {"knn", best})
        self.facts |= better
        if f"best_{best}" in better and self.judge.judging:  # whoever has the network, or a part of it
            self.keeping.weights("best", self.step, figures.get("knn"))

    @property
    def _epoch(self) -> int:
        """Epochs done, including the current one."""
        return -(-self.step // self.batches.steps_per_epoch)

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _judged_before_training(self) -> dict[str, Any]:
        """The network input and the accuracies of the untrained network, for checkpoints; call before the first step."""
        return {"input": self.fed.facts(), **self.judge.baselines(self.loop.method.evaluated)}

    def _restore(self, checkpoint: Checkpoint) -> None:
        state: Mapping[str, Any] = checkpoint.state
        self.step, self.facts = checkpoint.step, {**self.facts, **state}
        self._on_disk = self._saved_at = checkpoint.step
        for name in ("fingerprint", "config"):
            self.facts.pop(name, None)
        if "input" not in self.facts:
            # the first version trained on the same scale, but evaluated photographs on another
            self.facts |= {**self._judged_before_training(), "best_knn": None}
            self._say(
                f"Checkpoint {checkpoint.path.name} does not say what its network is fed, so it was judged by an earlier "
                "version; baselines are judged anew, and the best accuracy from here on."
            )
        trained = NetworkInput.from_facts(self.facts["input"])
        if trained != self.fed:
            raise PretrainError(
                f"checkpoint {checkpoint.path} is of a network fed with {trained} but the configuration asks for {self.fed}."
            )
        self.loop.restore(checkpoint)
