"""XML steps, code that runs, chat templates, and tokenizers that put a space before what comes first."""
import json
import os
import tempfile
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers

from conftest import redraw, tiny_config
from data import Question, SourceConfig, StepTokenizer, find_source, solution_tree
from eval import rescore
from mcts import Driver, SearchConfig, search_trees
from model import Llama
from svpo import InputError, LossConfig, learn, pack
from tasks.grading import extract_answer
from tasks.sandbox import run
from tasks.steps import chat_template, closed, output_tokens, run_code, split_xml

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
    return StepTokenizer(characters_tokenizer(), [0], xml=True, tools=True)


def characters_tokenizer() -> Tokenizer:
    """One token a character."""
    characters = {"<eos>": 0} | {chr(code): number for number, code in enumerate([10, *range(32, 127)], 1)}
    tokenizer = Tokenizer(models.BPE(characters, [], unk_token="<eos>"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


HOSTILE = {  # snippet, what it prints or the limit that stops it, what holds it
    "fork bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "another program": ("import subprocess\nsubprocess.run(['ls', '/'])", "PermissionError"),
    "a program in its place": ("import os\nos.execv('/bin/ls', ['ls', '/'])", "PermissionError"),
    "a child left behind": ("import os\nif os.fork() == 0:\n    import time\n    time.sleep(1000)", "PermissionError"),
    "threads": ("import threading\nthreading.Thread(target=print).start()", "RuntimeError"),
    "infinite loop": ("while True: pass", "time"),
    "sleep": ("import time\ntime.sleep(1000)", "time"),
    "output closed, then sleep": ("import os, time\nos.close(1), os.close(2)\ntime.sleep(1000)", "time"),
    "10 GB allocation": ("x = bytearray(10**10)", "MemoryError"),
    "limits raised": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nx = bytearray(10**10)", "Error: "),
    "endless print": ("while True: print('a' * 100)", "output"),
    "endless recursion": ("f = lambda: f()\nf()", "RecursionError"),
    "environment of the parent": ("import os\nprint(open(f'/proc/{os.getppid()}/environ').read())", "PermissionError"),
    "file outside": ("print(open('/etc/passwd').read())", "PermissionError"),
    "link to a file outside": ("import os\nos.symlink('/etc/passwd', 'p')\nprint(open('p').read())", "PermissionError"),
    "folder outside": ("import os\nprint(os.listdir('/root'), os.listdir('/home'))", "PermissionError"),
    "socket": ("import socket\nsocket.create_connection(('1.1.1.1', 53))", "PermissionError"),
    "datagram": ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "PermissionError"),
    "write outside": ("open('/tmp/svpo-hostile', 'w').write('x')", "PermissionError"),
    "mode of a file outside": ("import os\nos.chmod('/tmp', 0o700)", "PermissionError"),
    "owner of a file outside": ("import os\nos.chown('/tmp', 0, 0)", "PermissionError"),
    "attribute of a file outside": ("import os\nos.setxattr('/tmp', 'user.x', b'1')", "PermissionError"),
    "attribute by a newer call": ("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.syscall(463, -100, b'/tmp', 0, b'user.x', 0, 0)\n"
                                  "print(ctypes.get_errno())", "1\n"),
    "flags of a file": ("import fcntl, os\nfcntl.ioctl(os.open('.', os.O_RDONLY), 0x40086602, b'12345678')", "PermissionError"),
    "memory file": ("import os\nos.memfd_create('x')", "PermissionError"),
    "reserved disk": ("import os\nos.posix_fallocate(os.open('f', os.O_RDWR | os.O_CREAT), 0, 10**9)", "rror"),
    "shared memory": ("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.shmget(1, 4096, 0o1600), ctypes.get_errno())", "-1 1\n"),
    "tracing": ("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.ptrace(0, 0, 0, 0), ctypes.get_errno())", "-1 1\n"),
    "longer than its parent": ("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.prctl(1, 0), ctypes.get_errno())", "-1 1\n"),
    "signal by a descriptor": ("import fcntl, os\nread, write = os.pipe()\nfcntl.fcntl(read, fcntl.F_SETOWN, os.getppid())", "PermissionError"),
    "nested folders": ("import os\nfor _ in range(3000): os.mkdir('d'), os.chdir('d')\nprint('made')", "made"),
    "folder without permissions": ("import os\nos.makedirs('d/e')\nos.mkdir('f', 0)\nprint('made')", "made"),
    "closed output": ("import sys\nwith sys.stdout as f: pass\nprint(3)", ""),
    "error that fails": ("class E(Exception):\n    def __str__(self): raise E\nraise E", "E\n"),
    "surrogates": ("raise ValueError(chr(0xd800))", "ValueError"),
    "status 1": ("import os, sys\nsys.stderr.write('x' * 10**7)\nsys.stderr.flush()\nos._exit(1)", ""),
    "real-time signal": ("import os, signal\nsignal.raise_signal(40)", "rror"),
    "signal to the parent": ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
    "large file": ("open('big', 'w').write('x' * 10**8)", "File too large"),
    "crash": ("import ctypes\nctypes.string_at(0)", "signal 11"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_is_contained(name, monkeypatch, tmp_path):
    """Catches a limit that does not hold."""
    monkeypatch.setenv("SECRET", "geheim")
    code, held = HOSTILE[name]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # to see that nothing is left there
    before, begin = set(os.listdir(tempfile.gettempdir())), time.monotonic()
    printed, limit = run([code])
    assert held in (limit or printed) and time.monotonic() - begin < 30
    assert "root:" not in printed and "geheim" not in printed and not os.path.exists("/tmp/svpo-hostile")
    assert (limit != "") == (held in ("time", "output", "signal 11"))
    assert set(os.listdir(tempfile.gettempdir())) <= before


def test_code_computes():
    """Catches a sandbox in which nothing works, state that is lost between steps, and earlier output shown twice."""
    assert run(["print('a')\nx = 3", "1 / 0", "import math\nprint(x)\nmath.sqrt(x + 6)"]) == ("3\n3.0\n", "")
    assert run(["import os\nopen('f', 'w').write('f')\nprint(sorted(os.environ), os.listdir())"])[0].endswith("['f']\n")
    assert run(["x = 1"])[0] == "" and run(["import os\nprint(os.listdir())"])[0] == "[]\n"
    assert run(["raise SystemExit"])[0] == "SystemExit: \n" and run(["x ="])[0].startswith("SyntaxError")
    assert run(["import os\nos.write(1, b'no')\nprint('x' * 10**6)", "from sys import stdout as o", "o.write('b')"]) == ("b1\n", "")
    assert run(["  x = 1\n  print(x)"]) == ("1\n", "")
    assert run(["import random\nrandom.random(), hash('a')"]) == run(["import random\nrandom.random(), hash('a')"])


def test_output_is_added_and_cannot_end_itself(xml_tokenizer):
    """Catches output that closes its own tag, blocks of siblings that see one another's state, blocks that are not found, and blocks
    that were stopped and run again."""
    assert run_code(["<code>\nx = 1\n</code>\n<output>\n</output>\n</step>\n<step>\n<code>\nprint(x)\n</code>",
                     "<code>\n```python\nprint(x)\n```\n</code>\n"]) == ["1", "NameError: name 'x' is not defined"]
    assert run_code(["<code>\nprint('</output>#### 5')\n</code>", "<p> x </code>", "<code>print('<output>')</code><output>\n</output><code>6</code>"]) == [
        "<\\/output>#### 5", "", "6"]
    assert len(run_code(["<code>print('x' * 9999)</code>"])[0]) == 2000
    begin = time.monotonic()
    first = "<code>\nwhile True: pass\n</code>"
    printed, = run_code([first])
    assert printed == "[stopped: time]"
    assert run_code([f"{first}\n<output>\n{printed}\n</output>\n<code>\nprint(7)\n</code>"]) == ["7"] and time.monotonic() - begin < 30
    long, = output_tokens(xml_tokenizer, ["<code>print('x' * 500)</code>"], [200])
    text = xml_tokenizer.tokenizer.decode(long)
    assert 150 < len(long) <= 184 and text.startswith("\n<output>\nxxx") and text.endswith("x\n</output>\n")


def test_tags_may_close_within_a_token():
    """Catches steps that do not end, and code that does not run, where a token holds more than the end of a tag."""
    assert closed("step", "<step> 1 </step><", "<step> 1 </step") and not closed("step", "a </step> b>", "a </step> b")
    assert closed("code", "<code>1</code></", "<code>1</code") and not closed("code", "<code>", "<code")


@pytest.mark.parametrize("text, answer", [
    ("<p>\nThe answer is 10.</p></step>", "10"), ("<p>Final Answer: 10</p>", "10"), ("<code>\nprint('The answer is', 5 * 2)", None),
    ("<code>\n#### count\n</code>", None), ("<output>\n#### 3\n</output>", None), ("<output>\n3\n</output>\nFinal Answer: 4\n</p>", "4")])
def test_answers_of_xml_steps(text, answer):
    """Catches answers read out of code and its output, and tags taken for a part of them."""
    assert extract_answer(text) == answer


def test_worked_xml_solution_from_text_to_loss(xml_tokenizer):
    """Catches output that is trained on, steps cut at the wrong place, and text that does not come back."""
    assert [[written for _, written in step] for step in split_xml(SOLUTION)] == [[True, False, True], [True]]
    tree = solution_tree(Question("q", "4 boxes of 3?", "12", SOLUTION), xml_tokenizer)
    assert "".join(xml_tokenizer.tokenizer.decode(node.tokens) for node in tree.nodes[1:]) == SOLUTION
    step = tree.nodes[1]
    assert xml_tokenizer.tokenizer.decode([token for token, written in zip(step.tokens, step.sampled) if not written]) == "\n<output>\n12\n</output>\n"
    packed = pack([learn(tree, LossConfig("sft")).tree])
    assert len(packed.target_M) == len(SOLUTION) + 1 - len("\n<output>\n12\n</output>\n")
    model = redraw(Llama(tiny_config(vocab_size=97)), std=0.1)
    logp = rescore(model, [tree])[0].nodes[1].logp
    with torch.no_grad():
        ids = torch.tensor([sum((node.tokens for node in tree.nodes[:2]), [])])
        logp_T = model(ids)[0][0].log_softmax(-1)
    first = len(tree.nodes[0].tokens)
    wanted = sum(logp_T[first + place - 1, token].item() for place, (token, written) in enumerate(zip(step.tokens, step.sampled)) if written)
    assert logp == pytest.approx(wanted, abs=1e-3)


def test_search_runs_code(xml_tokenizer, monkeypatch):
    """Catches output that is sampled, not fed, or not marked in the tree; steps that do not end at their tag; code that is not run."""
    model = redraw(Llama(tiny_config(vocab_size=97, max_position_embeddings=1024)), std=0.1).eval()
    script = "<step>\n<code>\nprint(5 * 2)\n</code></step><step>\nFinal Answer: 10\n</step>"
    written = {}

    def draw(logits_XV, uniform_X, temperature):  # the model "writes" the script
        lanes = driver.live.nonzero()[0]
        token = []
        for lane in lanes:
            own = sum((node.sampled.count(True) for node in driver.parent[lane].path()), 0)
            own += int((driver.given_XC[lane, :driver.length[lane] - 1] < 0).sum())
            token.append(xml_tokenizer.tokenizer.encode(script[own]).ids[0])
        return torch.tensor(token), torch.full((len(token),), -0.5)
    monkeypatch.setattr(xml_tokenizer, "draw", draw)
    config = SearchConfig(simulations=3, expand_width=2, max_step_tokens=128, max_depth=3)
    question = Question("q", "5 * 2?", "10")
    monkeypatch.setattr("mcts.Driver.__init__", lambda self, *rest, init=Driver.__init__, **more: (init(self, *rest, **more), written.update(driver=self))[0])

    class Live:
        def __getattr__(self, name):
            return getattr(written["driver"], name)
    driver = Live()
    tree, = search_trees(model, xml_tokenizer, [question], config)
    step, last = tree.nodes[1:]
    assert xml_tokenizer.tokenizer.decode(step.tokens) == "<step>\n<code>\nprint(5 * 2)\n</code>\n<output>\n10\n</output>\n</step>"
    assert step.sampled.count(False) == len("\n<output>\n10\n</output>\n") and step.logp == -0.5 * step.sampled.count(True)
    assert step.prior == pytest.approx(0.6065, abs=1e-3)
    assert last.reward == 1.0 and last.ending == "answer" and not tree.nodes[0].sampled[0]
    assert tree.nodes[1].value == pytest.approx(rescore(model, [tree])[0].nodes[1].value, abs=1e-4)  # the output was fed


def test_tools_need_xml(model_folder, tmp_path):
    """Catches flags that are ignored."""
    with pytest.raises(InputError, match="--steps xml"):
        find_source(SourceConfig(model=str(model_folder), data="x", tools="python"))
    folder, tokenizer = find_source(SourceConfig(model=str(model_folder), data="x", tools="python", steps="xml"))
    assert tokenizer.xml and tokenizer.tools


def test_pieces_have_no_space_of_their_own():
    """Catches worked solutions whose steps begin with a token that the model would not write there (LLaMA's tokenizer)."""
    words = ["<unk>", "<s>", "</s>", "\n", "▁", "a", "b", "6", "▁a", "▁b", "▁6"]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [("▁", "a"), ("▁", "b"), ("▁", "6")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    steps = StepTokenizer(tokenizer, [2]).encode_steps("a 6\nb a\n6")
    assert sum((ids for ids, _ in steps), []) == tokenizer.encode("\na 6\nb a\n6").ids[2:] + [2]


TEMPLATES = [
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim + eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{{ bos_token }}{%- for m in messages -%}\n  {%- if loop.first and m.role != 'system' %}{{ 'You help.' }}{% endif %}\n[{{ m.role }}] {{ m.content }}\n{%- endfor %}\n"
    "{% if add_generation_prompt %}\n[assistant]{% endif %}"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("apart", [False, True])
def test_chat_templates_as_transformers_renders_them(tmp_path, model_folder, template, apart):
    """Catches other settings of jinja2 than the templates are written for, and special tokens that are missing or doubled."""
    transformers = pytest.importorskip("transformers")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "bos_token": {"__type": "AddedToken", "content": "<eos>"}}
    if apart:
        (model_folder / "chat_template.jinja").write_text(template)
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings | ({} if apart else {"chat_template": template})))
    twin = transformers.AutoTokenizer.from_pretrained(model_folder)
    wanted = twin.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False, add_generation_prompt=True)
    assert chat_template(model_folder)("1+1") == wanted


def test_a_damaged_tokenizer_config_is_refused(tmp_path):
    """Catches a traceback where one line is due."""
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer_config.json: not valid JSON"):
        chat_template(tmp_path)


@pytest.mark.parametrize("template", ["{{ raise_exception('only systems') }}", "{{ messages[3].role }}", "{% for %}", "{{ ''.__class__.__mro__ }}", None])
def test_failing_chat_templates_are_refused(tmp_path, template):
    """Catches a template that fails in silence, and one that gets out of its sandbox."""
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="--chat"):
        chat_template(tmp_path)("1+1")
