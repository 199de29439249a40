"""How much memory there is, and how much of it a search takes."""

import ctypes
import os
import sys
from pathlib import Path

import torch

KEPT_FREE = 0.1  # of the memory of a GPU that is free: fragments, and what kernels work with
# of the memory of the host that is free, over all ranks of the host; the rest is for what the plan
# does not count, such as the keys that path attention gathers
HOST_SHARE = 0.5


def cached_token(config, width: int) -> int:
    """Bytes of the keys and values of a token; `width` is the bytes of a number."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width


def search_bytes(config, width: int, tokens: int, lanes: int) -> int:
    """Bytes that one search takes: `tokens` of the cache, and sampling in `lanes` lanes.

    Sampling holds logits in the model's type, and four vectors as long in float32. `config` is a
    model.LlamaConfig.
    """
    hidden = (2 * config.intermediate_size + 4 * config.hidden_size) * width
    lane = config.vocab_size * (width + 16) + hidden
    return tokens * cached_token(config, width) + lanes * lane


def rows_that_fit(most: int, tokens: int, size: int, free: float, cache_tokens: int) -> int:
    """How many searches fit at once, at most `most`.

    Each takes `tokens` of the cache, which holds `cache_tokens`, or, if these are 0, `size` of the
    `free` bytes.
    """
    return min(most, cache_tokens // tokens if cache_tokens else int(max(0, free) // size))


def free_memory(device: torch.device) -> float:
    """Bytes that a rank may use on a device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + held) * (1 - KEPT_FREE)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return host_memory() * HOST_SHARE / ranks


def c_library() -> ctypes.CDLL | None:
    """The GNU C library of this process, if that is what it runs on."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


def keep_freed_memory():
    """Keep memory that is freed for the next tensor, up to 2 GB a piece.

    Otherwise the system takes it back and fills it with zeros again: a fifth of a training step of
    SmolLM2-135M on two cores. `host_memory` gives it back before it counts what is free.
    """
    library = c_library()
    # M_MMAP_THRESHOLD (older versions allow 32 MB at most), M_TRIM_THRESHOLD
    if library and (library.mallopt(-3, 2**31 - 1) or library.mallopt(-3, 2**25)):
        library.mallopt(-1, 2**31 - 1)


def host_memory() -> int:
    """Bytes of the host's memory that are free; its size where Linux does not say."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    library = c_library()
    if library:
        library.malloc_trim(0)  # what `keep_freed_memory` keeps is free
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    free = 1024 * int(lines["MemAvailable"].split()[0])
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
