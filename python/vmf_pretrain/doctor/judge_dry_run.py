"""What the doctor says of the steps that it took."""

from vmf_pretrain.config.run import Config
from vmf_pretrain.data.waiting import ADVICE, TOO_MUCH
from vmf_pretrain.doctor.dry_run import DryRun
from vmf_pretrain.doctor.finding import Finding, counted, fine, note, problem, size_text

MOSTLY_WAITING = 0.5  # share of the time
LONG = 72.0  # hours
WEIGHTS = 2  # files of weights: the last and the best
BEING_WRITTEN = 1  # checkpoint beside those that are kept


def judge_dry_run(found: DryRun, config: Config) -> list[Finding]:
    """Speed, waiting, memory and hours."""
    size = (
        f"{found.images} images" if found.images == found.part else f"{found.images} of the run's {found.part} images"
    )
    words = f"{counted(found.steps, 'step')} of {size}: {found.images_per_second:.3g} images/s"
    findings = [fine("speed", words), _waiting(found), _memory(found, config), _hours(found, config)]
    if found.not_finite:
        words = f"the loss or its gradient is not finite in {counted(found.not_finite, 'step')}"
        advice = "lower optim.learning_rate, or set train.precision to bf16 or fp32"
        severe = found.not_finite >= config.train.max_skipped
        findings.append(problem("loss", words, advice) if severe else note("loss", words, advice))
    return findings


def judge_settings(config: Config, cores: int) -> list[Finding]:
    """What the settings ask of the machine."""
    workers = config.data.workers
    if workers > cores:
        words = f"data.workers is {workers}, but there are {cores} cores"
        return [note("workers", words, f"set data.workers to {max(1, cores - 1)} or fewer")]
    return [fine("workers", f"data.workers is {workers}, cores: {cores}")]


def room_needed(found: DryRun, config: Config) -> int:
    """Bytes of what a run has on its disk at once."""
    return (config.train.keep_checkpoints + BEING_WRITTEN) * found.checkpoint + WEIGHTS * found.weights


def _waiting(found: DryRun) -> Finding:
    words = f"{found.data_wait:.0%} of the time is spent waiting for images"
    if found.data_wait > MOSTLY_WAITING:
        advice = f"copy them to a local disk if they are on a slow one; {ADVICE}"
        return note("data", words, advice)
    return note("data", words, ADVICE) if found.data_wait > TOO_MUCH else fine("data", words)


def _memory(found: DryRun, config: Config) -> Finding:
    words = f"{size_text(found.memory)} with {counted(found.images, 'image')}, of {size_text(found.at_hand)} at hand"
    if found.fits is None:
        return fine("memory", f"{words}; more images take hardly more")
    words += f"; about {found.fits:,} fit at once, by steps of {found.fewer} and {found.images}"
    if found.fits >= found.part:
        return fine("memory", words)
    parts = next(n for n in range(1, config.data.batch_size + 1) if _divides(n, found.fits, config))
    advice = f"add --train.accumulate {parts}, which computes the batch in parts and changes no result"
    if found.fits < 1:
        advice = "take a smaller network or smaller views, or --train.activation_checkpointing true"
    return problem("memory", f"{words}, but the run computes {found.part}", advice)


def _divides(parts: int, fits: int, config: Config) -> bool:
    batch = config.data.batch_size
    return batch % parts == 0 and (batch // parts <= max(fits, 1))


def _hours(found: DryRun, config: Config) -> Finding:
    hours = found.hours
    length = f"{hours:,.1f} hours" if hours >= 1 else f"{max(1, round(60 * hours))} minutes"
    words = f"about {length} for {config.train.epochs} epochs at this speed, without evaluations"
    if hours > LONG:
        return note("time", words, "lower train.epochs, or take a recipe for this machine: vmf-pretrain recipes")
    return fine("time", words)
