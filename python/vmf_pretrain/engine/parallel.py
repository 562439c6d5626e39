"""Devices and ranks: where a rank computes, how ranks find each other, and how a method's gradients meet.

torchrun's environment is read, and SLURM's if torchrun did not set one; no other launcher is needed.
"""

import contextlib
import datetime
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.methods.method import Method, Place
from vmf_pretrain.networks import ranks
from vmf_pretrain.networks.batch_norm import synchronise

TIMEOUT = datetime.timedelta(
    hours=4
)  # the first rank may evaluate meanwhile; torchrun ends the others of a rank that dies
SLURM_PORT = 29400  # plus the job's number modulo 1000
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set, from SLURM's variables; empty without them, or if ``srun`` started a single task."""
    # a script of sbatch has SLURM_NTASKS without srun; only srun's tasks have the number of their step
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or int(tasks) < 2 or "SLURM_PROCID" not in environment:
        return {}
    job = int(environment.get("SLURM_JOB_ID", "0"))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(SLURM_PORT + job % 1000),
    }


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes, such as ``gpu[003-005,9],login1``."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return nodes.split(",")[0]
    return head + rest.split("]")[0].split(",")[0].split("-")[0]


def choose_device(wanted: str) -> torch.device:
    """This rank's device.

    Args:
        wanted: "auto", "cpu" or "cuda".

    Raises:
        PretrainError: a GPU is asked for and there is none, or fewer than ranks on this machine.
    """
    there = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not there):
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if there and torch.cuda.device_count() == 1 and "SLURM_LOCALID" in os.environ:
        local = 0  # --gpus-per-task shows each task its own GPU only
    if not there or local >= torch.cuda.device_count():
        found = torch.cuda.device_count() if there else 0
        raise PretrainError(f"device {wanted} cannot be used here: rank {local} of this machine finds {found} GPUs.")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextlib.contextmanager
def process_group(wanted: str) -> Iterator[None]:
    """Joins the ranks of the environment, if there are any and nobody has yet; leaves them at the end.

    Args:
        wanted: the device, as for ``choose_device``: by it follows the library by which the ranks speak.

    Raises:
        PretrainError: the ranks do not find each other.
    """
    os.environ.update(slurm_environment(os.environ))  # first: the device follows from the rank
    device = choose_device(wanted)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or torch.distributed.is_initialized():
        yield
        return
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        raise PretrainError(
            f"WORLD_SIZE is set but {', '.join(missing)} is not; start the ranks with torchrun or srun."
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        torch.distributed.init_process_group(backend, timeout=TIMEOUT, **_meeting(os.environ))
    except (RuntimeError, ValueError) as error:
        raise PretrainError(f"the ranks cannot meet ({backend}): {' '.join(str(error).split())}.") from None
    try:
        yield
        torch.distributed.barrier()  # gloo aborts if a rank leaves while another one still sends
    finally:
        torch.distributed.destroy_process_group()


def _meeting(environment: Mapping[str, str]) -> dict[str, Any]:
    """Where the ranks leave their addresses; after a restart by torchrun another place than before.

    torch alone would find the addresses of the ranks that have ended: its store stays with the launcher (2.13).
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, world, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    store = TCPStore(environment["MASTER_ADDR"], port, world, is_master=False, timeout=TIMEOUT)
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefixed = PrefixStore(f"vmf_pretrain/attempt {attempt}", store)
    return {"store": prefixed, "rank": rank, "world_size": world}


class Wrapped:
    """A method whose gradients are averaged over the ranks: itself, or what wraps it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def sharded(self) -> bool:
        """Whether each rank has a part of the parameters."""
        return any(isinstance(parameter, DTensor) for parameter in self.module.parameters())

    def __call__(self, batch: Batch, place: Place) -> dict[str, Tensor]:
        """The method's losses."""
        losses: dict[str, Tensor] = self.module(batch, place)
        return losses

    def backward(self, loss: Tensor) -> None:
        """The gradient of the loss of all ranks' images."""
        torch.autograd.backward(loss)


def wrap(method: Method, config: Config, device: torch.device) -> Wrapped:
    """The method as the ranks run it: itself, under DDP, or sharded."""
    if config.train.compile:
        compile_blocks(method)
    if not ranks.grouped():
        return Wrapped(method)
    synchronise(method)
    if config.train.parallel == "fsdp":
        from vmf_pretrain.engine.sharded import shard

        shard(method, device)
        return Wrapped(method)
    options: dict[str, Any] = {"device_ids": [device.index]} if device.type == "cuda" else {}
    # buffers are the same on all ranks without help: centres and batch statistics are those of all ranks' rows
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options["forward_sync_buffers" if newer else "broadcast_buffers"] = False
    return Wrapped(DistributedDataParallel(method, gradient_as_bucket_view=True, **options))


def compile_blocks(method: Method) -> None:
    """Compile every block of every vision transformer in the method, in place: names in state dicts stay."""
    from timm.models.vision_transformer import VisionTransformer

    for part in method.modules():
        if isinstance(part, VisionTransformer):
            for block in part.blocks:
                block.compile()
