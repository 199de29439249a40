"""The reference of step-DPO: log-probabilities of the policy that grew the trees, kept in a file with a fingerprint of both."""
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eval import rescore
from model import Llama
from support.files import publish
from support.flags import InputError
from support.ranks import gather, once, share
from svpo import Tree


def add_reference(model: Llama, trees: list[Tree], path: Path, *sizes: int):
    """Set the nodes' log-probabilities to the policy's, before it is trained: from the file that keeps them, or by one pass."""
    weights, steps = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        weights.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for tree in trees:
        steps.update(json.dumps([tree.id, [(node.parent, node.tokens) for node in tree.nodes]]).encode())
    marks = {"weights": weights.hexdigest(), "trees": steps.hexdigest()}
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                stored, logp = file.metadata() or {}, file.get_tensor("logp").tolist()
        except SafetensorError as error:
            raise InputError(f"{path}: not readable ({error}); delete it to have it computed again")
        for name, mark in marks.items():
            if stored.get(name) != mark:
                raise InputError(f"{path} is of other {name} ({stored.get(name)}, not {mark}); delete it to have it computed again")
    else:
        scored = zip(share(range(len(trees))), rescore(model, share(trees), *sizes))
        logp = [value for _, values in sorted(gather([(index, [node.logp for node in tree.nodes]) for index, tree in scored])) for value in values]
        once(lambda: publish(path, lambda aside: save_file({"logp": torch.tensor(logp)}, aside, marks)))
    for node, value in zip([node for tree in trees for node in tree.nodes], logp):
        node.logp = value
