"""A cache of huggingface-hub that is made by hand, for tests without a network."""

import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(root: Path, repository: str, folder: Path) -> Path:
    """Lay out the files of `folder` as the cached snapshot of a repository; returns the snapshot.

    `root` is what HF_HUB_CACHE names. With HF_HUB_OFFLINE=1 the repository is found there.
    """
    place = root / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, place / "snapshots" / COMMIT))
