"""Which settings a run may go on with changed: those that say where and how fast it is computed, not what."""

MAY_CHANGE: frozenset[str] = frozenset(
    {
        "data.folder",  # moved; that its images are the same is checked when the run goes on
        "data.workers",
        "log.tensorboard",
        "train.accumulate",
        "train.activation_checkpointing",
        "train.checkpoint_every",
        "train.compile",
        "train.device",
        "train.keep_checkpoints",
        "train.log_every",
        "train.max_skipped",
        "train.parallel",
    }
)
