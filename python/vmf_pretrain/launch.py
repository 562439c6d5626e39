"""What the launcher of many ranks says in the environment, read without torch; and one voice for all of them.

torchrun's variables are read, or SLURM's. One process alone has none of them.
"""

import datetime
import hashlib
import os

STORE_TIMEOUT = datetime.timedelta(seconds=3)


def rank() -> int:
    """This process's place among the ranks, from 0."""
    return int(os.environ.get("RANK") or (os.environ.get("SLURM_PROCID", "0") if _srun() else "0"))


def many_ranks() -> bool:
    """Whether there is more than one rank."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or _srun()


def restarted() -> bool:
    """Whether torchrun has started this process again after a rank was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def first_to_say(sentence: str) -> bool:
    """Whether no other rank has said a sentence yet; true where the ranks cannot be asked, so that nothing is lost."""
    from torch.distributed import TCPStore

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"vmf_pretrain/said/{attempt}/{hashlib.sha256(sentence.encode()).hexdigest()}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)
        return bool(store.add(key, 1) == 1)
    except (KeyError, ValueError, RuntimeError):  # torch's errors of the store are RuntimeErrors
        return True


def _srun() -> bool:
    return (
        int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        and "SLURM_PROCID" in os.environ
        and "RANK" not in os.environ
    )
