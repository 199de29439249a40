"""XML steps, code that runs, chat templates, and tokenizers that put a space before a text."""

import json
import time
from dataclasses import replace

import pytest
import torch
from conftest import redraw, tiny_config
from tokenizers import Tokenizer, decoders, models, normalizers

from data import (
    LINES,
    PARAGRAPHS,
    XML,
    Question,
    SourceConfig,
    StepTokenizer,
    find_source,
    solution_tree,
)
from engine import Tick
from mcts import SearchConfig, search_trees
from model import Llama
from support.chat import chat_template
from support.flags import InputError
from svpo import LossConfig, learn, pack, rescore
from tasks.code_steps import ends_code, find_blocks, output_tokens, run_code, split_xml
from tasks.grading import extract_answer
from tasks.sandbox import run

SOLUTION = """<step>
<p>
Each box holds 3 toys.
</p>
<code>
toys = 4 * 3
print(toys)
</code>
<output>
12
</output>
</step>
<step>
<p>
Final Answer: 12
</p>
</step>"""


@pytest.fixture
def xml_tokenizer() -> StepTokenizer:
    return StepTokenizer(characters_tokenizer(), [0], steps=XML, tools=True)


def characters_tokenizer() -> Tokenizer:
    """One token a character."""
    texts = ["<eos>", "\n", *map(chr, range(32, 127))]
    characters = {text: number for number, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(characters, [], unk_token="<eos>"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def test_code_computes():
    """Catches a sandbox in which nothing works, state that is lost between steps, and earlier
    output shown twice."""
    blocks = ["print('a')\nx = 3", "1 / 0", "import math\nprint(x)\nmath.sqrt(x + 6)"]
    assert run(blocks) == ("3\n3.0\n", "")
    writes = "import os\nopen('f', 'w').write('f')\nprint(sorted(os.environ), os.listdir())"
    assert run([writes])[0].endswith("['f']\n")
    assert run(["x = 1"])[0] == "" and run(["import os\nprint(os.listdir())"])[0] == "[]\n"
    assert run(["raise SystemExit"])[0] == "SystemExit: \n"
    assert run(["x ="])[0].startswith("SyntaxError")
    first = "import os\nos.write(1, b'no')\nprint('x' * 10**6)"
    assert run([first, "from sys import stdout as o", "o.write('b')"]) == ("b1\n", "")
    assert run(["  x = 1\n  print(x)"]) == ("1\n", "")
    draws = ["import random\nrandom.random(), hash('a')"]
    assert run(draws) == run(draws)


def test_output_is_added_and_cannot_end_itself(xml_tokenizer):
    """Catches output that closes its own tag, blocks of siblings that see one another's state,
    blocks that are not found, and blocks that were stopped and run again."""
    before = "<code>\nx = 1\n</code>\n<output>\n</output>\n</step>\n<step>\n"
    fenced = "<code>\n```python\nprint(x)\n```\n</code>\n"
    found = run_code([before + "<code>\nprint(x)\n</code>", fenced])
    assert found == [("1", ""), ("NameError: name 'x' is not defined", "")]
    opening = "<code>print('<output>')</code><output>\n</output><code>6</code>"
    assert run_code(["<p> x </code>", opening]) == [("", ""), ("6", "")]
    assert len(run_code(["<code>print('x' * 9999)</code>"])[0][0]) == 2000
    begin = time.monotonic()
    first = "<code>\nwhile True: pass\n</code>"
    (stopped,) = output_tokens(xml_tokenizer, [first], [200])
    stopped = xml_tokenizer.tokenizer.decode(stopped)
    assert stopped == '\n<output stopped="time">\n</output>\n'
    after = f"{first}{stopped}<code>\nprint(7)\n</code>"
    assert run_code([after]) == [("7", "")] and time.monotonic() - begin < 30
    claim = "<code>\ny = 8\nprint('[stopped: time]', '<output stopped=\"time\">')\n</code>"
    (claimed,) = output_tokens(xml_tokenizer, [claim], [200])
    claimed = xml_tokenizer.tokenizer.decode(claimed)
    assert run_code([f"{claim}{claimed}<code>y</code>"]) == [("8", "")]  # it was not stopped
    (long,) = output_tokens(xml_tokenizer, ["<code>print('x' * 500)</code>"], [200])
    text = xml_tokenizer.tokenizer.decode(long)
    assert 150 < len(long) <= 184
    assert text.startswith("\n<output>\nxxx") and text.endswith("x\n</output>\n")


@pytest.mark.parametrize(
    "normalizer, printed, shown",
    [
        (None, "1 < 2, a<b>, </b>", "1 < 2, a<b>, </b>"),
        (None, "</output>#### 5", "<\\/output>#### 5"),
        (None, "</ STEP >", "<\\/ STEP >"),
        (None, "<step><code>", "<\\step><\\code>"),
        (normalizers.NFKC(), "\uff1c/output>", "?/output?"),
        (normalizers.Replace("<\\", "<"), "</output>", "?/output?"),
        (normalizers.Replace("?/out", "</out"), "</output>", "<\\/output>"),
    ],
)
def test_output_cannot_hold_a_tag(xml_tokenizer, normalizer, printed, shown):
    """Catches output that closes its own tag, or states an answer behind it, once it is tokens."""
    if normalizer:
        xml_tokenizer.tokenizer.normalizer = normalizer
    code = f"<code>\nprint({printed!r})\n</code>"
    (ids,) = output_tokens(xml_tokenizer, [code], [200])
    text = xml_tokenizer.tokenizer.decode(ids)
    assert text == f"\n<output>\n{shown}\n</output>\n"
    assert extract_answer(code + text) is None and text.count("</output") == 1


def test_output_cannot_hide_a_tag_behind_special_tokens(xml_tokenizer):
    """Catches a special token for unknown letters, which is not shown, within a tag; and an end of
    text that is no special token."""
    tokenizer = xml_tokenizer.tokenizer
    code = "<code>print('<' + chr(233) + '/output> 5')</code>"
    (ids,) = output_tokens(xml_tokenizer, [code], [200])
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip).count("</output>") == 1
    tokenizer.add_tokens(["<|end|>"])
    xml_tokenizer.eos_ids = [tokenizer.token_to_id("<|end|>")]
    (ids,) = output_tokens(xml_tokenizer, ["<code>print('a <|end|> b')</code>"], [200])
    assert xml_tokenizer.eos_ids[0] not in ids


def test_a_failure_of_the_sandbox_costs_a_block(xml_tokenizer, monkeypatch, capsys):
    """Catches a search that ends because one process could not be started."""
    from tasks import code_steps

    def fail(blocks):
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr(code_steps.sandbox, "run", fail)
    (ids,) = output_tokens(xml_tokenizer, ["<code>6</code>"], [200])
    text = xml_tokenizer.tokenizer.decode(ids)
    assert text == '\n<output stopped="failure">\n</output>\n'
    assert "a block of code was not run: Resource" in capsys.readouterr().out
    with pytest.raises(OSError, match="Resource"):
        code_steps.check_sandbox()


@pytest.mark.parametrize(
    "text",
    [
        "<code>" * 10**5,
        "<code></code>" * 10**5,
        "<code></code><output>" * 10**5,
        "<code></code>" + " " * 10**6 + "<output",
        "</step>" * 10**5,
        "<code></code>\n<output stopped=" * 10**5,
    ],
)
def test_long_xml_is_split_in_linear_time(text):
    """Catches patterns that take quadratic time: 46 s for one of these."""
    begin = time.monotonic()
    assert "".join(part for step in split_xml(text) for part, _ in step) == text.strip()
    list(find_blocks(text))
    assert time.monotonic() - begin < 2


def test_tags_may_close_within_a_token():
    """Catches steps that do not end, and code that does not run, where a token holds more than the
    end of a tag."""
    assert XML.ended("<step> 1 </step><", "<step> 1 </step")
    assert not XML.ended("a </step> b>", "a </step> b")
    assert ends_code("<code>1</code></", "<code>1</code")
    assert not ends_code("<code>", "<code") and not ends_code("1</code>", "1</code")


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<p>\nThe answer is 10.</p></step>", "10"),
        ("<p>Final Answer: 10</p>", "10"),
        ("<code>\nprint('The answer is', 5 * 2)", None),
        ("<code>\n#### count\n</code>", None),
        ("<output>\n#### 3\n</output>", None),
        ("<code>\nx = 1 # </think>\nprint('#### 5')\n</code>", None),
        ("<think> <code> </think> The answer is 5", "5"),
        ("<output>\n3\n</output>\nFinal Answer: 4\n</p>", "4"),
    ],
)
def test_answers_of_xml_steps(text, answer):
    """Catches answers read out of code and its output, and tags taken for a part of them."""
    assert extract_answer(text) == answer


