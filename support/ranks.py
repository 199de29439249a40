"""Several processes at work on one thing: joining, sharing and gathering."""
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def device_of(source) -> str:
    """Where this rank computes, of a data.SourceConfig."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if source.device == "cuda" else source.device


def join_ranks(source) -> str:
    """Join the other ranks where FSDP is needed: with several of them, or to compute in bfloat16. Returns the device."""
    device = device_of(source)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    single = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if not single or source.dtype != "float32":  # one rank may search for days longer than another
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=30), **single)
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")
    return device


def share(items) -> list:
    """This rank's share; all, with one process."""
    return list(items)[dist.get_rank()::dist.get_world_size()] if dist.is_initialized() else list(items)


def gather(mine: list) -> list:
    """The lists of all ranks in one."""
    if not dist.is_initialized():
        return mine
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def once(action):
    """Rank 0 does it, all wait."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        action()
    if dist.is_initialized():
        dist.barrier()
