"""Steps without a finite loss and gradient: they are skipped, written down, and end the run if they do not stop."""

from collections.abc import Callable

from vmf_pretrain.engine.loss_scale import HALVINGS
from vmf_pretrain.engine.votes import AgreedError, Taken
from vmf_pretrain.networks import ranks


class Skipping:
    """Counts skipped steps in a row; the same on every rank.

    Args:
        write: appends a record to the run's list of skipped steps, on the first rank.
        say: takes a sentence for a person, on the first rank.
        name: what the data set calls an image.
        most: how many in a row end the run.
        scaled: whether the loss is scaled (fp16): then a gradient alone that is not finite is a matter of the scale.
    """

    def __init__(
        self,
        write: Callable[[dict[str, object]], None],
        say: Callable[[str], None],
        name: Callable[[int], str],
        most: int,
        *,
        scaled: bool,
    ) -> None:
        self._write, self._say, self._name, self._most, self._scaled = write, say, name, most, scaled
        self.row = 0

    def learn(self, taken: Taken) -> None:
        """Take note of a step.

        Raises:
            AgreedError: it is the last one of too many in a row.
        """
        counts = taken.counts
        if not counts.not_finite:
            self.row = 0
            return
        self.row += 1
        what = "loss" if counts.bad_losses else "gradient"
        most = self._most
        if self._scaled and not counts.bad_losses:
            most += HALVINGS  # the scale may be too large as often as that
            if self.row <= HALVINGS:
                return
        images = ranks.gathered([self._name(index) for index in taken.indices])
        self._write({"step": taken.step, "what": what, "images": images})
        self._say(
            f"Step {taken.step} is skipped on all ranks: its {what} is not finite; skipped_steps.jsonl lists its images."
        )
        if self.row >= most:
            raise AgreedError(
                f"the {what} is not finite at step {taken.step}, the last of {self.row} such steps in a row; no weight has "
                "been changed by them, and the images are listed in skipped_steps.jsonl. Lower optim.learning_rate or set "
                "train.precision to fp32, and go on from the last checkpoint with --resume."
            )
