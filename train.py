"""The whole loop: SFT on worked solutions, then rounds of tree search and training on the trees, then the table of answers.

    python train.py                                    built-in questions, a tiny model from scratch
    python train.py --model DIR --data FILE.jsonl      a real checkpoint on real questions
    torchrun --nproc-per-node 8 train.py ...           each rank searches its share; training shards the model (FSDP2)

A run folder holds config.json, log.jsonl (one line an optimizer step) and a folder a stage (sft, round1, ...) with the
model in Hugging Face's layout, its trees and its eval.json. The same command, run again, goes on where it was: what is
random depends on the seed and the step alone, so an interrupted run ends with the weights of an uninterrupted one.
"""
import gc
import math
import os
import random
import shutil
import sys
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data import SourceConfig, StepTokenizer, find_folder, find_source, parse_args, read_template, read_trees, resume_trees, \
    run_command, solution_tree, task_tokenizer, write_trees
from eval import AnswerConfig, answer_questions, grow_groups, grow_judged, passes, rescore, score, sibling_accuracy
from mcts import SearchConfig, search_trees
from model import Llama, LlamaConfig, load_model, save_model
from support.checkpoints import Stop, forget, load_checkpoint, save_checkpoint, write_model
from support.files import read_json, settle, write_json
from support.plan import print_plan, shape_of
from support.ranks import gather, join_ranks, once, share
from support.reference import add_reference
from support.reports import describe, log_step, open_board, print_table, progress, warn_saturated
from support.run_folder import check_flags, check_lengths, open_run
from support.tree_files import check_tokens
from svpo import COUNTED, COUNTS, OBJECTIVES, Batch, InputError, Lesson, LossConfig, Tree, TreeNode, flag, learn, loss_sums, \
    total_loss
from tasks.questions import load_splits

STRATEGIES = ("greedy", "sampled", "beam:1,5", "beam:3,5")
TINY = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.05)
DROPOUT = 0.1  # of the value head's input (AlphaMath official code)


@dataclass(frozen=True)
class RunConfig(SourceConfig):
    """What to train on, and where to write."""
    model: str = flag("tiny", "tiny (from scratch, built-in task only), a folder, a preset or a repository id")
    data: str = flag("arithmetic", "arithmetic or deduction (built in), or benchmarks and JSONL files of training questions", many=True)
    limit: int = flag(0, "use the first N questions of a JSONL file, held-out ones included; 0: all", least=0)
    seed: int = flag(0, "seed of weights, questions, sampling and data order")
    train_prompt: str = flag("", "prompt to train, answer, and search a trained model under; --prompt is then for the "
                                 "untrained one")
    test_data: str = flag("", "test questions; empty: the last fifth of --data is held out", many=True)
    test_limit: int = flag(500, "answer at most N test questions", least=1)
    sft_questions: int = flag(7000, "built-in task: worked solutions", least=1)
    search_questions: int = flag(4500, "built-in task: new questions a round, with answers only", least=1)
    valid_questions: int = flag(300, "built-in task: questions searched only to measure sibling accuracy", least=1)
    rounds: int = flag(1, "rounds of search and training; AlphaMath: 3", built_in=2, least=0)
    out: str = flag("", "run folder; empty: runs/DATA-seedN")
    plan: bool = flag(False, "print what each phase takes on 1 to 64 GPUs, from the model's shape alone, and end")