def test_worked_xml_solution_from_text_to_loss(xml_tokenizer):
    """Catches output that is trained on, steps cut at the wrong place, and text that does not come
    back."""
    written = [[by_model for _, by_model in step] for step in split_xml(SOLUTION)]
    assert written == [[True, False, True], [True]]
    assert XML.steps(SOLUTION) == split_xml(SOLUTION)
    decode = xml_tokenizer.tokenizer.decode
    tree = solution_tree(Question("q", "4 boxes of 3?", "12", SOLUTION), xml_tokenizer)
    assert "".join(decode(node.tokens) for node in tree.nodes[1:]) == SOLUTION
    step = tree.nodes[1]
    marked = list(zip(step.tokens, step.sampled))
    output = "\n<output>\n12\n</output>\n"
    assert decode([token for token, sampled in marked if not sampled]) == output
    packed = pack([learn(tree, LossConfig("sft")).tree])
    assert len(packed.target_M) == len(SOLUTION) + 1 - len(output)
    model = redraw(Llama(tiny_config(vocab_size=97)), std=0.1)
    logp = rescore(model, [tree])[0].nodes[1].logp
    with torch.no_grad():
        ids = torch.tensor([sum((node.tokens for node in tree.nodes[:2]), [])])
        logp_T = model(ids)[0][0].log_softmax(-1)
    first = len(tree.nodes[0].tokens)
    wanted = 0.0
    for place, (token, sampled) in enumerate(marked, first):
        wanted += logp_T[place - 1, token].item() if sampled else 0.0
    assert logp == pytest.approx(wanted, abs=1e-3)


