"""The tokenizer's files as transformers reads them: prompts, what ends a text, chat templates."""

import json
from datetime import datetime
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from data import Question, StepTokenizer
from support.chat import answer_end, chat_template
from support.flags import InputError
from support.tokenizer_files import read_tokenizer

transformers = pytest.importorskip("transformers")
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
WORDS = [*SPECIAL, *map(chr, range(32, 127)), "\n", "\u2581"]
UNK, BOS, EOS, START, IM_END, END_OF_TEXT = range(6)
SIZE = len(WORDS)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SILENT = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"


def build(post: str = "", special=SPECIAL) -> Tokenizer:
    """A tokenizer of one token a character; `post` is the template of its post-processor."""
    ids = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    if post:
        ends = [("<s>", BOS), ("</s>", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=ends)
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer | None = None, **files) -> Path:
    """A folder with a tokenizer and JSON files by name; a config.json ends texts with </s>."""
    (tokenizer or build()).save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "vocab_size": SIZE, "eos_token_id": EOS}
    for name, value in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def config(**changes) -> dict:
    return {"model_type": "llama", "vocab_size": SIZE, **changes}


def fast(**changes) -> dict:
    return {"tokenizer_class": "PreTrainedTokenizerFast", **changes}


def prompt(folder: Path, text: str) -> list[int]:
    return StepTokenizer.load(folder, "{question}").encode_prompt(Question("q", text, "1"))


# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("post", ["", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize(
    "name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None]
)
@pytest.mark.parametrize("switch", [None, True, False])
def test_prompts_are_those_of_transformers(tmp_path, capsys, post, name, switch):
    """Catches a <s> that is missing or too many, an end-of-text that stays at the end of a prompt,
    and an add_bos_token that is not what happens and of which nothing is said."""
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {} if name is None else {"tokenizer_class": name}
    settings |= {} if switch is None else {"add_bos_token": switch, "add_eos_token": switch}
    write(tmp_path, build(post), tokenizer_config=settings)
    twin = transformers.AutoTokenizer.from_pretrained(tmp_path)
    wanted = twin("1 + 1\nab").input_ids
    assert wanted[-1] == EOS or not post.endswith("</s>")
    assert prompt(tmp_path, "1 + 1\nab") == wanted[: len(wanted) - (wanted[-1] == EOS)]
    assert prompt(tmp_path, "a</s>")[-1] == EOS  # what the text itself holds stays
    claimed = switch if switch is not None or "Llama" not in str(name) else True
    differs = claimed is not None and claimed != post.startswith("<s>")
    assert ("add_bos_token" in capsys.readouterr().out) == differs


@pytest.mark.parametrize("name", ["TokenizersBackend", "LlamaTokenizer", "Qwen2Tokenizer"])
def test_folders_that_transformers_wrote(tmp_path, name):
    """Catches a folder of transformers 5 that is read in another way than it reads it itself."""
    if name == "TokenizersBackend":
        names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "</s>"}
        twin = transformers.PreTrainedTokenizerFast(tokenizer_object=build("<s> $A"), **names)
    else:
        twin = getattr(transformers, name)(
            vocab={word: index for index, word in enumerate(WORDS)},
            merges=[],
            extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        )
    twin.chat_template = CHATML
    twin.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config()))
    twin = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer, ends = read_tokenizer(tmp_path)
    assert ends == [twin.eos_token_id]
    assert tokenizer.get_vocab() == twin.get_vocab()
    for text in ("ab", "a<|im_end|>b"):
        assert prompt(tmp_path, text) == twin(text).input_ids
    turns = [{"role": "user", "content": "1+1"}]
    wanted = twin.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat_template(tmp_path)("1+1") == wanted
    loaded = StepTokenizer.load(tmp_path, "{question}", chat=chat_template(tmp_path))
    ids = twin.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert loaded.encode_prompt(Question("q", "1+1", "2")) == ids
    assert loaded.eos_ids[0] == IM_END