@dataclass(frozen=True)
class TrainConfig:
    """The optimizer. AlphaMath: lr 4e-5, cosine, warm-up 3 %, batch 1024, 10 epochs."""
    sft_steps: int = flag(0, "optimizer steps on worked solutions; 0: start from the model as it is", built_in=2000, least=0)
    sft_batch: int = flag(16, "solutions a step", built_in=32, least=1)
    sft_lr: float = flag(2e-5, "peak learning rate of SFT", built_in=3e-3, least=0)
    tune_epochs: int = flag(2, "passes over a round's trees", least=1)
    tune_batch: int = flag(4, "trees a step, over all ranks", built_in=8, least=1)
    tune_lr: float = flag(1e-5, "peak learning rate on trees", built_in=5e-4, least=0)
    group: int = flag(8, "grpo: solutions sampled of each question (G)", least=2)
    row_tokens: int = flag(0, "pack trees into rows of this many tokens; 0: of the largest tree", built_in=256, least=0)
    pack_tokens: int = flag(0, "tokens of one forward and backward pass, whole trees; 0: a rank's share of the step", least=0)
    recompute: bool = flag(False, "keep only the blocks' inputs for the backward pass (activation checkpointing)")
    save_every: int = flag(200, "optimizer steps between checkpoints", least=1)
    tensorboard: bool = flag(False, "write the log to RUN/tensorboard, too (pip install tensorboard)")
    keep: int = flag(1, "checkpoints of a stage that stay until it ends", least=1)
    warmup: float = flag(0.03, "share of the steps with rising learning rate; cosine decay follows", least=0)
    weight_decay: float = flag(0.01, "AdamW's", least=0)
    clip: float = flag(1.0, "largest gradient norm; 0: any", least=0)


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    real = ["--data", "gsm8k"] if {"--plan", "--model"} <= set(argv) and "--data" not in argv else []  # to plan for a real model
    stages = parse_args(__doc__, (RunConfig, TrainConfig, SearchConfig, LossConfig, AnswerConfig), [*argv, *real])
    run, train, search, losses, _ = stages
    check_flags(run, train, losses)
    if run.plan:
        shape = LlamaConfig(task_tokenizer(run.data).get_vocab_size(), **TINY) if run.model == "tiny" else shape_of(run.model)
        return print_plan(shape, *stages)
    device, splits = join_ranks(run), load_splits(run)
    job = Job(*stages, device, *check_splits(run, train, search, splits))
    folder = Path(run.out or f"runs/{'-'.join(Path(name).stem for name in run.data.split())}-seed{run.seed}")
    open_run(folder, stages, splits)
    previous, rows, first = start_folder(run, job.tokenizer, folder), [], "sft" if train.sft_steps else "start"
    for number in range(run.rounds + 1):
        stage = folder / (f"round{number}" if number else first)
        stage.mkdir(exist_ok=True)
        if stage.name != "start":  # the start is the model as it was given
            if not (stage / "config.json").exists():
                train_stage(job, previous, stage, splits, number)
            once(lambda: [shutil.rmtree(path) for path in stage.glob("checkpoint*")])
            previous = stage
        rows.append(evaluate(job, splits, previous, stage, folder / first))
        print_table(rows[-1:], f"after {stage.name}")
    print_table(rows, f"{folder}: {rows[0]['answers'][0]['questions']} unseen questions, seed {run.seed}; accuracy in %")
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------- setting up

@dataclass(frozen=True)
class Job:
    """The configuration, where to compute, and the tokenizers with the prompts to search and to train under."""
    run: RunConfig
    train: TrainConfig
    search: SearchConfig
    losses: LossConfig
    answering: AnswerConfig
    device: str
    tokenizer: StepTokenizer
    plain: StepTokenizer

    def load(self, folder: Path, dtype: str = "") -> Llama:
        """A whole copy of a model, in the type to compute in or `dtype`; those that nobody holds any more go first."""
        gc.collect()
        torch.cuda.empty_cache()
        return load_model(folder, self.device, getattr(torch, dtype or self.run.dtype), self.run.seed)


def check_splits(run: RunConfig, train: TrainConfig, search: SearchConfig, splits: dict) -> tuple[StepTokenizer, StepTokenizer]:
    """The tokenizers of a Job. What does not fit, SFT without solutions and a checkpoint that does not load are refused:
    nothing is written yet."""
    if run.model == "tiny":
        tokenizer = StepTokenizer(task_tokenizer(run.data), [0], read_template(run.prompt))
        context = TINY["max_position_embeddings"]
    else:
        folder, tokenizer = find_source(run)
        context = load_model(folder, "meta").config.max_position_embeddings
    plain = tokenizer.under(run.train_prompt)
    check_lengths(tokenizer, plain, context, train, search, splits)
    return tokenizer, plain


def start_folder(run: RunConfig, tokenizer: StepTokenizer, folder: Path) -> Path:
    """The folder of the model to start from; the tiny one is drawn and written first."""
    start = folder / "start"

    def write():
        if (start / "config.json").exists():
            return
        start.mkdir(exist_ok=True)
        tokenizer.tokenizer.save(str(start / "tokenizer.json"))
        settle(start / "tokenizer.json")
        (start / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}\n')
        config = LlamaConfig(vocab_size=tokenizer.tokenizer.get_vocab_size(), eos_token_id=0, **TINY)
        save_model(Llama(config).init_weights(run.seed), start)
    if run.model != "tiny":
        return find_folder(run.model)
    once(write)
    return start


# --------------------------------------------------------------------------------------------- training

