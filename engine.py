"""The engine: runs many searches at once over one tree-shaped cache.

A search is a generator. It yields a list of nodes to extend, in which a node appears once for each
child to sample, and receives the children, or an empty list if the cache has no room for them. What
it returns is its result. A search of which several requests may be open at once
(`Demand.in_flight`) also receives None while lanes are free: it may ask for more, or yield an empty
list to wait. What it receives next may answer an older request than its last. The engine does not
know how a search chooses: `mcts.mcts` and the strategies of eval.py run on it alike. `Demand`
states what a search may ask for, and docs/engine.md follows one expansion through this file.

Each question that is searched has a row of the cache, and each row has lanes. A lane decodes one
step: in every tick each live lane samples a token and feeds it. A step starts from the hidden state
that its parent's last token left, so every token of a tree is fed exactly once.

Dimension key: B rows (questions searched at once), N lanes of a row, its columns, W all lanes
(lane w is column w % N of row w // N), X tokens of one flat line (those fed in a pass), R rows that
a pass of prompts touches, T tokens of the longest prompt of a pass, S slots of a row (or places of
its store), C tokens of a step, P tokens of the common prefix, L layers, D width, V vocabulary,
H query heads, G key/value heads, K head width.
"""

import heapq
import itertools
import math
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import Question, SourceConfig, StepTokenizer, find_source, load_questions
from model import Llama, LlamaConfig, load_model
from support.flags import InputError
from support.graphs import Graphed
from support.memory import free_memory, rows_that_fit, search_bytes
from support.progress import progress
from support.ranks import use_device
from tasks.built_in import is_built_in
from tasks.code_steps import ends_code, output_tokens
from tasks.grading import extract_answer

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))
CODE_TOKENS = 128  # least --max-step-tokens for steps that hold code and its output
SHORT_PREFIX = 64  # tokens: a shorter prefix is read in each row, which is one attention call less


# --------------------------------------------------------------------------------------- what grows