def test_nothing_is_cut_or_padded(tmp_path):
    """Catches a long prompt that loses its beginning or end to the truncation of tokenizer.json,
    and steps that are filled up with padding."""
    tokenizer = build()
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=9, pad_id=END_OF_TEXT, pad_token="<|endoftext|>")
    write(tmp_path, tokenizer)
    twin = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("ab", "a long text " * 30):
        assert prompt(tmp_path, text) == twin(text).input_ids
    steps = StepTokenizer.load(tmp_path).encode_steps("a\nb")
    assert [len(tokens) for tokens, _ in steps] == [2, 2]


# ----------------------------------------------------------------------------- what ends a text

# files -> (the ids that end a text, the trained one first; whether that is said)
ENDS = {
    "config.json alone": ({"config": config(eos_token_id=7)}, [7], False),
    "a list": ({"config": config(eos_token_id=[9, 7])}, [9, 7], False),
    "generation_config.json goes before config.json": (
        {"config": config(eos_token_id=7), "generation_config": {"eos_token_id": [9, 8]}},
        [9, 8],
        True,
    ),
    "generation_config.json without any": (
        {"config": config(eos_token_id=7), "generation_config": {"eos_token_id": None}},
        [7],
        False,
    ),
    "the tokenizer's alone": (
        {"config": config(), "tokenizer_config": fast(eos_token="</s>")},
        [EOS],
        False,
    ),
    "a fine-tune for <|im_end|>": (
        {
            "config": config(eos_token_id=EOS),
            "tokenizer_config": fast(eos_token="<|im_end|>"),
        },
        [IM_END, EOS],
        True,
    ),
    "Llama-3.1-Instruct": (
        {
            "config": config(eos_token_id=[EOS, START, IM_END]),
            "generation_config": {"eos_token_id": [EOS, START, IM_END]},
            "tokenizer_config": fast(eos_token="<|im_end|>"),
        },
        [IM_END, EOS, START],
        False,
    ),
    "an object, as llama-7b has it": (
        {
            "config": config(eos_token_id=EOS),
            "tokenizer_config": {
                "tokenizer_class": "LlamaTokenizer",
                "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
            },
        },
        [EOS],
        False,
    ),
    "special_tokens_map.json where the settings have none": (
        {
            "config": config(),
            "tokenizer_config": fast(eos_token=""),
            "special_tokens_map": {"eos_token": {"content": "<|im_end|>", "normalized": False}},
        },
        [IM_END],
        False,
    ),
    "special_tokens_map.json beside added_tokens_decoder": (
        {
            "config": config(),
            "tokenizer_config": fast(eos_token="</s>", added_tokens_decoder={}),
            "special_tokens_map": {"eos_token": "<|im_end|>"},
        },
        [EOS],
        False,
    ),
    "the default of the class": (
        {"config": config(), "tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}},
        [EOS],
        False,
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_a_text(tmp_path, capsys, name):
    """Catches a text that does not end where transformers or vLLM end it, the smallest id trained
    in the place of the tokenizer's eos_token, and files that disagree in silence."""
    files, wanted, said = ENDS[name]
    write(tmp_path, **files)
    assert read_tokenizer(tmp_path)[1] == wanted
    assert ("the files differ in what ends a text" in capsys.readouterr().out) == said
    ids, marks = StepTokenizer.load(tmp_path).encode_steps("a")[0]
    assert ids[-1] == wanted[0] and ids[-2] not in wanted and len(marks) == len(ids)
    if "tokenizer_config" in files:
        twin = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert twin.eos_token_id == wanted[0]


@pytest.mark.parametrize(
    "template, eos, wanted",
    [
        (CHATML, "<|endoftext|>", [IM_END, END_OF_TEXT]),  # Qwen2.5-Math
        (CHATML, "<|im_end|>", [IM_END, END_OF_TEXT]),
        (SILENT, "</s>", [EOS, END_OF_TEXT]),
        (SILENT.replace("]", " {{ eos_token }}"), "</s>", [EOS, END_OF_TEXT]),
        ("{{ raise_exception('no') }}", "</s>", [EOS, END_OF_TEXT]),
        ("{{ messages[-1].content }}<|nothing|>", None, [END_OF_TEXT]),
        ("{{ messages[-1].content }}\n<|im_end|></s>", "</s>", [IM_END, EOS, END_OF_TEXT]),
        ("{{ messages[-1].content }}. <|im_end|>", "</s>", [EOS, END_OF_TEXT]),
    ],
)
def test_chats_are_trained_to_end_as_their_template_does(tmp_path, template, eos, wanted):
    """Catches a chat model that is trained to end its turn with <|endoftext|>, or whose turn does
    not end at <|im_end|>."""
    settings = fast(eos_token=eos, chat_template=template)
    write(tmp_path, config=config(eos_token_id=END_OF_TEXT), tokenizer_config=settings)
    assert read_tokenizer(tmp_path, answer_end(tmp_path))[1] == wanted
    with_chat = StepTokenizer.load(tmp_path, chat=chat_template(tmp_path))
    assert with_chat.eos_ids == wanted and with_chat.encode_steps("a")[0][0][-1] == wanted[0]
    assert with_chat.tables_4V[0].nonzero()[:, 0].tolist() == sorted(wanted)
    first = END_OF_TEXT if eos is None else SPECIAL.index(eos)
    assert StepTokenizer.load(tmp_path).eos_ids[0] == first


WRONG = {  # what is wrong -> (files, message)
    "no end": ({"config": config()}, "nothing ends a text"),
    "no end by null": ({"config": config(eos_token_id=None)}, "nothing ends a text"),
    "an unknown eos_token": (
        {"config": config(), "tokenizer_config": fast(eos_token="<|no|>")},
        "nothing ends a text",
    ),
    "true": ({"config": config(eos_token_id=True)}, "eos_token_id"),
    "negative": ({"generation_config": {"eos_token_id": [EOS, -1]}}, "eos_token_id"),
    "too large": ({"config": config(eos_token_id=SIZE)}, "eos_token_id"),
    "text": ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id"),
    "eos_token a number": ({"tokenizer_config": fast(eos_token=2)}, "eos_token"),
    "eos_token without text": ({"tokenizer_config": fast(eos_token={"a": 1})}, "eos_token"),
    "eos_token a list": ({"special_tokens_map": {"eos_token": ["</s>"]}}, "eos_token"),
    "half a character": ({"tokenizer_config": fast(eos_token="\ud800")}, "added tokens"),
    "a list of numbers": ({"tokenizer_config": fast(extra_special_tokens=[1])}, "not a token"),
    "no list": ({"tokenizer_config": fast(additional_special_tokens=3)}, "not a list"),
    "added_tokens_decoder a list": (
        {"tokenizer_config": fast(added_tokens_decoder=[1])},
        "added tokens cannot be read",
    ),
    "an added token without text": (
        {"tokenizer_config": fast(added_tokens_decoder={"3": {"special": True}})},
        "added tokens cannot be read",
    ),
    "an added token of two numbers": (
        {"tokenizer_config": fast(added_tokens_decoder={"9": {"content": "</s>"}})},
        "has id 9 in",
    ),
    "a switch that is text": (
        {"tokenizer_config": fast(added_tokens_decoder={"2": {"content": "</s>", "lstrip": "a"}})},
        "added tokens cannot be read",
    ),
    "no number": ({"added_tokens": {"<x>": "y"}}, "added tokens cannot be read"),
    "vocab_size as text": ({"config": config(vocab_size="8")}, "vocab_size"),
    "another model's words": ({"config": config(vocab_size=SIZE - 1)}, "token ids up to"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_of_strangers(tmp_path, name):
    """Catches a traceback where one line is due, and a value of a wrong type that is used."""
    files, message = WRONG[name]
    write(tmp_path, **files)
    with pytest.raises(InputError, match=message) as error:
        read_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# ----------------------------------------------------------------------------------- added tokens


def test_a_padding_token_that_the_model_lacks(tmp_path, capsys):
    """Catches a fine-tune with one token more than embeddings that is refused, that token drawn or
    fed to the model, and no word of it."""
    tokenizer = build()
    tokenizer.add_tokens(["[PAD]"])
    write(tmp_path, tokenizer)
    words = StepTokenizer.load(tmp_path, "{question}")
    assert f"the model has {SIZE} token ids, none for '[PAD]'" in capsys.readouterr().out
    assert words.tables_4V.shape[1] == SIZE
    for width in (SIZE, SIZE + 9):  # some models have more logits than words
        logits_XV = torch.zeros(50, width)
        for temperature in (0, 1.0):
            token_X, logp_X = words.draw(logits_XV, torch.linspace(0, 0.999, 50), temperature)
            assert token_X.max() < SIZE and logp_X.isfinite().all()
    with pytest.raises(InputError, match="question q: its prompt has token '.PAD.'"):
        words.encode_prompt(Question("q", "a[PAD]", "1"))
    with pytest.raises(InputError, match="a worked solution, 'a.PAD.', has token"):
        words.encode_steps("a[PAD]")
    words.tokenizer.encode_special_tokens = True  # as the output of code is encoded
    assert max(words.encode("a[PAD]")) < SIZE


@pytest.mark.parametrize(
    "files",
    [
        {"special_tokens_map": {"eos_token": "<|eot|>", "pad_token": "[PAD]"}},
        {"tokenizer_config": fast(eos_token="<|eot|>", pad_token="[PAD]")},
        {"tokenizer_config": fast(additional_special_tokens=["<|eot|>", "[PAD]"])},
        {"tokenizer_config": fast(extra_special_tokens=["<|eot|>"], eot_token="[PAD]")},
        {
            "tokenizer_config": fast(
                eos_token="<|eot|>",
                added_tokens_decoder={
                    str(SIZE + 1): {"content": "[PAD]", "special": True, "lstrip": True},
                    str(SIZE): {"content": "<|eot|>", "special": True},
                },
            )
        },
        {
            "special_tokens_map": {"eos_token": "<|eot|>"},
            "added_tokens": {"<|eot|>": SIZE, "[PAD]": SIZE + 1},
        },
    ],
)
def test_tokens_beside_tokenizer_json(tmp_path, files):
    """Catches an eos or padding token that only another file names, and that is cut into letters;
    and other ids for such tokens than in transformers."""
    write(tmp_path, **{"config": config(vocab_size=SIZE + 2, eos_token_id=EOS), **files})
    twin = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer, ends = read_tokenizer(tmp_path)
    assert tokenizer.get_vocab() == twin.get_vocab() and len(twin) == SIZE + 2
    assert ends == [*({twin.eos_token_id} - {None}), EOS]
    for text in ("a<|eot|>b [PAD]", "[PAD]<|eot|>"):
        ids = prompt(tmp_path, text)
        assert ids == twin(text).input_ids and {SIZE, SIZE + 1} <= set(ids)
        skipped = tokenizer.decode(ids)
        assert skipped == twin.decode(ids, skip_special_tokens=True) and "eot" not in skipped


# --------------------------------------------------------------------------------- chat templates

CHATS = {
    "generation": "{% for m in messages %}{% set x = m.role %}[{{ x }}]\n"
    "  {% generation %}\n  {{ m.content }}{{ loop.index }}{% set x = 'in' %}{{ x }}\n"
    "  {% endgeneration %}\n{{ x }}{% endfor %}",
    "the date": "{{ strftime_now('%d %B %Y') }} {{ messages[0].content }}",
    "tojson": "{{ messages | tojson }}{{ {'b': '<é>', 'a': 1} | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}"
    "{{ 'é' | tojson(ensure_ascii=True) }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|"
    "{{ sep_token }}|{{ eot_token }}|{{ nothing }}|{{ tools is none }}{{ documents is none }}",
    "break": "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}",
}
NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
MAP = {"sep_token": "</s>", "bos_token": {"content": "<s>", "lstrip": False}}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("apart", [False, True])
def test_chats_as_transformers_renders_them(tmp_path, name, apart):
    """Catches templates that are refused though transformers renders them, and special tokens that
    stand in special_tokens_map.json and are rendered as nothing."""
    settings = fast(eos_token="</s>", unk_token="<unk>", pad_token="", eot_token="<|im_end|>")
    if apart:
        (tmp_path / "chat_template.jinja").write_text(CHATS[name])
    else:
        settings["chat_template"] = CHATS[name]
    write(tmp_path, tokenizer_config=settings, special_tokens_map=MAP)
    assert chat_template(tmp_path)("1 < 2é") == by_transformers(tmp_path, "1 < 2é")
    today = datetime.now().strftime("%Y")
    assert name != "the date" or today in chat_template(tmp_path)("1")


def test_chats_have_the_special_tokens_of_the_class(tmp_path):
    """Catches a <s> that the settings need not name, and that is rendered as nothing."""
    template = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}"
    settings = {"tokenizer_class": "LlamaTokenizer", "chat_template": template}
    for more in ({}, {"bos_token": None}, {"eos_token": "<|im_end|>"}):
        write(tmp_path, tokenizer_config=settings | more)
        assert chat_template(tmp_path)("1") == by_transformers(tmp_path, "1")


def by_transformers(folder: Path, text: str) -> str:
    twin = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": text}]
    return twin.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "settings, files",
    [
        (CHATML, {}),
        (NAMED, {}),
        (None, {"chat_template.jinja": CHATML}),
        ("another", {"chat_template.jinja": CHATML}),
        (None, {"chat_template.jinja": CHATML, "additional_chat_templates/x.jinja": "another"}),
        ("another", {"additional_chat_templates/default.jinja": CHATML}),
        (NAMED[:1], {}),
        ("another", {"additional_chat_templates/x.jinja": "another"}),
    ],
)
def test_places_of_chat_templates(tmp_path, settings, files):
    """Catches the template of another file, or of another name, than transformers takes."""
    changes = {"chat_template": settings} if settings else {}
    write(tmp_path, tokenizer_config=fast(**changes))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    if CHATML not in (settings, *files.values()) and settings is not NAMED:
        with pytest.raises(ValueError):
            by_transformers(tmp_path, "1+1")
        with pytest.raises(InputError, match="no default chat template"):
            chat_template(tmp_path)
        return
    wanted = by_transformers(tmp_path, "1+1")
    assert chat_template(tmp_path)("1+1") == wanted and wanted.startswith("<|im_start|>user")


def test_a_template_of_a_processor(tmp_path):
    """Catches chat_template.json, in which processors keep a template, that is not found."""
    write(tmp_path, chat_template={"chat_template": CHATML})
    assert chat_template(tmp_path)("1").startswith("<|im_start|>user\n1")


@pytest.mark.parametrize("template", [3, [3], {"default": 3}, [{"name": [1], "template": 1}]])
def test_templates_of_wrong_types(tmp_path, template):
    """Catches a traceback where one line is due."""
    write(tmp_path, tokenizer_config=fast(chat_template=template))
    with pytest.raises(InputError, match="--chat"):
        chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="chat_template.jinja: cannot be read"):
        chat_template(tmp_path)


def test_a_template_that_writes_bos(tmp_path):
    """Catches two <s> in front of a chat whose template writes one itself."""
    settings = fast(bos_token="<s>", eos_token="</s>", chat_template=SILENT)
    write(tmp_path, build("<s> $A"), tokenizer_config=settings)
    words = StepTokenizer.load(tmp_path, chat=chat_template(tmp_path))
    twin = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "1+1"}]
    wanted = twin.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    ids = words.encode_prompt(Question("q", "1+1", "2"))
    assert ids == wanted and ids.count(BOS) == 1
