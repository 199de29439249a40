"""Several processes at work on one thing: who this one is, joining, sharing and gathering."""

import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

from support.memory import keep_freed_memory


def rank() -> int:
    """The number of this process, as torchrun gives it; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def barrier():
    """Wait for the other ranks, if this process has joined any."""
    if dist.is_initialized():
        dist.barrier()


def on_rank_0(action: Callable[[], object]):
    """Let rank 0 do something while the others wait for it."""
    if not dist.is_initialized() or rank() == 0:
        action()
    barrier()


def use_device(source) -> str:
    """Choose this rank's device, of which `source` has the field `device` of a command line.

    A CUDA device becomes the current one: streams and graphs are made on that.
    """
    device = source.device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    return device


def join_ranks(source) -> str:
    """Join the other ranks that torchrun has started, if any; returns this rank's device.

    `source` has the field `device` of a command line.
    """
    device = use_device(source)
    if "WORLD_SIZE" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        # one rank may search for days longer than another
        dist.init_process_group(backend, timeout=timedelta(days=30))
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def leave_ranks():
    """End what `join_ranks` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_share(items: Iterable) -> list:
    """Every world_size-th item, from this rank's number on; all items without other ranks."""
    return list(items)[rank() :: world_size()] if dist.is_initialized() else list(items)


def gather(mine: list) -> list:
    """The lists of all ranks, joined in the order of the ranks."""
    if not dist.is_initialized():
        return mine
    parts = [None] * world_size()
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]