@dataclass(eq=False)
class Node:
    """A step, and the partial solution that ends with it. The root is the question's prompt.

    The engine sets what it sampled; mcts.py fills in the counts. There is one player: values never
    change sign on the way up. Endings: "answer" states an answer; "eos" ended without one; "cut" is
    longer than a step may be; "deep" may have no further step, because of max_depth or the model's
    context. None: the node can be extended.
    """

    parent: "Node | None" = None
    tokens: list[int] = field(default_factory=list)
    logp: float = 0.0  # sum of the sampled tokens' untempered log-probabilities, in nats
    value: float = 0.0  # V, read at the step's last token
    ending: str | None = None  # of terminal nodes
    reward: float | None = None  # outcome of a terminal node
    children: list["Node"] = field(default_factory=list)
    visit_count: int = 0  # N
    value_sum: float = 0.0  # W
    closed: bool = False  # nothing below is left to select
    in_flight: int = 0  # leaves below, or this one, whose children are being sampled
    text: str = ""
    sampled: list[bool] = field(default_factory=list)  # which tokens the model wrote; empty: all
    path_tokens: int = 0  # tokens of the prompt and of all steps down to this one

    @property
    def depth(self) -> int:
        """Steps from the root; 0 for the root."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def prior(self) -> float:
        """exp(mean token log-probability), not normalised over siblings (AlphaMath code)."""
        if self.parent is None:
            return 1.0
        count = sum(self.sampled) if self.sampled else len(self.tokens)
        return math.exp(self.logp / max(1, count))

    @property
    def q_value(self) -> float:
        """Q, the mean of all values backed up through this node; 0 before the first one
        (AlphaMath eq. 4)."""
        return self.value_sum / self.visit_count if self.visit_count else 0.0

    def path(self) -> list["Node"]:
        """The nodes from below the root down to this one."""
        return [] if self.parent is None else self.parent.path() + [self]


@dataclass(frozen=True)
class Demand:
    """What a search may ask of the engine.

    Each request of a search holds 1 to `lanes` nodes, at most `paths` of them distinct and none of
    them terminal. There are two modes. With `steps_per_lane` = 1 the search chooses after each
    step, and complete steps are stored. Otherwise it asks once, for the root, and each lane writes
    a whole solution of at most `steps_per_lane` steps by itself; nothing is stored.
    """

    lanes: int  # steps decoded at once for a question, at most
    temperature: float
    # requests that the cache has room for, if the engine fits searches in (`reserve`); later ones
    # may get an empty list
    expansions: int
    paths: int = 1  # partial solutions extended at once, at most
    steps_per_lane: int = 1
    # only children of the newest request are extended again: all other steps are forgotten, so that
    # the store holds no more than the paths
    moves_on: bool = False
    in_flight: int = 1  # requests that may be open at the same time

    def __post_init__(self):
        least = min(self.lanes, self.expansions, self.paths, self.steps_per_lane, self.in_flight)
        if least < 1:
            raise ValueError("lanes, expansions, paths, steps and in_flight must be at least 1")
        if self.in_flight > 1 and (self.steps_per_lane > 1 or self.moves_on):
            raise ValueError("with steps_per_lane > 1 or moves_on, in_flight must be 1")


class State(NamedTuple):
    """What the engine keeps of a node that can be extended."""

    hidden_D: Tensor  # final hidden state of its last token
    place: int  # of its first token in the row's store


@dataclass(eq=False)
class Request:
    """Nodes that a search has asked to extend."""

    parents: list[Node]
    children: list[Node | None]  # in their parents' order; None: not complete
    slots: dict[Node, list[int]]  # those of each node on the parents' paths
    step_slots: list[list[int]] = field(default_factory=list)  # those of each complete child

    @property
    def missing(self) -> int:
        """How many children are not complete."""
        return self.children.count(None)


@dataclass(eq=False)
class Search:
    """A search that runs in a row of the cache."""

    question: Question
    root: Node
    generator: Generator
    rng: np.random.Generator  # of its samples
    states: dict[Node, State]
    stored: int = 0  # tokens in the row's store
    requests: list[Request] = field(default_factory=list)  # in flight
    # steps of these that wait for a lane: the request, and which of its children
    queue: deque[tuple[Request, int]] = field(default_factory=deque)


# ---------------------------------------------------------------------------------------- the cache


@dataclass(frozen=True)
class Room:
    """The room of the cache, in tokens."""

    rows: int  # searches at once
    # of a row: the prompt (without a prefix that is in no row), the paths being extended and their
    # new steps, for each request in flight
    slots: int
    store: int  # of a row: complete steps that may be extended again
    tokens: int  # of a search: its prompt and stored steps, at most

    def for_steps(self, prompt_tokens: int) -> int:
        """Tokens of complete steps that a search with such a prompt may store."""
        return min(self.tokens - prompt_tokens, self.store)


def reserve(prompts: list[int], demand: Demand, config, context: int, fit: bool) -> Room:
    """The room of one search whose prompt has one of these lengths (`Room.rows` is 1).

    `config` (mcts.SearchConfig) gives the longest step and solution, and how many tokens a tree may
    hold. With `fit` a search finds all the room that it may need; otherwise one that has used up
    --tree-tokens gets no more children. InputError if these are too few for one expansion.

    Example: 4 lanes, steps of 16 tokens, at most 5 of them on a path, prompts of 10 tokens, 12
    expansions. The slots take 10 + 5 * 16 + 4 * 16 = 154 tokens, and a whole tree takes
    12 * 4 * 16 = 768 places of the store.
    """
    longest_prompt = max(prompts, default=1)
    shortest_prompt = min(prompts, default=1)
    new_steps = demand.lanes * config.max_step_tokens
    depth = max(config.max_depth, demand.steps_per_lane)
    path = min(depth * config.max_step_tokens, context - shortest_prompt)
    if demand.steps_per_lane > 1:
        behind_prompt = demand.lanes * path
        whole_tree = 0
    else:
        behind_prompt = demand.in_flight * (demand.paths * path + new_steps)
        whole_tree = behind_prompt if demand.moves_on else demand.expansions * new_steps
    fit |= demand.moves_on
    tokens = longest_prompt + whole_tree if fit else config.tree_tokens
    if demand.steps_per_lane == 1 and tokens < longest_prompt + new_steps:
        raise InputError(
            f"--tree-tokens {tokens}: a prompt of {longest_prompt} tokens and one expansion need "
            f"at least {longest_prompt + new_steps}"
        )
    store = min(whole_tree, tokens - shortest_prompt)
    return Room(1, longest_prompt + behind_prompt, store, tokens)


def rows_of(room: Room, demand: Demand, most: int, model: Llama, cache_tokens: int) -> int:
    """How many searches run at once: at most `most`, and as many as there is memory for.

    `cache_tokens` bounds the cache; 0: what the device has free (support/memory.py). InputError if
    there is no room for a single search.
    """
    each = room.slots + room.store
    weight = model.output_weight()
    free = 0.0 if cache_tokens else free_memory(weight.device)
    size = search_bytes(model.config, weight.element_size(), each, demand.lanes)
    rows = rows_that_fit(most, each, size, free, cache_tokens)
    if rows:
        return rows
    if cache_tokens:
        raise InputError(
            f"--cache-tokens {cache_tokens}: searching a question needs at least {each}; with "
            "fewer --max-step-tokens or --tree-tokens it needs less"
        )
    raise InputError(
        f"{weight.device}: {free / 1e9:.1f} GB are free, and searching a question needs "
        f"{size / 1e9:.1f} GB; with fewer --max-step-tokens, --max-tokens or --tree-tokens it "
        "needs less"
    )


class TreeCache:
    """Keys and values of many partial solutions: a row for each question, a slot for each token.

    A forward pass feeds one flat line of X tokens without padding. `at` says beforehand which row,
    column and slot each token belongs to, and how many slots are read; the mask says which slots
    the query in a column sees. Complete steps are copied to a second memory, the store, and those
    of a path that is extended again are copied back. So a pass reads the slots of the paths being
    extended, not those of the whole tree.
    """

    def __init__(
        self,
        config: LlamaConfig,
        rows: int,
        slots: int,
        store: int = 0,
        device="cpu",
        dtype: torch.dtype = torch.float32,
    ):
        layers = config.num_hidden_layers
        head = (config.num_key_value_heads, config.head_dim)
        shape = (layers, 2, rows, slots, *head)
        self.slots_L2BSGK = torch.zeros(shape, device=device, dtype=dtype)
        shape = (layers, 2, rows, store, *head)
        self.store_L2BSGK = torch.zeros(shape, device=device, dtype=dtype)
        # of P tokens that all rows begin with, and that are in no row
        self.prefix_L2PGK: Tensor | None = None

    def at(
        self,
        row_X: Tensor,
        column_X: Tensor,
        slot_X: Tensor,
        columns: int,
        length: int,
        rows_R: Tensor | None = None,
    ) -> "TreeCache":
        """Describe the next pass: `columns` queries per row, and how many slots each row reads.

        `row_X` counts among the rows `rows_R` if these are given, else among all rows.
        """
        self.row_X = row_X
        self.column_X = column_X
        self.slot_X = slot_X
        self.rows_R = rows_R
        self.columns = columns
        self.length = length
        return self

    def unroll(
        self, layer: int, q_1XHK: Tensor, k_1XGK: Tensor, v_1XGK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write new keys and values to their slots, and lay the pass out by rows.

        Returns queries (B, N, H, K), and the keys and values that they may see (B, S, G, K).
        """
        memory_2BSGK = self.slots_L2BSGK[layer]
        row_X = self.row_X if self.rows_R is None else self.rows_R[self.row_X]
        memory_2BSGK[0, row_X, self.slot_X] = k_1XGK[0]
        memory_2BSGK[1, row_X, self.slot_X] = v_1XGK[0]
        if self.rows_R is None:
            read_2BSGK = memory_2BSGK[:, :, : self.length]
        else:
            read_2BSGK = memory_2BSGK[:, self.rows_R, : self.length]
        q_BNHK = q_1XHK.new_zeros(read_2BSGK.shape[1], self.columns, *q_1XHK.shape[2:])
        q_BNHK[self.row_X, self.column_X] = q_1XHK[0]
        return q_BNHK, read_2BSGK[0], read_2BSGK[1]

    def roll_up(self, out_BN: Tensor) -> Tensor:
        """The flat line (1, X, ...) of what is laid out by rows (B, N, ...)."""
        return out_BN[self.row_X, self.column_X].unsqueeze(0)

    def keep(self, rows: list[int]):
        """Keep these rows alone, numbered from 0; the memory of the others is not read again."""
        for layer in range(len(self.slots_L2BSGK)):  # one at a time: each copies what it keeps
            self.slots_L2BSGK[layer, :, : len(rows)] = self.slots_L2BSGK[layer][:, rows]
            self.store_L2BSGK[layer, :, : len(rows)] = self.store_L2BSGK[layer][:, rows]
        self.slots_L2BSGK = self.slots_L2BSGK[:, :, : len(rows)]
        self.store_L2BSGK = self.store_L2BSGK[:, :, : len(rows)]

    def put_away(self, row: int, slot_C: Tensor, place: int):
        """Copy a step's tokens from these slots of a row to its store, from `place` on."""
        step = slice(place, place + len(slot_C))
        self.store_L2BSGK[:, :, row, step] = self.slots_L2BSGK[:, :, row, slot_C]

    def fetch(self, row: int, place_X: Tensor, slot_X: Tensor):
        """Copy tokens from these places of a row's store to these of its slots."""
        self.slots_L2BSGK[:, :, row, slot_X] = self.store_L2BSGK[:, :, row, place_X]