def test_search_runs_code(xml_tokenizer, monkeypatch):
    """Catches output that is sampled, not fed, or not marked in the tree; steps that do not end at
    their tag; code that is not run."""
    model = redraw(Llama(tiny_config(vocab_size=97, max_position_embeddings=1024)), std=0.1).eval()
    question = Question("q", "5 * 2?", "10")
    prompt = len(xml_tokenizer.encode_prompt(question))
    output = "\n<output>\n10\n</output>\n"
    first = "<step>\n<code>\nprint(5 * 2)\n</code>"
    # what the model "writes"; where there is output, it would write something else
    script = first + "?" * len(output) + "</step><step>\nFinal Answer: 10\n</step>"
    places = []  # in the script, of the tokens of a tick
    feed = Tick.__call__

    def noted(self, lane_X, uniform_X, given_X, slot_X, position_X, mask_B1NS):
        places[:] = (position_X - prompt).tolist()
        return feed(self, lane_X, uniform_X, given_X, slot_X, position_X, mask_B1NS)

    def draw(logits_XV, uniform_X, temperature):
        tokens = xml_tokenizer.tokenizer.encode("".join(script[place] for place in places)).ids
        return torch.tensor(tokens), torch.full((len(tokens),), -0.5)

    monkeypatch.setattr(Tick, "__call__", noted)
    monkeypatch.setattr(xml_tokenizer, "draw", draw)
    config = SearchConfig(simulations=3, expand_width=2, max_step_tokens=128, max_depth=3)
    (tree,) = search_trees(model, xml_tokenizer, [question], config)
    step, last = tree.nodes[1:]
    text = xml_tokenizer.tokenizer.decode(step.tokens)
    assert text == f"{first}{output}</step>"
    assert step.sampled.count(False) == len(output)
    assert step.logp == -0.5 * step.sampled.count(True)
    assert step.prior == pytest.approx(0.6065, abs=1e-3)
    assert last.reward == 1.0 and last.ending == "answer" and not tree.nodes[0].sampled[0]
    value = rescore(model, [tree])[0].nodes[1].value
    assert step.value == pytest.approx(value, abs=1e-4)  # the output was fed


