"""What to change in a run that has gone wrong: by its settings, one thing a sentence. No torch is needed."""

from vmf_pretrain.config.method import ONE_TEMPERATURE
from vmf_pretrain.config.run import Config

SLOW_CENTRE = 0.99  # momentum above which a centre hardly moves within the steps that a collapse takes
PUBLISHED_CENTRE = 0.9
SHARP = 0.8  # of the student's temperature: a teacher's above this does not sharpen
PUBLISHED_RATIO = 0.4  # of the teacher's temperature to the student's: 0.04 to 0.1
SOME_KOLEO = 0.1  # DINOv2's weight
SLOW_TEACHER = 0.99  # least momentum of a teacher in published recipes for short runs


def against_one_hot(config: Config) -> tuple[str, ...]:
    """All images share one prototype: the centre has to pull the others up."""
    loss, found = config.loss, []
    if loss.center_momentum > SLOW_CENTRE and loss.centering != "sinkhorn_knopp":
        found.append(
            f"lower loss.center_momentum to {PUBLISHED_CENTRE} (it is {loss.center_momentum:g}, so the centre hardly moves)"
        )
    found.append(f"raise loss.teacher_temp (it is {loss.teacher_temp:g}), which softens the teacher")
    if loss.center_start == "zero" and loss.centering != "sinkhorn_knopp":
        found.append('set loss.center_start to "first_batch"')
    return (*found, *_koleo(config))


def against_uniform(config: Config) -> tuple[str, ...]:
    """All images get all prototypes: the teacher has to be sharper than the student."""
    loss, found = config.loss, []
    sharp = PUBLISHED_RATIO * loss.student_temp
    if max(loss.teacher_temp, loss.warmup_teacher_temp) > SHARP * loss.student_temp:
        found.append(
            f"lower loss.teacher_temp and loss.warmup_teacher_temp to {sharp:g} "
            f"(the teacher's {loss.teacher_temp:g} does not sharpen, as loss.student_temp is {loss.student_temp:g})"
        )
    else:
        found.append(f"lower loss.teacher_temp (it is {loss.teacher_temp:g})")
    if loss.center_start == "zero" and loss.centering != "sinkhorn_knopp":
        found.append('set loss.center_start to "first_batch"')
    return (*found, f"lower optim.learning_rate (it is {peak(config):g})", *_koleo(config))


def against_patches(config: Config, form: str) -> tuple[str, ...]:
    """The masked patches' head has collapsed alone: "one-hot", "uniform", or to one distribution of any other form."""
    loss, found = config.loss, []
    own = config.method not in ONE_TEMPERATURE
    name, temperature = ("patch_teacher_temp", loss.patch_teacher_temp) if own else ("teacher_temp", loss.teacher_temp)
    if form != "uniform" and loss.patch_center_momentum > SLOW_CENTRE and loss.centering != "sinkhorn_knopp":
        slow = f"it is {loss.patch_center_momentum:g}, so the patches' centre hardly moves"
        found.append(f"lower loss.patch_center_momentum to {PUBLISHED_CENTRE} ({slow})")
    if form == "one-hot":
        found.append(f"raise loss.{name} (it is {temperature:g}), which softens the teacher")
    else:
        first = f" and loss.warmup_{name} to {PUBLISHED_RATIO * loss.student_temp:g}"
        flat = temperature > SHARP * loss.student_temp
        found.append(f"lower loss.{name}{first if flat else ''} (it is {temperature:g})")
    if loss.center_start == "zero" and loss.centering != "sinkhorn_knopp":
        found.append('set loss.center_start to "first_batch"')
    return (*found, f"lower loss.patch_weight (it is {loss.patch_weight:g})")


def against_low_rank(config: Config, *, spreads: bool) -> tuple[str, ...]:
    """Features lie in few directions; ``spreads``: whether the method has KoLeo, which holds them apart."""
    decay = f"lower optim.final_weight_decay (it is {config.optim.final_weight_decay:g})"
    rate = f"lower optim.learning_rate (it is {peak(config):g})"
    return (*(_koleo(config) if spreads else ()), rate, decay)


def against_constant(config: Config) -> tuple[str, ...]:
    """A predictor says the same of everything."""
    optim, found = config.optim, []
    if optim.teacher_momentum < SLOW_TEACHER:
        found.append(
            f"raise optim.teacher_momentum to {SLOW_TEACHER} or more (it is {optim.teacher_momentum:g}, so the targets "
            "follow the predictor)"
        )
    decays = f"{optim.weight_decay:g} and {optim.final_weight_decay:g}"
    found.append(f"lower optim.weight_decay and optim.final_weight_decay (they are {decays})")
    return (*found, f"lower optim.learning_rate (it is {peak(config):g})")


def against_divergence(config: Config) -> tuple[str, ...]:
    """Steps are too long."""
    optim = config.optim
    found = [f"lower optim.learning_rate to {peak(config) / 3:.2g} (it is {peak(config):.2g})"]
    found.append(f"raise optim.warmup_epochs (it is {optim.warmup_epochs})")
    if optim.clip == 0:
        found.append("set optim.clip to 3, which bounds gradients")
    if config.train.precision == "fp16":
        found.append('set train.precision to "bf16" or "fp32"')
    return tuple(found)


def peak(config: Config) -> float:
    """The peak learning rate of a run."""
    return config.optim.peak(config.data.batch_size)


def _koleo(config: Config) -> tuple[str, ...]:
    if config.loss.koleo_weight > 0:
        return ()
    return (f"set loss.koleo_weight to {SOME_KOLEO}, which holds the features apart",)