# ------------------------------------------------------------------------------------------- a tick


class Tick:
    """The part of a tick that the device does: sample a token in each lane and feed it."""

    def __init__(
        self,
        model: Llama,
        tokenizer: StepTokenizer,
        cache: TreeCache,
        lanes: int,
        temperature: float,
    ):
        weight = model.output_weight()
        rows = cache.slots_L2BSGK.shape[2]
        self.model = model
        self.tokenizer = tokenizer
        self.cache = cache
        self.lanes = lanes  # of a row
        self.temperature = temperature
        # final hidden state of each lane's newest token, which the next one is sampled from
        self.hidden_WD = torch.zeros(
            rows * lanes, weight.shape[1], device=weight.device, dtype=weight.dtype
        )

    def __call__(
        self,
        lane_X: Tensor,
        uniform_X: Tensor,
        given_X: Tensor,
        slot_X: Tensor,
        position_X: Tensor,
        mask_B1NS: Tensor,
    ) -> Tensor:
        """(token, its log-probability, V after it) of each lane: (3, X), float64.

        `uniform_X` are random numbers; a token of `given_X` that is not -1 is fed instead.
        """
        logits_XV = self.model.logits(self.hidden_WD[lane_X])
        token_X, logp_X = self.tokenizer.draw(logits_XV, uniform_X, self.temperature)
        token_X = torch.where(given_X < 0, token_X, given_X)
        row_X = lane_X // self.lanes
        cache = self.cache.at(row_X, lane_X % self.lanes, slot_X, self.lanes, mask_B1NS.shape[3])
        hidden_XD = self.model.hidden(token_X[None], position_X[None], mask_B1NS, cache)[0]
        self.hidden_WD[lane_X] = hidden_XD
        value_X = self.model.value(hidden_XD)
        return torch.stack([token_X.double(), logp_X.double(), value_X.double()])