def train_stage(job: Job, previous: Path, stage: Path, splits: dict, number: int):
    """Train the model in `previous` on the stage's data, and write it to `stage`."""
    run, train, losses = job.run, job.train, job.losses
    batch, lr, trees = train.tune_batch, train.tune_lr, []
    if number == 0:
        batch, lr, losses = train.sft_batch, train.sft_lr, LossConfig("sft", sft_weight=1.0)
        trees = [solution_tree(question, job.plain) for question in splits["sft"]]
    elif losses.objective != "grpo":
        trees = grow_trees(job, previous, stage, splits["search"][number - 1], number)
    lessons = [lesson for lesson in (learn(tree, losses) for tree in trees) if len(lesson.tree.nodes) > 1]
    if trees and not lessons:
        raise InputError(f"{stage.name}: no tree has a step that --objective {losses.objective} learns from")
    items = lessons or splits["search"][number - 1]
    steps = max(1, train.tune_epochs * len(items) // batch) if number else train.sft_steps
    model = job.load(previous, "float32")  # whatever it computes in
    for block in model.model.layers:
        block.recompute = train.recompute
    shard(model, run.dtype)

    def lessons_of(step: int) -> list[tuple[int, Lesson]]:
        """This rank's share of a step's lessons, with their places in the step."""
        mine = share(list(enumerate(order(len(items), run.seed + number, step * batch, batch))))
        if lessons:
            return [(place, lessons[index]) for place, index in mine]
        questions = [replace(items[index], id=f"{step} {place}") for place, index in mine]  # a question may come twice
        groups = grow_groups(whole(model, run.dtype), job.plain, questions, job.search, train.group, run.seed + number)
        return [(place, learn(tree, losses)) for (place, _), tree in zip(mine, groups)]
    with Stop() as stop:  # a request to stop waits for the end of the step, or for the model to be written
        optimize(model, steps, lr, lessons_of, losses, train, run.seed + number, stage, stop)
        write_model(model, previous, stage)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear over the first `warmup` of the steps, then a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    return min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * max(0, step - rising) / max(1, steps - rising))))