def test_tools_need_xml(model_folder):
    """Catches flags that are ignored."""
    source = SourceConfig(model=str(model_folder), data="x", tools="python")
    for steps in ("", "lines", "paragraphs"):
        with pytest.raises(InputError, match="--steps xml"):
            find_source(replace(source, steps=steps))
    _, tokenizer = find_source(replace(source, steps="xml"))
    assert tokenizer.steps is XML and tokenizer.tools


def test_flags_choose_what_ends_a_step(model_folder):
    """Catches a format of --steps that another one stands for."""
    formats = {"": LINES, "lines": LINES, "paragraphs": PARAGRAPHS, "xml": XML}
    for name, wanted in formats.items():
        source = SourceConfig(model=str(model_folder), data="x", steps=name)
        _, tokenizer = find_source(source)
        assert tokenizer.steps is wanted and not tokenizer.tools


def test_pieces_have_no_space_of_their_own():
    """Catches worked solutions whose steps begin with a token that the model would not write there
    (LLaMA's tokenizer)."""
    words = ["<unk>", "<s>", "</s>", "\n", "▁", "a", "b", "6", "▁a", "▁b", "▁6"]
    ids = {word: index for index, word in enumerate(words)}
    merges = [("▁", "a"), ("▁", "b"), ("▁", "6")]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>"))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    letters = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(letters)
    steps = StepTokenizer(tokenizer, [2]).encode_steps("a 6\nb a\n6")
    assert sum((ids for ids, _ in steps), []) == tokenizer.encode("\na 6\nb a\n6").ids[2:] + [2]


TEMPLATES = [
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] | trim + eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{{ bos_token }}{%- for m in messages -%}\n"
    "  {%- if loop.first and m.role != 'system' %}{{ 'You help.' }}{% endif %}\n"
    "[{{ m.role }}] {{ m.content }}\n"
    "{%- endfor %}\n"
    "{% if add_generation_prompt %}\n[assistant]{% endif %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("apart", [False, True])
def test_chat_templates_as_transformers_renders_them(tmp_path, model_folder, template, apart):
    """Catches other settings of jinja2 than the templates are written for, and special tokens that
    are missing or doubled."""
    transformers = pytest.importorskip("transformers")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "bos_token": {"__type": "AddedToken", "content": "<eos>"},
    }
    if apart:
        (model_folder / "chat_template.jinja").write_text(template)
    else:
        settings["chat_template"] = template
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    twin = transformers.AutoTokenizer.from_pretrained(model_folder)
    message = [{"role": "user", "content": "1+1"}]
    wanted = twin.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert chat_template(model_folder)("1+1") == wanted


def test_a_damaged_tokenizer_config_is_refused(tmp_path):
    """Catches a traceback where one line is due."""
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer_config.json: not valid JSON"):
        chat_template(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only systems') }}",
        "{{ messages[3].role }}",
        "{% for %}",
        "{{ ''.__class__.__mro__ }}",
        None,
    ],
)
def test_failing_chat_templates_are_refused(tmp_path, template):
    """Catches a template that fails in silence, and one that gets out of its sandbox."""
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="--chat"):
        chat_template(tmp_path)("1+1")
