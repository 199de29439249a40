"""The whole loop: SFT, then rounds of tree search and training on the trees, then the answers.

    python train.py                                    built-in questions, a tiny model from scratch
    python train.py --model DIR --data FILE.jsonl      a real checkpoint on real questions
    torchrun --nproc-per-node 8 train.py ...           each rank searches its share; FSDP2 trains

A run folder holds config.json, log.jsonl (one line per optimizer step) and a folder for each stage
(sft, round1, ...) with the model in Hugging Face's layout, its trees and its eval.json. Run the
same command again to resume. All randomness depends on the seed and the step alone, so an
interrupted run ends with the weights of one that was not.

Dimension key: E nodes of a pack, M its sampled tokens, D width.
"""

import gc
import math
import random
import re
import sys
import time
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data import (
    RECIPES,
    Question,
    SourceConfig,
    StepTokenizer,
    Tree,
    TreeNode,
    check_reward,
    check_solutions,
    check_token_ids,
    check_trees,
    find_source,
    fitting,
    identity_of,
    load_splits,
    outcome_of,
    rank_files,
    read_template,
    read_trees,
    resume_trees,
    solution_tree,
    write_trees,
)
from engine import Demand, Engine, Node, context_of, reserve
from eval import AnswerConfig, answer_questions, grow_judged, parse_strategy, sibling_accuracy
from mcts import MEMORY_ONLY, SearchConfig, backup, demand_of, search_trees, to_tree
from model import (
    LOGITS,
    Llama,
    LlamaConfig,
    add_lora,
    count_parameters,
    load_model,
    merge_lora,
    read_config,
    save_lora,
    save_model,
    without_lora,
)
from support.checkpoints import (
    Stop,
    find_checkpoints,
    forget,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from support.files import (
    digest,
    head_commit,
    hold,
    is_plain,
    keep_config,
    publish,
    read_json,
    sync,
    write_json,
)
from support.flags import InputError, Recipe, flag, parse_args, run_command, visible
from support.hugging_face import PRESETS, copy_files, find_folder, stored_dtype
from support.memory import free_memory
from support.plan import WIDTH, Searching, Sizes, pack_room, print_plan
from support.progress import log_step, open_board, progress
from support.ranks import (
    barrier,
    gather,
    join_ranks,
    leave_ranks,
    on_rank_0,
    rank,
    rank_share,
    world_size,
)
from support.tables import STAGE, print_stages
from svpo import (
    COUNTS,
    DIVISORS,
    OBJECTIVES,
    Batch,
    Lesson,
    LossConfig,
    add_reference,
    fit_value,
    group_by_tokens,
    learn,
    loss_sums,
    pairs_of,
    rescore,
    score,
    step_logp,
    total_loss,
)
from tasks.built_in import TASKS, is_built_in, task_tokenizer

TABLE = ("greedy", "sampled", "beam:1,5", "beam:3,5")  # the strategies of the table
TINY = {  # the model that is trained from scratch
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
FREE = (  # fields that may change on an existing run: memory, speed, rounding and names
    "out",
    "device",
    "dtype",
    "plan",
    "plan_memory",
    "keep",
    "tensorboard",
    "save_every",
    "recompute",
    "pack_tokens",
    "answer_lanes",
)
PLANNED_PROMPT = 512  # tokens: the longest prompt that a plan counts with
DROPOUT = 0.1  # of the value head's input (AlphaMath official code)


@dataclass(frozen=True)
class RunConfig(SourceConfig):
    """What to train on, and where to write."""

    model: str = flag(
        "tiny", "tiny (from scratch, built-in task only), a folder, a preset or a repository id"
    )
    data: str = flag(
        "arithmetic",
        "arithmetic or deduction (built in), or datasets and JSONL files of training questions",
        many=True,
    )
    limit: int = flag(
        0, "use the first N questions of a JSONL file, held-out ones included; 0: all", least=0
    )
    seed: int = flag(0, "seed of weights, questions, sampling and data order")
    train_prompt: str = flag(
        "",
        "prompt for training, for answering and for searching a trained model; --prompt then "
        "applies to the untrained model only",
    )
    test_data: str = flag(
        "", "test questions; empty: the last fifth of --data is held out", many=True
    )
    test_limit: int = flag(500, "answer at most N test questions", least=1)
    sft_questions: int = flag(7000, "built-in task: worked solutions", least=1)
    search_questions: int = flag(
        4500, "built-in task: new questions per round, with answers only", least=1
    )
    valid_questions: int = flag(
        300, "built-in task: questions searched only to measure sibling accuracy", least=1
    )
    rounds: int = flag(1, "rounds of search and training; AlphaMath: 3", least=0)
    trees: str = flag(
        "",
        "trees of the first round, written by mcts.py with --model or by you (docs/trees.md); only "
        "questions without a tree there are searched",
    )
    save_dtype: str = flag(
        "",
        "type of the weights that each stage writes and the next one reads; empty: that of --model",
        choices=("", "float32", "bfloat16", "float16"),
    )
    out: str = flag("", "run folder; empty: runs/DATA-seedN")
    plan: bool = flag(
        False, "print what each phase takes on 1 to 64 GPUs, from the model's shape alone, and end"
    )
    plan_memory: int = flag(0, "GB of a GPU that --plan is for; 0: of those here, else 80", least=0)


@dataclass(frozen=True)
class TrainConfig:
    """The optimizer. AlphaMath: lr 4e-5, cosine, warm-up 3 %, batch 1024, 10 epochs.

    data.BUILT_IN has the defaults of the built-in tasks.
    """

    sft_steps: int = flag(
        0, "optimizer steps on worked solutions; 0: start from the model as it is", least=0
    )
    sft_epochs: int = flag(
        0, "passes over the worked solutions, where --sft-steps does not say how long", least=0
    )
    sft_batch: int = flag(16, "solutions per step", least=1)
    sft_lr: float = flag(2e-5, "peak learning rate of SFT", least=0)
    tune_epochs: int = flag(2, "passes over a round's trees", least=1)
    tune_batch: int = flag(4, "trees per step, over all ranks", least=1)
    tune_lr: float = flag(1e-5, "peak learning rate on trees", least=0)
    group: int = flag(8, "grpo and lambda-grpo: solutions sampled of each question (G)", least=2)
    fit_value: bool = flag(
        True, "before the first round's first step, put V where least squares puts it"
    )
    lora_rank: int = flag(
        0, "train adapters of this rank on all linear layers (LoRA); 0: all weights", least=0
    )
    pack_tokens: int = flag(
        0,
        "tokens of one forward and backward pass, whole trees; 0: as the free memory allows",
        least=0,
    )
    recompute: bool = flag(
        False, "keep only the blocks' inputs for the backward pass (activation checkpointing)"
    )
    save_every: int = flag(200, "optimizer steps between checkpoints", least=1)
    tensorboard: bool = flag(
        False, "write the log to RUN/tensorboard, too (pip install tensorboard)"
    )
    keep: int = flag(1, "checkpoints to keep while a stage runs", least=1)
    warmup: float = flag(
        0.03, "share of the steps with rising learning rate; cosine decay follows", least=0
    )
    weight_decay: float = flag(0.01, "AdamW's", least=0)
    clip: float = flag(1.0, "largest gradient norm; 0: any", least=0)


BENCHMARKS = Recipe(  # what a real model is trained on unless --data says something else
    "real model",
    {"data": "gsm8k math", "test_data": "gsm8k:test math:test"},
    lambda flags: flags["model"] != "tiny" and flags["data"] == "arithmetic",
)


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    kinds = (RunConfig, TrainConfig, SearchConfig, LossConfig, AnswerConfig)
    configs = parse_args(__doc__, kinds, argv, recipes=(BENCHMARKS, *RECIPES))
    run, train, search, losses, answering = configs
    check_flags(run, train, losses)
    check_reward(search.reward, run.trees)
    if run.plan:
        shape = shape_of(run)
        return print_plan(
            sizes_of(shape, run, train),
            searches_of(shape, [PLANNED_PROMPT], search, answering),
            *(run, train, search, OBJECTIVES[losses.objective].groups),
        )
    device = join_ranks(run)
    if run.model != "tiny":
        print_recipe(configs)
    splits = load_splits(run)
    job = make_job(configs, device, splits)
    data_name = "-".join(Path(name).stem for name in run.data.split())
    folder = Path(run.out or f"runs/{data_name}-seed{run.seed}")
    open_run(folder, configs, job, splits)
    run_stages(job, folder, splits)
    leave_ranks()


def print_recipe(configs: tuple):
    """Print the values that the recipes set, as they are after the flags."""
    names = {name for recipe in (BENCHMARKS, *RECIPES[1:]) for name in recipe.defaults}
    values = [
        f"{field.name.replace('_', '-')} {getattr(config, field.name)}"
        for config in configs
        for field in fields(config)
        if field.name in names
    ]
    print(f"recipe: {', '.join(values)}; every one of them is a flag")


def run_stages(job: "Job", folder: Path, splits: dict):
    """SFT and the rounds, each trained and evaluated unless it is there already; the table."""
    previous = start_folder(job.run, job.search_tokenizer, folder)
    first = "sft" if job.train.sft_steps else "start"  # start: the model as it was given
    rows = []
    for number in range(job.run.rounds + 1):
        stage = folder / (f"round{number}" if number else first)
        stage.mkdir(exist_ok=True)
        if stage.name != "start":
            if not (stage / "config.json").exists():
                train_stage(job, previous, stage, splits, number)
            on_rank_0(lambda stage=stage: remove_checkpoints(stage))
            previous = stage
        rows.append(evaluate(job, splits, previous, stage, folder / first))
        print_stages(rows[-1:], f"after {stage.name}")
    count = rows[0]["answers"][0]["questions"]
    seed = job.run.seed
    print_stages(rows, f"{folder}: {count} unseen questions, seed {seed}; accuracy in %")


# ------------------------------------------------------------------------------------- setting up


@dataclass(frozen=True)
class Job:
    """The configuration, where to compute, and the tokenizers with their prompts."""

    run: RunConfig
    train: TrainConfig
    search: SearchConfig
    losses: LossConfig
    answering: AnswerConfig
    device: str
    search_tokenizer: StepTokenizer  # prompt to search an untrained model under
    train_tokenizer: StepTokenizer  # prompt to train and answer under

    def load(self, folder: Path, dtype: str = "") -> Llama:
        """A whole copy of a model, in `dtype` or in the type to compute in.

        Models that nobody holds any more are freed first.
        """
        gc.collect()
        torch.cuda.empty_cache()
        kind = getattr(torch, dtype or self.run.dtype)
        return load_model(folder, self.device, kind, self.run.seed)


def make_job(configs: tuple, device: str, splits: dict) -> Job:
    """The job of a command's configurations; see `check_splits`."""
    run, train, search, losses, answering = configs
    run = replace(run, save_dtype=run.save_dtype or source_dtype(run))
    train, *tokenizers = check_splits(run, train, search, answering, splits, device)
    return Job(run, train, search, losses, answering, device, *tokenizers)


def check_flags(run: RunConfig, train: TrainConfig, losses: LossConfig):
    """Refuse flags that do not go together."""
    built_in = is_built_in(run.data)
    if built_in and ":" in run.data:
        task = run.data.split(":")[0]
        raise InputError(
            f"--data {run.data}: training takes all splits of a built-in task: --data {task}"
        )
    if run.model == "tiny" and not built_in:
        raise InputError(
            f"--model tiny and the built-in tasks ({', '.join(TASKS)}) go together, and --data "
            f"{run.data} is not one of these; real questions need a real --model"
        )
    if run.model != "tiny" and built_in:
        raise InputError(
            f"--data {run.data} is a built-in task: only --model tiny can be trained on it"
        )
    if run.model == "tiny" and (run.chat or run.steps not in ("", "lines")):
        raise InputError("--chat and --steps need a real --model: the tiny one learns lines")
    names = sorted(OBJECTIVES.keys() - {"sft"})
    if losses.objective not in names:
        raise InputError(f"--objective {losses.objective}: there are {', '.join(names)}")
    objective = OBJECTIVES[losses.objective]
    weights = {
        "--policy-weight": losses.policy_weight if objective.reference else 0,
        "--sft-weight": losses.sft_weight if objective.likelihood else 0,
        "--mse-weight": losses.mse_weight if objective.value else 0,
        "--margin-weight": losses.margin_weight if objective.value and objective.pairs else 0,
    }
    if not any(weights.values()):
        raise InputError(
            f"--objective {losses.objective}: with these weights there is nothing to learn from"
        )
    if run.trees and objective.groups:
        raise InputError(
            f"--trees: {losses.objective} learns from samples of its own, not from trees"
        )
    if run.trees and not rank_files(Path(run.trees)):
        raise InputError(f"--trees {run.trees}: no such file")
    if train.tensorboard and not find_spec("tensorboard"):
        raise InputError(
            "--tensorboard needs a package that is not installed: pip install tensorboard"
        )


def tiny_config(task: str) -> LlamaConfig:
    """The shape of the model that is trained from scratch on a built-in task."""
    return LlamaConfig(task_tokenizer(task).get_vocab_size(), eos_token_id=0, **TINY)


def shape_of(run: RunConfig) -> LlamaConfig:
    """The model's configuration, of which only config.json is read, or the preset's."""
    if run.model == "tiny":
        return tiny_config(run.data)
    if run.model in PRESETS and not Path(run.model).is_dir():
        return LlamaConfig(**PRESETS[run.model][1])
    return read_config(find_folder(run.model, ("config.json",)))


def source_dtype(run: RunConfig) -> str:
    """The type of the weights of --model."""
    if run.model == "tiny":
        return "float32"
    return str(stored_dtype(find_folder(run.model))).removeprefix("torch.")


def sizes_of(shape: LlamaConfig, run: RunConfig, train: TrainConfig) -> Sizes:
    """The sizes of a model, for plans."""
    return Sizes(shape, *count_parameters(shape, train.lora_rank), WIDTH[run.dtype], LOGITS)


def check_splits(
    run: RunConfig,
    train: TrainConfig,
    search: SearchConfig,
    answering: AnswerConfig,
    splits: dict,
    device: str,
) -> tuple[TrainConfig, StepTokenizer, StepTokenizer]:
    """The optimizer's configuration with the number of SFT steps, and the two tokenizers of a Job.

    Questions and solutions that do not fit into the context are left out of `splits`, and worked
    solutions of real questions are checked (`check_solutions`). SFT without solutions, a checkpoint
    that does not load, and searches that do not fit into memory are refused. Nothing is written
    yet.
    """
    if run.model == "tiny":
        tokenizer = StepTokenizer(task_tokenizer(run.data), [0], read_template(run.prompt))
        shape = tiny_config(run.data)
    else:
        folder, tokenizer = find_source(run)
        shape = load_model(folder, "meta").config
    trained = tokenizer.with_prompt(run.train_prompt)
    context = context_of(shape, search)
    room = context - search.max_step_tokens
    tokenizers = [tokenizer] if trained is tokenizer else [tokenizer, trained]
    for one in tokenizers:  # a search may run under both prompts
        if run.model == "tiny":
            splits["search"] = [fitting(part, one, room) for part in splits["search"]]
        elif run.rounds:  # every round searches the same questions
            splits["search"] = [fitting(splits["search"][0], one, room)] * run.rounds
    for name in ("valid", "test"):
        splits[name] = fitting(splits[name], trained, room)
    if run.model != "tiny" and splits["sft"]:
        check_solutions(splits["sft"], trained, search, context)
    asked = splits["test"] + sum(splits["search"][:1], [])
    prompts = [len(one.encode_prompt(question)) for one in tokenizers for question in asked]
    searches = searches_of(shape, prompts, search, answering)
    check_memory(sizes_of(shape, run, train), searches, run, train, search, device)
    return with_sft_steps(train, splits, trained, context), tokenizer, trained


def with_sft_steps(
    train: TrainConfig, splits: dict, tokenizer: StepTokenizer, context: int
) -> TrainConfig:
    """--sft-steps as given, or those of --sft-epochs; solutions over the context are left out."""
    if not train.sft_steps and not train.sft_epochs:
        return train
    if not splits["sft"]:
        if train.sft_steps:
            raise InputError("--sft-steps needs questions with worked solutions, and there is none")
        print("there are no worked solutions: no SFT, the search starts with the model as it is")
        return train
    lengths = [solution_tree(question, tokenizer).tokens() for question in splits["sft"]]
    kept = [one for one, length in zip(splits["sft"], lengths) if length <= context]
    if len(kept) < len(lengths):
        print(
            f"{len(lengths) - len(kept)} prompts with their worked solutions are longer than the "
            f"context of {context} tokens; left out of SFT"
        )
    if not kept:
        raise InputError(
            f"question {splits['sft'][0].id}: prompt and solution have {lengths[0]} tokens, the "
            f"context {context}"
        )
    splits["sft"] = kept
    steps = max(1, train.sft_epochs * len(kept) // train.sft_batch)
    return replace(train, sft_steps=train.sft_steps or steps)


def check_memory(
    sizes: Sizes, searches: list[Searching], run: RunConfig, train: TrainConfig, search, device: str
):
    """Refuse a run of which a later phase will not fit into the memory that is free now."""
    free = free_memory(torch.device(device))
    ranks = world_size()
    state = sizes.training_state / ranks
    for one in searches:
        if 0 < search.cache_tokens < one.tokens:
            raise InputError(
                f"--cache-tokens {search.cache_tokens}: {one.name} needs at least {one.tokens} for "
                "a single question"
            )
    needs = {one.name: sizes.weights + one.bytes(sizes) for one in searches}
    needs["loading"] = sizes.loaded * (1 + (1 / ranks if dist.is_initialized() else 0))
    needs["training"] = state + copy_bytes(sizes, run) + sizes.activations(1, train.recompute)
    phase = max(needs, key=needs.get)
    if needs[phase] > free:
        lora = "" if sizes.lora else "--lora-rank 16, "
        raise InputError(
            f"{run.model}: {phase} needs at least {needs[phase] / 1e9:.1f} GB on each of {ranks} "
            f"ranks, and {free / 1e9:.1f} GB are free on {device}: use {lora}more GPUs, a smaller "
            "model, or for a search fewer --max-step-tokens and --tree-tokens (see --plan)"
        )


def copy_bytes(sizes: Sizes, run: RunConfig) -> int:
    """Bytes of the copy that `shard` makes to compute with."""
    copied = not dist.is_initialized() and run.dtype != "float32" and not sizes.lora
    return sizes.weights if copied else 0


def searches_of(
    shape: LlamaConfig, prompts: list[int], search: SearchConfig, answering: AnswerConfig
) -> list[Searching]:
    """What the search and each strategy of the table need of the memory, for these prompts."""
    context = context_of(shape, search)
    demands = [("search", demand_of(search), search.search_rows, False)]
    for name in TABLE:
        demand = parse_strategy(name, search, answering).demand
        demands.append((name, demand, max(1, answering.answer_lanes // demand.lanes), True))
    found = []
    for name, demand, rows, fit in demands:
        room = reserve(prompts, demand, search, context, fit)
        found.append(Searching(name, room.slots + room.store, demand.lanes, rows))
    return found


def open_run(folder: Path, configs: tuple, job: Job, splits: dict):
    """Make the run folder, or check that it belongs to the same configuration, questions and model.

    Other processes are kept away from it.
    """
    if folder.exists() and not (folder / "config.json").exists():
        ours = r"lock(-\d+)?|config\.json\.partial"
        if any(not re.fullmatch(ours, file.name) for file in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run; choose another --out")
    barrier()  # all have looked
    folder.mkdir(parents=True, exist_ok=True)
    hold(folder / "lock")
    asked = [question for name in ("sft", "valid", "test") for question in splits[name]]
    asked += [question for part in splits["search"] for question in part]
    rows = [[one.id, one.text, one.answer, one.solution] for one in asked]
    model = None if job.run.model == "tiny" else find_folder(job.run.model)
    tokenizers = [job.search_tokenizer, job.train_tokenizer]
    keep_config(
        folder / "config.json",
        configs,
        free=(*FREE, *MEMORY_ONLY),
        identity={"questions": digest(rows), **identity_of(model, tokenizers, job.search.reward)},
        write=rank() == 0,
        commit=head_commit(),
    )


def start_folder(run: RunConfig, tokenizer: StepTokenizer, folder: Path) -> Path:
    """The folder of the model to start from; the tiny one is drawn and written first."""
    if run.model != "tiny":
        return find_folder(run.model)
    start = folder / "start"

    def write():
        if (start / "config.json").exists():
            return
        start.mkdir(exist_ok=True)
        tokenizer.tokenizer.save(str(start / "tokenizer.json"))
        sync(start / "tokenizer.json")
        (start / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>",\n'
            ' "model_input_names": ["input_ids", "attention_mask"]}\n'
        )
        save_model(Llama(tiny_config(run.data)).init_weights(run.seed), start)

    on_rank_0(write)
    return start


# --------------------------------------------------------------------------------------- training


def train_stage(job: Job, previous: Path, stage: Path, splits: dict, number: int):
    """Train the model in `previous` on the stage's data, and write it to `stage`."""
    train = job.train
    losses = job.losses
    batch, lr = train.tune_batch, train.tune_lr
    questions = splits["search"][number - 1] if number else splits["sft"]
    if number == 0:
        losses = LossConfig("sft", sft_weight=1.0)
        batch, lr = train.sft_batch, train.sft_lr
        trees = [solution_tree(question, job.train_tokenizer) for question in questions]
    elif OBJECTIVES[losses.objective].groups:
        trees = []  # its trees are sampled between the steps
    else:
        trees = grow_trees(job, previous, stage, questions, number)
    lessons = [learn(tree, losses) for tree in trees]
    lessons = [lesson for lesson in lessons if len(lesson.tree.nodes) > 1]
    if trees and not lessons:
        raise InputError(
            f"{stage.name}: no tree has a step that --objective {losses.objective} learns from"
        )
    seed = job.run.seed + number
    count = len(lessons or questions)
    steps = max(1, train.tune_epochs * count // batch) if number else train.sft_steps
    model = model_to_train(job, previous, stage, lessons, number)
    computing = shard(model, job.run.dtype)
    train = replace(train, pack_tokens=train.pack_tokens or tokens_of_pass(job, model))

    def lessons_of(step: int) -> list[tuple[int, Lesson]]:
        """This rank's share of a step's lessons, with their places in the step."""
        places = rank_share(enumerate(order(count, seed, step * batch, batch)))
        if lessons:
            return [(place, lessons[index]) for place, index in places]
        # a question may come twice in a step, so ids are made of places
        asked = [replace(questions[index], id=f"{step} {place}") for place, index in places]
        groups = groups_of_policy(job, model, asked, seed)
        return [(place, learn(tree, losses)) for (place, _), tree in zip(places, groups)]

    with Stop() as stop:  # a request to stop waits for the end of the step, or of writing the model
        optimize(model, computing, steps, lr, lessons_of, losses, train, seed, stage, stop)
        write_model(model, previous, stage, job.run.save_dtype)


def model_to_train(
    job: Job, previous: Path, stage: Path, lessons: list[Lesson], number: int
) -> Llama:
    """The model in `previous` before its first step; the lessons get its reference."""
    train = job.train
    objective = OBJECTIVES[job.losses.objective]
    head = None
    if number == 1 and train.fit_value and objective.value and not find_checkpoints(stage):
        head = fit_value(job.load(previous), lessons, train.pack_tokens)
    # weights are float32 whatever the type to compute in; those that LoRA freezes are not
    model = job.load(previous, "" if train.lora_rank else "float32")
    if train.lora_rank:  # the reference is computed while training
        add_lora(model, train.lora_rank, job.run.seed + number)
    elif number and objective.reference:
        # in bfloat16 log pi of a step depends on what it is packed with, by 0.36 nats
        add_reference(model, lessons, stage / "reference.safetensors", train.pack_tokens)
    if head:  # after the reference, whose fingerprint is that of the model as it was loaded
        with torch.no_grad():
            model.value_head.weight.copy_(head[0])
            model.value_head.bias.copy_(head[1])
    for block in model.model.layers:
        block.recompute = train.recompute
    return model


def tokens_of_pass(job: Job, model: Llama) -> int:
    """Tokens of one forward and backward pass for which the memory that is free suffices."""
    sizes = sizes_of(model.config, job.run, job.train)
    device = next(model.parameters()).device
    free = free_memory(device)
    free += copy_bytes(sizes, job.run)  # it is there already
    room = pack_room(sizes, world_size(), job.run, job.train, free)
    if room < 1:
        raise InputError(
            f"{free / 1e9:.1f} GB are free beside the weights, too few to train: use more GPUs or "
            "a smaller model (--plan shows what each number of GPUs takes)"
        )
    return room


def optimize(
    model: Llama,
    computing: Llama,
    steps: int,
    lr: float,
    lessons_of: Callable[[int], list[tuple[int, Lesson]]],
    losses: LossConfig,
    train: TrainConfig,
    seed: int,
    stage: Path,
    stop: Stop | None = None,
):
    """AdamW over `steps` steps, from the stage's last checkpoint on.

    `computing` is what `shard` returned for the model. `lessons_of(step)` returns this rank's
    lessons with their places in the step. The model stays in evaluation mode: its only dropout is
    that of `draw_dropout`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr, (0.9, 0.95), weight_decay=train.weight_decay, fused=True
    )
    first = load_checkpoint(stage, model, optimizer)
    on_rank_0(lambda: forget(stage, first))
    board = open_board(stage.parent) if train.tensorboard and rank() == 0 else None
    with progress(range(first, steps), stage.name, steps, "step", first) as bar:
        for step in bar:
            begin = time.perf_counter()
            figures, counts = backward(computing, lessons_of(step), losses, train, seed, step)
            figures["grad_norm"] = clip_gradients(model, train.clip)
            check_finite(figures, stage, step)
            for group in optimizer.param_groups:
                group["lr"] = figures["lr"] = lr * schedule(step, steps, train.warmup)
            optimizer.step()
            optimizer.zero_grad()
            figures["pairs"] = counts["pairs"]
            for name in ("unique_tokens", "pairwise_tokens"):
                figures[f"{name}_s"] = counts[name] / (time.perf_counter() - begin)
            log_step(bar, board, stage, step, figures)
            asked = stop.asked() if stop else 0
            if asked or (step + 1) % train.save_every == 0 and step + 1 < steps:
                save_checkpoint(stage, model, optimizer, step + 1, train.keep)
            if asked:
                raise KeyboardInterrupt(asked)


def backward(
    model: Llama,
    mine: list[tuple[int, Lesson]],
    losses: LossConfig,
    train: TrainConfig,
    seed: int,
    step: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Compute the gradients of one step; `mine` are this rank's lessons with their places.

    Every sum is divided by its count over all packs and ranks. Returns the figures of the step
    and its counts.
    """
    device = next(model.parameters()).device
    indices = group_by_tokens([lesson.tree for _, lesson in mine], train.pack_tokens)
    groups = [[mine[index] for index in group] for group in indices]
    groups += [[(0, EMPTY)]] * (most_over_ranks(len(groups)) - len(groups))
    batches = []
    for group in groups:
        lessons = [lesson for _, lesson in group]
        batches.append(Batch(lessons, losses, device))
    counts = counts_over_ranks(batches)
    totals = torch.zeros(1 + len(DIVISORS), dtype=torch.float64)
    for group, batch in zip(groups, batches):
        dropout_ED = None
        if OBJECTIVES[losses.objective].value:
            dropout_ED = draw_dropout(group, model.config.hidden_size, seed, step).to(device)
        if train.lora_rank and OBJECTIVES[losses.objective].reference:
            add_base_reference(model, batch)
        scores = score(model, batch.packed, batch.needed_E, dropout_ED)
        sums = loss_sums(*scores, batch, losses)
        loss = total_loss(sums, counts, losses)
        (loss * (world_size() if dist.is_initialized() else 1)).backward()  # FSDP takes the mean
        totals += torch.stack([loss, *(sums[name] for name in DIVISORS)]).detach().cpu()
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss, *sums = totals.tolist()
    figures = {"loss": loss}
    for name, total in zip(DIVISORS, sums):
        if counts[DIVISORS[name]]:
            figures[name] = total / counts[DIVISORS[name]]
    return figures, counts


@torch.no_grad()
def add_base_reference(model: Llama, batch: Batch):
    """The reference of a batch with LoRA: the model without its adapters, under the same packing.

    It is the policy that grew the trees, so no pass before training and no file is needed.
    """
    with without_lora(model):
        logp_M, value_E, node_M = score(model, batch.packed, batch.needed_E)
    batch.ref_E = step_logp(logp_M, node_M, len(value_E))


# padding for ranks with fewer packs: with FSDP every rank must run the same number of passes
EMPTY = Lesson(Tree("", "", "", [TreeNode(-1, [0], [False])]), [], [(0.0, 0.0)], [None], [None])


def most_over_ranks(count: int) -> int:
    """The largest of the ranks' counts."""
    most = torch.tensor(count)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def counts_over_ranks(batches: list[Batch]) -> dict[str, float]:
    """The sums of the batches' counts, over all ranks."""
    counts = [sum(batch.counts[name] for batch in batches) for name in COUNTS]
    counts = torch.tensor(counts, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(counts)
    return dict(zip(COUNTS, counts.tolist()))


def draw_dropout(group: list[tuple[int, Lesson]], width: int, seed: int, step: int) -> Tensor:
    """Dropout of the value head's input (E, D) for a pack: 0 or 1 / (1 - DROPOUT).

    It depends on the seed, the step and the lesson's place, so it is the same wherever a tree is
    computed.
    """
    uniform_ED = []
    for place, lesson in group:
        own = zlib.crc32(f"{seed} {step} {place}".encode())
        generator = torch.Generator().manual_seed(own)
        uniform_ED.append(torch.rand(len(lesson.tree.nodes), width, generator=generator))
    return torch.cat(uniform_ED).ge(DROPOUT) / (1 - DROPOUT)


def clip_gradients(model: Llama, clip: float) -> float:
    """Scale the gradients down to norm `clip` (0: leave them); the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def check_finite(figures: dict[str, float], stage: Path, step: int):
    """End the run if the loss or its gradient is not finite."""
    if not math.isfinite(figures["loss"] + figures["grad_norm"]):
        raise InputError(
            f"{stage.name}, step {step}: the loss is {figures['loss']}, its gradient norm "
            f"{figures['grad_norm']}; the last checkpoint is kept; start again with another --out "
            "and a lower learning rate"
        )


def schedule(step: int, steps: int, warmup: float) -> float:
    """The factor of the peak learning rate: linear over the first `warmup` of the steps, then a
    cosine down to 0."""
    rising = max(1, round(warmup * steps))
    done = max(0, step - rising) / max(1, steps - rising)
    return min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * done)))


def order(count: int, seed: int, start: int, batch: int) -> list[int]:
    """The items at places `start` to `start + batch` of an endless sequence of shuffled epochs.

    Items are numbers below `count`.
    """
    places = range(start, start + batch)
    shuffled = {}
    for epoch in {place // count for place in places}:
        shuffled[epoch] = random.Random(f"{seed} {epoch}").sample(range(count), count)
    return [shuffled[place // count][place % count] for place in places]


def shard(model: Llama, dtype: str) -> Llama:
    """Prepare a float32 model for training in `dtype`; returns the model that computes.

    With a process group: FSDP2, a block at a time, float32 weights in shards, gradients summed in
    float32. Without one: the model itself, or a copy in `dtype`. Each forward pass takes the copy's
    weights from the model, and its gradients are added to the model's in float32.
    """
    if dist.is_initialized():
        mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
        policy = MixedPrecisionPolicy(getattr(torch, dtype), torch.float32)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)
    if dtype == "float32" or not all(part.requires_grad for part in model.parameters()):
        return model
    copy = whole_copy(model, dtype)
    pairs = list(zip(copy.parameters(), model.parameters()))

    @torch.no_grad()
    def take_weights(*_):
        for mine, master in pairs:
            mine.copy_(master)

    def give_gradient(master, mine):
        if master.grad is None:
            master.grad = mine.grad.float()
        else:
            master.grad += mine.grad
        mine.grad = None

    copy.register_forward_pre_hook(take_weights)
    for mine, master in pairs:
        mine.register_post_accumulate_grad_hook(partial(give_gradient, master))
    return copy


def whole_copy(model: Llama, dtype: str) -> Llama:
    """A whole copy of a model, sharded or not, in `dtype`."""
    with torch.device("meta"):
        copy = Llama(model.config)
    state = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        state[name] = weight.full_tensor() if isinstance(weight, DTensor) else weight
    state = merge_lora(state)
    state = {name: weight.to(getattr(torch, dtype), copy=True) for name, weight in state.items()}
    copy.load_state_dict(state, assign=True)
    for block, original in zip(copy.model.layers, model.model.layers):
        block.recompute = original.recompute
    return copy.requires_grad_(True).eval()


def write_model(model: Llama, previous: Path, stage: Path, dtype: str):
    """Write the trained model, whole, in `dtype` (empty: as it is).

    The other files of the folder that it comes from are copied. Adapters are merged, and written to
    the folder `adapter`, too.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)

    def save():
        copy_files(previous, stage)
        save_lora(state, previous, stage / "adapter")
        # config.json comes last: a folder that has it is complete
        merged = merge_lora(state)
        save_model(model, stage, merged, getattr(torch, dtype) if dtype else None)

    on_rank_0(save)


# ------------------------------------------------------------------------------------------- trees


def grow_trees(
    job: Job, previous: Path, stage: Path, questions: list[Question], number: int
) -> list[Tree]:
    """Search a round's questions, each rank its share; returns the trees of all, in their order.

    Each tree is written as it ends, and questions that have one are not searched again.
    """
    model = job.load(previous)
    file = stage / "trees.jsonl"
    if number == 1 and job.run.trees:
        on_rank_0(lambda: take_trees(Path(job.run.trees), file, questions))
    found = resume_trees(file, rank(), world_size())
    check_token_ids(found, model.config.vocab_size, stage)
    check_trees(found, questions, f"--out {stage}")
    done = {tree.id for tree in found}
    barrier()  # all have read before anybody writes
    left = rank_share(question for question in questions if question.id not in done)
    # a trained model is searched under the prompt that it was trained with
    trained = number > 1 or job.train.sft_steps
    tokenizer = job.train_tokenizer if trained else job.search_tokenizer
    label = f"{stage.name} search"
    new = search_trees(model, tokenizer, left, job.search, job.run.seed + number, label)
    write_trees(stage / f"trees-{rank()}.jsonl", new)
    barrier()
    found = {tree.id: tree for tree in resume_trees(file)}
    trees = [found[question.id] for question in questions]  # whatever the number of ranks
    describe(trees, job.search_tokenizer, job.losses)
    asked = zip(trees, questions)
    return [job.train_tokenizer.set_prompt(tree, question) for tree, question in asked]


def take_trees(given: Path, file: Path, questions: list[Question]):
    """Copy the questions' trees of the files of `given` beside `file`, if there are none yet."""
    if rank_files(file):
        return
    ids = {question.id for question in questions}
    found = {tree.id: tree for part in rank_files(given) for tree in read_trees(part)}
    found = [tree for tree in found.values() if tree.id in ids]
    if not found:
        raise InputError(f"--trees {given}: none of this round's questions has a tree there")
    check_trees(found, questions, f"--trees {given}")
    publish(file.with_stem("trees-0"), lambda partial: write_trees(partial, found, "w"))


def sample_group(
    root: Node, count: int, outcome: Callable[[Node], float]
) -> Generator[list[Node], list[Node], None]:
    """GRPO's group: `count` whole solutions as one tree, each backed up alone.

    Identical steps after the same path become one node.
    """
    for last in (yield [root] * count):
        node = root
        for step in last.path():
            twin = next((child for child in node.children if child.tokens == step.tokens), None)
            if twin is None:
                node.children.append(step)
                step.parent = node
            node = twin or step
        node.ending = node.ending or "deep"
        if node.reward is None:
            node.reward = outcome(node)
        backup(node, node.reward)


def grow_groups(
    model: Llama,
    tokenizer: StepTokenizer,
    questions: list[Question],
    search: SearchConfig,
    count: int,
    seed: int,
) -> list[Tree]:
    """A tree of `count` samples at temperature 1 for each question, in their order.

    The questions' ids must differ.
    """
    demand = Demand(count, 1.0, expansions=1, steps_per_lane=search.max_depth)
    engine = Engine(model, tokenizer, questions, demand, search, search.search_rows, seed, fit=True)

    def start(question, root):
        return sample_group(root, count, outcome_of(question, search.reward))

    trees = {}
    for question, root, _ in engine.results(start):
        trees[question.id] = to_tree(question, root, 1, "samples")
    return [trees[question.id] for question in questions]


def groups_of_policy(job: Job, model: Llama, questions: list[Question], seed: int) -> list[Tree]:
    """The groups of an optimizer step, sampled from the policy as it is."""
    policy = whole_copy(model, job.run.dtype)
    return grow_groups(policy, job.train_tokenizer, questions, job.search, job.train.group, seed)


def describe(trees: list[Tree], tokenizer: StepTokenizer, losses: LossConfig):
    """Print what a search found, and an example of what the objective compares."""
    rewards = [[node.reward for node in tree.nodes if node.reward is not None] for tree in trees]
    pairs = [pairs_of(tree, losses) for tree in trees]
    count = len(trees)
    solved = 100 * sum(max(found, default=0) > 0 for found in rewards) / count
    figures = [f"{sum(map(len, rewards)) / count:.1f} finished solutions"]
    if OBJECTIVES[losses.objective].pairs:
        figures.append(f"{sum(map(len, pairs)) / count:.1f} pairs")
    effective = sum(tree.simulations for tree in trees) / count
    endings = [node.ending for tree in trees for node in tree.nodes if node.ending]
    cut, deep = (100 * endings.count(name) / max(1, len(endings)) for name in ("cut", "deep"))
    print(
        f"{count} trees: {solved:.1f} % with a correct solution, {', '.join(figures)} and "
        f"{effective:.1f} effective simulations per tree; "
        f"{cut:.1f} % of all ends cut, {deep:.1f} % deep"
    )
    if OBJECTIVES[losses.objective].pairs and not any(pairs):
        print(
            "nothing qualifies as a pair: this round trains without the preference and margin terms"
        )
    tree, found = max(zip(trees, pairs), key=lambda item: (bool(item[1]), len(item[0].nodes)))
    show_example(tree, found, tokenizer, OBJECTIVES[losses.objective].whole_solutions)


def show_example(tree: Tree, pairs: list[tuple], tokenizer: StepTokenizer, whole_solutions: bool):
    """Print the pair of largest gap in Q, or two siblings of a tree without pairs."""

    def gap(pair):
        return tree.nodes[pair[0]].q_value - tree.nodes[pair[1]].q_value

    def show(label, index):
        node = tree.nodes[index]
        text = visible(tokenizer.tokenizer.decode(node.tokens).strip())
        numbers = ""
        if label != "step":
            numbers = f"   (N {node.visit_count}, Q {node.q_value:+.2f}, V {node.value:+.2f})"
        print(f"{label:>11}  {text}{numbers}", flush=True)

    print(f"   question  {visible(tree.question)}")
    kind = "last step" if whole_solutions else "sibling"
    compared = list(max(pairs, key=gap)[:2]) if pairs else list(range(1, len(tree.nodes)))[:2]
    labels = [f"+ {kind}", f"- {kind}"] if pairs else [kind] * 2
    shared = tree.path(compared[0])[:-1] if compared and not whole_solutions else []
    for index in shared:
        show("step", index)
    for label, index in zip(labels, compared):
        for step in tree.path(index)[:-1] if whole_solutions else []:
            show("step", step)
        show(label, index)


# ---------------------------------------------------------------------------------------- answers


def evaluate(job: Job, splits: dict, source: Path, stage: Path, first: Path) -> dict:
    """The stage's row of the table, from its eval.json if that exists; `source` holds its model.

    Sibling accuracy is measured on validation trees that its own policy grew, and on those of the
    `first` stage: the same pairs for all.
    """
    file = stage / "eval.json"
    if is_plain(file):
        return read_json(file, STAGE)
    model = job.load(source)
    seed = job.run.seed
    answers = []
    for strategy in TABLE:
        tokenizer = job.train_tokenizer
        found = answer_questions(
            model, tokenizer, splits["test"], strategy, job.search, job.answering, seed
        )
        answers.append(found)
    row = {"stage": stage.name, "answers": answers}
    if splits["valid"]:
        mine = rank_share(splits["valid"])
        label = f"{stage.name} sibling accuracy"
        trees = gather(grow_judged(model, job.train_tokenizer, mine, job.search, seed, label))
        warn_saturated(stage.name, trees)
        fixed = first / "valid-trees.jsonl"
        if stage == first:
            on_rank_0(lambda: write_trees(fixed, trees, "w"))
        row["siblings"] = sibling_accuracy(trees)
        row["siblings_fixed"] = sibling_accuracy(rescore(model, read_trees(fixed)))
    on_rank_0(lambda: write_json(file, row))
    return row


def warn_saturated(stage: str, trees: list[Tree]):
    """Say so if V is at its bounds."""
    at_bounds = [abs(node.value) > 0.999 for tree in trees for node in tree.nodes[1:]]
    if sum(at_bounds) > 0.9 * len(at_bounds):
        print(
            f"{stage}: V is at +-1 for {sum(at_bounds)} of {len(at_bounds)} steps, "
            "where tanh passes no gradient; try a lower --tune-lr"
        )


if __name__ == "__main__":
    run_command(main)