@dataclass(eq=False, slots=True)
class Lane:
    """A step that is being decoded, in one column of a row."""

    number: int  # among all lanes
    row: int
    column: int
    live: bool = False
    request: Request | None = None
    place: int = 0  # of the step among the request's children
    parent: Node | None = None  # the node that it extends
    uniform: list[float] = field(default_factory=list)  # random numbers, one for each token
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # which tokens the model wrote
    slots: list[int] = field(default_factory=list)  # where each token lies in the row
    given: list[int] = field(default_factory=list)  # tokens to feed next in place of sampled ones
    position: int = 0  # index of the newest token on its path
    has_text: bool = False  # whether the step has visible text
    logp: float = 0.0  # sum over the sampled tokens
    value: float = 0.0  # V after the newest token
    ending: str | None = None  # how the step has ended: "delimiter", "eos" or "cut"

    def start(self, parent: Node, uniform: np.ndarray):
        """Begin a step of `parent`; `uniform` (C,) are its random numbers."""
        self.live = True
        self.parent = parent
        # below 1 in float32, too, where the largest float64 below 1 is rounded up
        self.uniform = uniform.astype(np.float32).clip(max=BELOW_ONE).tolist()
        self.tokens, self.sampled, self.slots, self.given = [], [], [], []
        self.position = parent.path_tokens - 1
        self.has_text = False
        self.logp = 0.0
        self.ending = None

    def add(self, token: int, logp: float, value: float):
        """Note the token that has been fed, with its log-probability and V after it."""
        sampled = not self.given
        if sampled:
            self.logp += logp
        else:
            self.given.pop(0)
        self.tokens.append(token)
        self.sampled.append(sampled)
        self.value = value


# --------------------------------------------------------------------------------------- the engine