def order(count: int, seed: int, start: int, batch: int) -> list[int]:
    """Places `start` to `start + batch` in the endless row of shuffled passes over `count` items."""
    passes = {number: random.Random(f"{seed} {number}").sample(range(count), count)
              for number in range(start // count, (start + batch - 1) // count + 1)}
    return [passes[number // count][number % count] for number in range(start, start + batch)]


def shard(model: Llama, dtype: str):
    """FSDP2, a block at a time: float32 weights in shards, computing in `dtype`, gradients summed in float32. Without a
    process group (one process, float32) there is nothing to do."""
    if not dist.is_initialized():
        return
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def whole(model: Llama, dtype: str) -> Llama:
    """The model itself, or an unsharded copy of it in the type that it computes in."""
    if not dist.is_initialized():
        return model
    with torch.device("meta"):
        copy = Llama(model.config)
    state = {name: parameter.detach().to(getattr(torch, dtype)).full_tensor() for name, parameter in model.named_parameters()}
    copy.load_state_dict(state, assign=True)
    return copy


def optimize(model: Llama, steps: int, lr: float, lessons_of, losses: LossConfig, train: TrainConfig, seed: int, stage: Path,
             stop: Stop | None = None):
    """AdamW over `steps` steps, from the stage's last checkpoint on. `lessons_of(step)`: this rank's (place, lesson) pairs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=train.weight_decay, fused=True)
    first = load_checkpoint(stage, model, optimizer)
    once(lambda: forget(stage, first))
    board = open_board(stage.parent) if train.tensorboard and not int(os.environ.get("RANK", 0)) else None
    with progress(range(first, steps), stage.name, steps, "step", first) as bar:
        for step in bar:
            begin = time.perf_counter()
            figures, counts = backward(model, lessons_of(step), losses, train, seed, step)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip or math.inf)
            figures["grad_norm"] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
            if not math.isfinite(figures["loss"] + figures["grad_norm"]):
                raise InputError(f"{stage.name}, step {step}: the loss is {figures['loss']}, its gradient norm "
                                 f"{figures['grad_norm']}; the last checkpoint is kept; start again with another --out and a lower "
                                 "learning rate")
            for group in optimizer.param_groups:
                group["lr"] = figures["lr"] = lr * schedule(step, steps, train.warmup)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - begin
            figures |= {"pairs": counts["pairs"]}
            figures |= {f"{name}_s": counts[name] / seconds for name in ("unique_tokens", "pairwise_tokens")}
            log_step(bar, board, stage, step, figures)
            stopped = stop.asked() if stop else 0
            if stopped or (step + 1) % train.save_every == 0 and step + 1 < steps:
                save_checkpoint(stage, model, optimizer, step + 1, train.keep)
            if stopped:
                raise KeyboardInterrupt(stopped)


def backward(model: Llama, mine: list[tuple[int, Lesson]], losses: LossConfig, train: TrainConfig, seed: int, step: int):
    """Gradients of one step: every sum is divided by its count over all passes and ranks. Returns (figures, counts)."""
    device = next(model.parameters()).device
    groups = [[mine[index] for index in group] for group in passes([lesson.tree for _, lesson in mine], train.pack_tokens)]
    batches = [Batch([lesson for _, lesson in group], train.row_tokens, device) for group in groups]
    counts = sum((batch.counts for batch in batches), torch.zeros(len(COUNTS), dtype=torch.float64))
    most, ranks = torch.tensor(len(groups)), 1
    if dist.is_initialized():
        ranks = dist.get_world_size()
        dist.all_reduce(counts)
        dist.all_reduce(most, dist.ReduceOp.MAX)
    totals = torch.zeros(len(COUNTED) + 1, dtype=torch.float64)
    for _ in range(len(groups), int(most)):  # others have more passes, and FSDP's are common ones
        groups.append([(0, Lesson(Tree("", "", "", [TreeNode(-1, [0], [False])]), [], [(0.0, 0.0)], [False]))])
        batches.append(Batch([groups[-1][0][1]], device=device))
    for group, batch in zip(groups, batches):
        dropout_ED = None
        if OBJECTIVES[losses.objective].value:  # the same for a tree wherever it is computed
            seeds = [zlib.crc32(f"{seed} {step} {place}".encode()) for place, _ in group]
            uniform = [torch.rand(len(lesson.tree.nodes), model.config.hidden_size, generator=torch.Generator().manual_seed(own))
                       for own, (_, lesson) in zip(seeds, group)]
            dropout_ED = torch.cat(uniform).ge(DROPOUT).to(device) / (1 - DROPOUT)
        sums = loss_sums(*score(model, batch.packed, batch.needed_E, dropout_ED), batch, losses)
        loss = total_loss(sums, counts, losses)
        (loss * ranks).backward()  # FSDP takes the mean over ranks
        totals += torch.stack([loss.detach(), *(sums[name].detach() for name in COUNTED)]).cpu()
    if dist.is_initialized():
        dist.all_reduce(totals)
    figures = {name: total / counts[COUNTED[name]] for name, total in zip(COUNTED, totals[1:]) if counts[COUNTED[name]]}
    return {name: float(value) for name, value in ({"loss": totals[0]} | figures).items()}, dict(zip(COUNTS, counts.tolist()))


# --------------------------------------------------------------------------------------------- trees and measuring

def grow_trees(job: Job, previous: Path, stage: Path, questions: list, number: int) -> list[Tree]:
    """Search the round's questions, each rank its share; each tree is written as it ends, and questions that have one are
    not searched again. Their log-probabilities are replaced by those of one pass with the policy that grew them."""
    model, rank, ranks = job.load(previous), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found = resume_trees(stage / "trees.jsonl", rank, ranks)
    check_tokens(found, model.config.vocab_size, stage)
    done = {tree.id for tree in found}
    once(lambda: None)  # all have read, before anybody writes
    left = share(question for question in questions if question.id not in done)
    prompted = job.plain if number > 1 or job.train.sft_steps else job.tokenizer  # once the policy is trained, under its prompt
    new = search_trees(model, prompted, left, job.search, job.run.seed + number, f"{stage.name} search")
    write_trees(stage / f"trees-{rank}.jsonl", new)
    once(lambda: None)
    found = {tree.id: tree for tree in resume_trees(stage / "trees.jsonl")}
    trees = [found[question.id] for question in questions]  # in an order that does not depend on the ranks
    describe(trees, job.tokenizer, job.losses)
    trees = [job.plain.set_prompt(tree, question) for tree, question in zip(trees, questions)]
    if OBJECTIVES[job.losses.objective].pairs:
        add_reference(model, trees, stage / "reference.safetensors", job.train.row_tokens, job.train.pack_tokens)
    return trees


def evaluate(job: Job, splits: dict, source: Path, stage: Path, first: Path) -> dict:
    """The stage's row of the table, from its eval.json where that exists; `source` holds its model. Sibling accuracy is
    measured on validation trees that its own policy grew, and on those of the `first` stage: the same pairs for all."""
    path = stage / "eval.json"
    if path.exists():
        return read_json(path)
    model = job.load(source)
    answers = [answer_questions(model, job.plain, splits["test"], strategy, job.search, job.answering, job.run.seed)
               for strategy in STRATEGIES]
    row = {"stage": stage.name, "answers": answers}
    if splits["valid"]:
        mine, label = share(splits["valid"]), f"{stage.name} sibling accuracy"
        trees = gather(grow_judged(model, job.plain, mine, job.search, job.run.seed, label))
        warn_saturated(stage.name, trees)
        if stage == first:
            once(lambda: write_trees(first / "valid-trees.jsonl", trees, "w"))
        row["siblings"] = sibling_accuracy(trees)
        row["siblings_fixed"] = sibling_accuracy(rescore(model, read_trees(first / "valid-trees.jsonl")))
    once(lambda: write_json(path, row))
    return row


if __name__ == "__main__":
    run_command(main)