class Engine:
    """Runs one search for each question, many at once, each at its own pace.

    What a search samples, and when it runs out of room, depends on the seed, the question's id and
    the configuration (and on rounding), not on the questions beside it. `config` is an
    mcts.SearchConfig, and `rows` the most searches at once; see `reserve` for `fit`. With `static`
    (the default on CUDA) all ticks that read as many slots have the same shapes, and are replayed
    as CUDA graphs.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: StepTokenizer,
        questions: list[Question],
        demand: Demand,
        config,
        rows: int,
        seed: int = 0,
        fit: bool = False,
        static: bool | None = None,
    ):
        weight = model.output_weight()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.demand = demand
        self.seed = seed
        self.device = weight.device
        self.static = self.device.type == "cuda" if static is None else static
        self.step_tokens = config.max_step_tokens
        self.context = context_of(model.config, config)
        self.tables_4V = tokenizer.tables_4V.numpy()
        waiting = self.encode_prompts(questions)
        self.waiting = waiting[::-1]  # the next one last
        prompts = [len(prompt) for _, prompt in waiting]
        room = reserve(prompts, demand, config, self.context, fit)
        # tokens that all prompts begin with; if they are many, a CPU reads them once for all rows
        self.prefix = common_prefix([prompt for _, prompt in waiting])
        outside = self.device.type == "cpu" and len(self.prefix) >= SHORT_PREFIX
        self.prefix_outside = len(self.prefix) if outside else 0
        # one more slot that nobody reads, for dead lanes of static ticks
        room = replace(room, slots=room.slots - self.prefix_outside + self.static)
        most = max(1, min(rows, len(prompts)))
        rows = rows_of(room, demand, most, model, config.cache_tokens)
        self.room = room = replace(room, rows=rows)
        self.cache = TreeCache(
            model.config, room.rows, room.slots, room.store, self.device, weight.dtype
        )
        self.searches: list[Search | None] = [None] * room.rows
        places = itertools.product(range(room.rows), range(demand.lanes))
        self.lanes = [Lane(number, *place) for number, place in enumerate(places)]
        self.free_slots = [[] for _ in range(room.rows)]  # of each row, as heaps
        self.end_slot = [0] * room.rows  # behind the last slot of each row that was in use lately
        # which slots each lane sees; one at least, since attention to nothing computes NaN
        self.mask_BNS = np.zeros((room.rows, demand.lanes, room.slots), dtype=bool)
        self.mask_BNS[:, :, 0] = True
        self.tick = Tick(model, tokenizer, self.cache, demand.lanes, demand.temperature)
        self.device_tick = Graphed(self.tick, self.tick.hidden_WD) if self.static else self.tick
        self.sampled_tokens = self.fed_tokens = self.steps = 0
        self.graded = self.solved = 0  # questions with outcomes; of these, with a right answer

    def encode_prompts(self, questions: list[Question]) -> list[tuple[Question, list[int]]]:
        """Each question with its prompt; InputError if there is no room for a step beside it."""
        if self.tokenizer.tools and self.step_tokens < CODE_TOKENS:
            raise InputError(
                f"--max-step-tokens {self.step_tokens}: steps with code and its output need at "
                f"least {CODE_TOKENS}"
            )
        longest = self.context - self.step_tokens
        return [
            (question, self.tokenizer.encode_prompt(question, longest)) for question in questions
        ]

    def run(
        self, start: Callable[[Question, Node], Generator], label: str, outcomes: bool = False
    ) -> Iterator[tuple[Question, Node, object]]:
        """`results` with a progress bar.

        With `outcomes` the rewards of nodes are outcomes, and the share of solved questions is
        shown.
        """
        begin = time.perf_counter()
        with progress(self.results(start), label, len(self.waiting), "question") as bar:
            for question, root, result in bar:
                if outcomes:
                    self.count_outcomes(root)
                bar.set_postfix_str(self.pace(time.perf_counter() - begin), refresh=False)
                yield question, root, result

    @torch.inference_mode()
    def results(
        self, start: Callable[[Question, Node], Generator]
    ) -> Iterator[tuple[Question, Node, object]]:
        """Yield (question, root, result) as searches end.

        `start(question, root)` makes the generator of a question, and `result` is what that
        returned.
        """
        self.feed_prefix()
        while self.waiting or any(self.searches):
            free = [row for row, search in enumerate(self.searches) if search is None]
            # at least an eighth of the rows at a time, because their prompts are fed together
            if self.waiting and 8 * len(free) >= len(self.searches):
                yield from self.start_searches(free, start)
            elif not (self.waiting or self.static) and 2 * len(free) >= len(self.searches):
                self.drop_free_rows()
            if any(lane.live for lane in self.lanes):
                self.decode()
                for row in self.finish_steps():
                    yield from self.advance(row)

    def drop_free_rows(self):
        """Go on without the rows that no search runs in: a pass would read them for nothing."""
        kept = [row for row, search in enumerate(self.searches) if search]
        self.cache.keep(kept)
        self.searches = [self.searches[row] for row in kept]
        self.free_slots = [self.free_slots[row] for row in kept]
        self.end_slot = [self.end_slot[row] for row in kept]
        self.mask_BNS = self.mask_BNS[kept]
        lanes = [lane for row in kept for lane in self.lanes_of(row)]
        self.tick.hidden_WD = self.tick.hidden_WD[[lane.number for lane in lanes]]
        for number, lane in enumerate(lanes):
            lane.number, lane.row = number, number // self.demand.lanes
        self.lanes = lanes

    # -------------------------------------------------------------------------------------- prompts

    def feed_prefix(self):
        """Feed the prefix common to all prompts; its keys and values serve all searches."""
        if not self.prefix:
            return
        count = len(self.prefix)
        slots_L2BSGK = self.cache.slots_L2BSGK
        kind = (slots_L2BSGK.device, slots_L2BSGK.dtype)
        memory = TreeCache(self.model.config, 1, count, 0, *kind)
        self.feed_prompts([0], [self.prefix], 0, memory)
        prefix_L2PGK = memory.slots_L2BSGK[:, :, 0]
        if self.prefix_outside:
            self.cache.prefix_L2PGK = prefix_L2PGK
        else:  # nothing is ever written over it
            slots_L2BSGK[:, :, :, :count] = prefix_L2PGK[:, :, None]

    def feed_prompts(
        self, rows: list[int], prompts: list[list[int]], begin: int, cache: TreeCache
    ) -> Tensor:
        """Feed prompts from token `begin` on; returns their last hidden states (R, D).

        The tokens before are in the cache: in its prefix, or else in each row.
        """
        lengths_R = np.array([len(prompt) - begin for prompt in prompts])
        longest = int(lengths_R.max())
        token_X = self.to_device(np.concatenate([prompt[begin:] for prompt in prompts]))
        row_X = self.to_device(np.repeat(np.arange(len(rows)), lengths_R))
        column_X = self.to_device(np.concatenate([np.arange(length) for length in lengths_R]))
        position_X = column_X + begin
        before = 0 if cache.prefix_L2PGK is not None else begin
        mask_TS = torch.ones(longest, before + longest, dtype=torch.bool, device=self.device)
        mask_R1TS = mask_TS.tril(before).expand(len(rows), 1, -1, -1)
        rows_R = self.to_device(np.array(rows))
        cache.at(row_X, column_X, column_X + before, longest, before + longest, rows_R)
        hidden_1XD = self.model.hidden(token_X[None], position_X[None], mask_R1TS, cache)
        self.fed_tokens += len(token_X)
        return hidden_1XD[0, self.to_device(lengths_R.cumsum() - 1)]

    def start_searches(self, free: list[int], start):
        """Feed the prompts of the next questions together, and start their searches."""
        batch = [self.waiting.pop() for _ in free[: len(self.waiting)]]
        rows = free[: len(batch)]
        prompts = [prompt for _, prompt in batch]
        hidden_RD = self.feed_prompts(rows, prompts, len(self.prefix), self.cache)
        value_R = self.model.value(hidden_RD).tolist()
        for index, (question, prompt) in enumerate(batch):
            root = Node(tokens=prompt, value=value_R[index], path_tokens=len(prompt))
            rng = np.random.default_rng([self.seed, zlib.crc32(question.id.encode())])
            states = {root: State(hidden_RD[index], 0)}
            search = Search(question, root, start(question, root), rng, states)
            self.searches[rows[index]] = search
            self.empty_slots(rows[index])
            yield from self.advance(rows[index])

    # ------------------------------------------------------------------------------------- searches

    def advance(self, row: int):
        """Hand a row's search the children that are complete, and keep its lanes busy.

        A free lane takes the next step of a request, or the search may ask for more. If the search
        ends, yield its result and free the row.
        """
        search = self.searches[row]
        try:
            for request in [request for request in search.requests if not request.missing]:
                self.end_request(row, request)
                self.ask(row, request.children)
            for lane in self.lanes_of(row):
                if lane.live:
                    continue
                if not search.queue and len(search.requests) < self.demand.in_flight:
                    self.ask(row, None)
                if not search.queue:  # it waits
                    break
                self.start_step(lane, *search.queue.popleft())
        except StopIteration as end:
            if search.requests:
                raise ValueError("a search returned before its last request was answered")
            self.searches[row] = None
            self.end_slot[row] = 0  # its slots need not be read any more
            yield search.question, search.root, end.value

    def ask(self, row: int, children: list[Node] | None):
        """Let a search go on with complete children, or None, and take up what it asks for."""
        search = self.searches[row]
        parents = search.generator.send(children)
        self.check_demand(search, parents)
        while parents and not self.has_room(search, parents):
            parents = search.generator.send([])
            self.check_demand(search, parents)
        if parents:
            slots = self.load_paths(row, parents)
            request = Request(parents, [None] * len(parents), slots)
            search.requests.append(request)
            search.queue += [(request, place) for place in range(len(parents))]

    def start_step(self, lane: Lane, request: Request, place: int):
        """Begin a step of a request in a lane, which sees the prompt and its parent's path."""
        search = self.searches[lane.row]
        parent = request.parents[place]
        seen_S = self.mask_BNS[lane.row, lane.column]
        seen_S[:] = False
        seen_S[: self.prompt_slots(search)] = True
        for node in parent.path():
            seen_S[request.slots[node]] = True
        lane.request, lane.place = request, place
        self.tick.hidden_WD[lane.number] = search.states[parent].hidden_D
        lane.start(parent, search.rng.random(self.step_tokens))

    def check_demand(self, search: Search, parents: list[Node]):
        """Reject a request that its Demand does not allow; this is a bug in the search."""
        demand = self.demand
        distinct = len(set(parents))
        terminal = sum(node.ending is not None for node in parents)
        fits = (parents or search.requests) and len(parents) <= demand.lanes
        fits = fits and len(search.requests) + bool(parents) <= demand.in_flight
        if not fits or distinct > demand.paths or terminal:
            raise ValueError(
                f"a search with {len(search.requests)} open requests asked to extend "
                f"{len(parents)} nodes, {distinct} of them distinct and {terminal} terminal; "
                f"its Demand allows {demand.lanes} lanes, {demand.paths} paths, "
                f"{demand.in_flight} requests and no terminal node"
            )

    def has_room(self, search: Search, parents: list[Node]) -> bool:
        """Whether the store of a row can take a new step of each of these nodes."""
        if self.demand.steps_per_lane > 1 or self.demand.moves_on:  # `reserve` has seen to it
            return True
        steps = len(parents) + sum(request.missing for request in search.requests)
        new = steps * self.step_tokens
        return search.stored + new <= self.room.for_steps(len(search.root.tokens))

    def empty_slots(self, row: int):
        """Free all slots of a row behind its prompt."""
        prompt = self.prompt_slots(self.searches[row])
        self.free_slots[row] = list(range(prompt, self.room.slots - self.static))
        self.end_slot[row] = prompt

    def take_slot(self, row: int) -> int:
        """The first free slot of a row."""
        slot = heapq.heappop(self.free_slots[row])
        self.end_slot[row] = max(self.end_slot[row], slot + 1)
        return slot

    def load_paths(self, row: int, parents: list[Node]) -> dict[Node, list[int]]:
        """Copy the paths of the nodes to extend into a row's slots; returns the slots of each."""
        search = self.searches[row]
        slots = {}  # nodes that paths share are copied once
        places = []
        for node in [node for parent in parents for node in parent.path()]:
            if node not in slots:
                slots[node] = [self.take_slot(row) for _ in node.tokens]
                place = search.states[node].place
                places.append(np.arange(place, place + len(node.tokens)))
        if places:
            slot_X = np.concatenate(list(slots.values()))
            self.cache.fetch(row, self.to_device(np.concatenate(places)), self.to_device(slot_X))
        if self.demand.moves_on:
            self.forget_others(search, row, slots)
        return slots

    def end_request(self, row: int, request: Request):
        """Free the slots of a request whose children are complete."""
        search = self.searches[row]
        search.requests.remove(request)
        if not search.requests:
            self.empty_slots(row)
            return
        for slot in itertools.chain(*request.slots.values(), *request.step_slots):
            heapq.heappush(self.free_slots[row], slot)

    def prompt_slots(self, search: Search) -> int:
        """How many slots of its row a search's prompt takes."""
        return len(search.root.tokens) - self.prefix_outside

    def forget_others(self, search: Search, row: int, slots: dict[Node, list[int]]):
        """Keep only the nodes whose tokens lie in these slots, at the beginning of the store."""
        kept = {search.root: search.states[search.root]}
        search.stored = 0
        for node, where in slots.items():
            self.cache.put_away(row, self.to_device(np.array(where)), search.stored)
            kept[node] = State(search.states[node].hidden_D, search.stored)
            search.stored += len(where)
        search.states = kept

    # --------------------------------------------------------------------------------------- a tick

    def lanes_of(self, row: int) -> list[Lane]:
        """The lanes of a row."""
        first = row * self.demand.lanes
        return self.lanes[first : first + self.demand.lanes]

    def decode(self):
        """Sample the next token of every live lane, feed it, and see whether it ends the step."""
        live = [lane for lane in self.lanes if lane.live]
        for lane in live:
            lane.slots.append(self.take_slot(lane.row))
            lane.position += 1
            self.sampled_tokens += not lane.given
        self.fed_tokens += len(live)
        token_X, logp_X, value_X = self.sample_and_feed(live).tolist()
        for lane, token, logp, value in zip(live, token_X, logp_X, value_X):
            lane.add(int(token), logp, value)
        self.mark_endings(live)

    def sample_and_feed(self, live: list[Lane]) -> np.ndarray:
        """Run the device's part of the tick: (token, log-probability, V) of live lanes (3, X)."""
        lane_X = np.array([lane.number for lane in live])
        uniform_X = np.array([lane.uniform[len(lane.tokens)] for lane in live], dtype=np.float32)
        given_X = np.array([lane.given[0] if lane.given else -1 for lane in live])
        slot_X = np.array([lane.slots[-1] for lane in live])
        position_X = np.array([lane.position for lane in live])
        row_X, column_X = np.divmod(lane_X, self.demand.lanes)
        self.mask_BNS[row_X, column_X, slot_X] = True
        mask_B1NS = self.mask_BNS[:, None, :, : self.slots_to_read()]
        inputs = [lane_X, uniform_X, given_X, slot_X, position_X]
        if self.static:  # dead lanes go along, to a slot that nobody reads
            idle = (np.arange(len(self.lanes)), 0.0, -1, self.room.slots - 1, 0)
            inputs = [self.spread(lane_X, *pair) for pair in zip(inputs, idle)]
        found_3X = self.device_tick(*map(self.to_device, (*inputs, mask_B1NS))).cpu().numpy()
        return found_3X[:, lane_X] if self.static else found_3X

    def spread(self, lane_X: np.ndarray, live_X: np.ndarray, idle) -> np.ndarray:
        """An input of the live lanes as one of all lanes (W,), with `idle` for the dead ones."""
        input_W = np.full(len(self.lanes), idle, dtype=live_X.dtype)
        input_W[lane_X] = live_X
        return input_W

    def slots_to_read(self) -> int:
        """How many slots of each row a pass reads: whole blocks, so that there are few lengths."""
        block = 256 if self.static else 64
        blocks = math.ceil(max(self.end_slot) / block)
        return min(self.room.slots, blocks * block)

    def mark_endings(self, live: list[Lane]):
        """Mark the lanes whose step ends with the newest token. Given tokens only fill it up."""
        kinds = self.tables_4V[:, [lane.tokens[-1] for lane in live]].T.tolist()
        candidates = []
        for lane, (eos, may_end, text, text_before) in zip(live, kinds):
            if len(lane.tokens) >= self.step_tokens:
                lane.ending = "cut"
            if not lane.sampled[-1]:
                continue
            # a delimiter ends a step once there is visible text before it
            if may_end and (lane.has_text or text_before):
                candidates.append(lane)
            lane.has_text |= text
            if eos:
                lane.ending = "eos"
        if self.tokenizer.long_delimiter:
            candidates = self.read_delimiters(candidates)
        for lane in candidates:
            if lane.ending != "eos":
                lane.ending = "delimiter"

    def read_delimiters(self, candidates: list[Lane]) -> list[Lane]:
        """Those of the lanes whose texts complete a delimiter of several characters.

        Code that ends here runs, and its output becomes the lane's next tokens.
        """
        ended = []
        code_ended = []
        for lane in candidates:
            text = self.text(lane.tokens)
            before = self.text(lane.tokens[:-1])
            if self.tokenizer.steps.ended(text, before):
                ended.append(lane)
            if self.tokenizer.tools and ends_code(text, before):
                code_ended.append(lane)
        if code_ended:
            self.run_code(code_ended)
        return ended

    def run_code(self, lanes: list[Lane]):
        """Run the code that has ended in these lanes; its output becomes their next tokens."""
        solutions = []
        room = []
        for lane in lanes:
            steps = [node.text for node in lane.parent.path()]
            solutions.append("".join(steps) + self.text(lane.tokens))
            room.append(self.step_tokens - len(lane.tokens))
        outputs = output_tokens(self.tokenizer, solutions, room)
        for lane, left, output in zip(lanes, room, outputs):
            lane.given = output[:left]

    def text(self, tokens: list[int]) -> str:
        """The text of the tokens of a step."""
        return self.tokenizer.tokenizer.decode(tokens)

    # ------------------------------------------------------------------------------- complete steps

    def finish_steps(self) -> list[int]:
        """Make nodes of the steps that have ended; returns the rows where a lane became free."""
        ended = [lane for lane in self.lanes if lane.live and lane.ending]
        self.steps += len(ended)
        rows = set()
        for lane in ended:
            node = self.make_node(lane)
            if node.ending is None and node.depth < self.demand.steps_per_lane:
                # its hidden state is in the lane already
                lane.start(node, self.searches[lane.row].rng.random(self.step_tokens))
                continue
            if node.ending is None and self.demand.steps_per_lane == 1:
                self.keep_step(lane, node)
            lane.live = False
            lane.request.children[lane.place] = node
            lane.request.step_slots.append(lane.slots)
            rows.add(lane.row)
        return sorted(rows)

    def make_node(self, lane: Lane) -> Node:
        """The step that has ended in a lane, as a child of the node that it extends."""
        node = Node(
            lane.parent,
            lane.tokens,
            lane.logp,
            lane.value,
            None if lane.ending == "delimiter" else lane.ending,
            text=self.text(lane.tokens),
            sampled=lane.sampled,
            path_tokens=lane.parent.path_tokens + len(lane.tokens),
        )
        if node.ending != "cut" and extract_answer(node.text) is not None:
            node.ending = "answer"
        if node.ending is None and node.path_tokens + self.step_tokens > self.context:
            node.ending = "deep"  # the context has no room for another step
        return node

    def keep_step(self, lane: Lane, node: Node):
        """Copy a complete step to the row's store, and keep the state that its children need."""
        search = self.searches[lane.row]
        hidden_D = self.tick.hidden_WD[lane.number].clone()
        search.states[node] = State(hidden_D, search.stored)
        slot_C = self.to_device(np.array(lane.slots))
        self.cache.put_away(lane.row, slot_C, search.stored)
        search.stored += len(node.tokens)

    # ------------------------------------------------------------------------------------- its pace

    def count_outcomes(self, root: Node):
        """Count a search that has ended, for the share of solved questions."""
        nodes = [root]
        for node in nodes:
            nodes += node.children
        rewards = [node.reward for node in nodes if node.reward is not None]
        self.graded += bool(rewards)
        self.solved += max(rewards, default=0) > 0

    def pace(self, seconds: float) -> str:
        """Nodes and tokens per second, and the share of solved questions if outcomes are known."""
        text = f"{self.steps / seconds:.0f} nodes/s, {self.sampled_tokens / seconds:.0f} tokens/s"
        if self.graded:
            text += f", {100 * self.solved / self.graded:.0f} % solved"
        return text

    def to_device(self, array: np.ndarray) -> Tensor:
        """An array as a tensor on the model's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def common_prefix(prompts: list[list[int]]) -> list[int]:
    """What all prompts begin with, without their last tokens; nothing of a single prompt."""
    if len(prompts) < 2:
        return []
    ordered = sorted(prompts)  # what the first and the last in order share, all share
    return os.path.commonprefix([ordered[0][:-1], ordered[-1][:-1]])


def context_of(model: LlamaConfig, search) -> int:
    """Tokens of a prompt and its solution, at most; `search` is a mcts.SearchConfig."""
    return min(model.max_position_embeddings, search.max_tokens or model.max_position_embeddings)


def load_source(
    source: SourceConfig, question_seed: int, split: str
) -> tuple[Llama, StepTokenizer, list[Question]]:
    """The model, its tokenizer and the questions that a command names.

    `question_seed` draws the questions of a built-in task, and `split` is taken of datasets that
    are named without one.
    """
    limit = source.limit or None
    questions = load_questions(source.data, limit, question_seed, source.data_dir, split)
    folder, tokenizer = find_source(source)
    # in the built-in tasks, what no word covers is end-of-text
    ends = set(tokenizer.eos_ids) & set(tokenizer.encode_prompt(questions[0]))
    if is_built_in(source.data) and ends:
        raise InputError(
            f"--data {source.data}: the tokenizer of {folder} does not know its words; the "
            "model is of another task"
        )
    dtype = getattr(torch, source.dtype)
    return load_model(folder, use_device(source), dtype, source.seed), tokenizer, questions
