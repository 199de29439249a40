"""Folders of models: what is written opens elsewhere, and what others wrote loads.

What transformers and vLLM read from the same files is right.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, redraw, tiny_config
from hub import COMMIT, hub_cache
from safetensors.torch import load_file, save_file
from test_model import LLAMA3

import support.hugging_face
from model import Llama, load_model, read_config, save_model
from support.flags import InputError
from support.hugging_face import copy_files, find_folder, stored_dtype, weight_files
from support.tokenizer_files import read_tokenizer

FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "llama 3": {"rope_scaling": LLAMA3},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A folder with untied embeddings, without checksums, because tests change its files."""
    save_model(redraw(Llama(tiny_config())), tmp_path / "folder")
    (tmp_path / "folder" / "checksums.json").unlink()
    return tmp_path / "folder"


def rewrite(folder, change, name="model.safetensors") -> dict:
    """The tensors of a file, changed by `change`, written in their place."""
    tensors = change(load_file(folder / name))
    save_file(tensors, folder / name, {"format": "pt"})
    return tensors


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def cut(folder, parts: dict[str, dict], weight_map: dict | None = None):
    """model.safetensors cut into shards with an index."""
    for name, tensors in parts.items():
        save_file(tensors, folder / name, {"format": "pt"})
    names = {key: name for name, tensors in parts.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map or names}))
    (folder / "model.safetensors").unlink()


def same(folder, model):
    """Whether a folder loads as this model, bit for bit."""
    loaded, wanted = load_model(folder).state_dict(), model.state_dict()
    assert loaded.keys() == wanted.keys()
    return all(torch.equal(loaded[key], wanted[key]) for key in wanted)


def transformers_logits(folder, token_BT, **more):
    from transformers import AutoModelForCausalLM

    twin = AutoModelForCausalLM.from_pretrained(folder, **more).eval()
    with torch.no_grad():
        return twin(token_BT).logits


def our_logits(folder, token_BT):
    with torch.no_grad():
        return load_model(folder)(token_BT)[0]


TOKENS = torch.randint(0, 19, (2, 24), generator=torch.Generator().manual_seed(3))


def agree(folder):
    """Our logits of a folder are those of transformers."""
    logits_BTV = transformers_logits(folder, TOKENS, dtype=torch.float32)
    torch.testing.assert_close(our_logits(folder, TOKENS), logits_BTV, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------ what we write


def vllm_tensors(folder) -> set[str]:
    """The names of the tensors that vLLM reads: of all safetensors files, or, if there is an index,
    of those that it names."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        named = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        files = [file for file in files if file.name in named]
    return {key for file in files for key in load_file(file)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_opens_elsewhere(tmp_path, family):
    """Catches a value head that vLLM takes for a tensor of the model and stops at, an index that
    does not fit the weights, and a folder that transformers reads as another model."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type=family.split()[0], **FAMILIES[family])
    model = redraw(Llama(config)).eval()
    save_model(model, tmp_path)
    agree(tmp_path)
    with torch.no_grad():
        logits_BTV = model(TOKENS)[0]
    atol = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(transformers_logits(tmp_path, TOKENS), logits_BTV, **atol)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = set(twin.state_dict()) - ({HEAD} if config.tie_word_embeddings else set())
    assert vllm_tensors(tmp_path) == names
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"]) == names
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in twin.parameters())
    assert [file.name for file in weight_files(tmp_path)] == [
        "model.safetensors",
        "value_head.safetensors",
    ]
    assert same(tmp_path, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_written_in_a_type(tmp_path, dtype):
    """Catches a config.json that says another type than the weights have, a value head that is
    rounded with them, and a type that is told from the value head."""
    from transformers import AutoModelForCausalLM

    model = redraw(Llama(tiny_config())).eval()
    save_model(model, tmp_path, dtype=dtype)
    weights = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype} == {stored_dtype(tmp_path)}
    for key, tensor in weights.items():
        assert torch.equal(tensor, model.state_dict()[key].to(dtype))
    head = load_file(tmp_path / "value_head.safetensors")
    assert torch.equal(head["value_head.weight"], model.value_head.weight)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert twin.dtype == dtype and twin.config.dtype == dtype
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    save_model(model.to(dtype), tmp_path / "as it is")
    assert stored_dtype(tmp_path / "as it is") == dtype
    head = load_file(tmp_path / "as it is" / "value_head.safetensors")
    assert {tensor.dtype for tensor in head.values()} == {torch.float32}


def test_the_type_of_most_numbers_counts(folder):
    """Catches a type that is told from a norm, from a buffer or from the first tensor by name."""

    def mixed(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(10**5)
        return {key: t.bfloat16() if "mlp" in key else t for key, t in tensors.items()}

    rewrite(folder, mixed)
    assert stored_dtype(folder) == torch.bfloat16
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        stored_dtype(folder)


def test_numbers_beyond_a_type_are_refused(tmp_path):
    """Catches weights that become infinite where they are written."""
    model = redraw(Llama(tiny_config()))
    model.model.norm.weight.data[3] = 1e5
    with pytest.raises(InputError, match="norm.weight holds numbers that torch.float16 cannot"):
        save_model(model, tmp_path, dtype=torch.float16)
    assert not (tmp_path / "config.json").exists()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert load_model(tmp_path).model.norm.weight[3] == torch.tensor(1e5).bfloat16()


def test_nothing_stale_remains(tmp_path, monkeypatch):
    """Catches shards and an index of an earlier model that a reader takes, and a folder that looks
    complete while it is overwritten."""
    first, second = (redraw(Llama(tiny_config()), seed) for seed in (1, 2))
    save_model(first, tmp_path)
    (tmp_path / "checksums.json").unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    shards = {f"model-0000{n}-of-00002.safetensors": {} for n in (1, 2)}
    for number, key in enumerate(tensors):
        list(shards.values())[number % 2][key] = tensors[key]
    cut(tmp_path, shards)
    assert same(tmp_path, first)

    def stop(file, tensors):
        raise KeyboardInterrupt

    monkeypatch.setattr("model.save_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        save_model(second, tmp_path)
    assert not (tmp_path / "config.json").exists()
    monkeypatch.undo()
    save_model(second, tmp_path)
    names = "config.json model.safetensors value_head.safetensors checksums.json".split()
    names = {*names, INDEX}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert same(tmp_path, second)


def test_a_saved_folder_generates_until_its_end(tmp_path, tokenizer):
    """Catches an end-of-text that config.json loses, so that generation goes on, and a tokenizer
    whose output generate() refuses."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    size = tokenizer.tokenizer.get_vocab_size()
    model = redraw(Llama(tiny_config(vocab_size=size)), std=0.5).eval()
    prompt = tokenizer.tokenizer.encode("12+3\n").ids
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(model(torch.tensor([tokens]))[0][0, -1].argmax().item())
    answer = tokens[len(prompt) :]
    end = answer[4]
    model.config.eos_token_id = end
    model.config.pad_token_id = (end + 1) % size
    save_model(model, tmp_path)
    tokenizer.tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": None}
    names["eos_token"] = tokenizer.tokenizer.id_to_token(end)
    names["model_input_names"] = ["input_ids", "attention_mask"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    inputs = AutoTokenizer.from_pretrained(tmp_path)("12+3\n", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [prompt]
    twin = AutoModelForCausalLM.from_pretrained(tmp_path)
    output = twin.generate(**inputs, do_sample=False, max_new_tokens=12)
    wanted = answer[: answer.index(end) + 1]
    assert output[0, len(prompt) :].tolist() == wanted and len(wanted) < 12
    assert twin.config.pad_token_id == (end + 1) % size
    assert read_tokenizer(tmp_path)[1] == [end]


@pytest.mark.parametrize("pad", [0, 7, None])
def test_the_padding_token_is_kept(tmp_path, pad):
    """Catches a pad_token_id that is lost between the folder that is read and the one written."""
    save_model(Llama(tiny_config()), tmp_path / "one")
    (tmp_path / "one" / "checksums.json").unlink()
    edit_config(tmp_path / "one", pad_token_id=pad)
    save_model(load_model(tmp_path / "one"), tmp_path / "two")
    assert read_config(tmp_path / "two").pad_token_id == pad
    assert json.loads((tmp_path / "two" / "config.json").read_text())["pad_token_id"] == pad


def test_files_of_the_tokenizer_are_copied(tmp_path):
    """Catches a tokenizer that loses a file on its way through a run, weights that are copied, too,
    and files that the source does not have."""
    source, target = tmp_path / "source", tmp_path / "target"
    names = """
        tokenizer.json tokenizer_config.json special_tokens_map.json generation_config.json
        tokenizer.model added_tokens.json vocab.json merges.txt chat_template.json
        chat_template.jinja additional_chat_templates/tools.jinja
    """.split()
    for name in [*names, "model.safetensors", "config.json", "notes.jinja"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode() + b"\r\n\xff")
    target.mkdir()
    (target / "config.json").write_text("kept")
    copy_files(source, target)
    found = {str(f.relative_to(target)) for f in target.rglob("*") if f.is_file()}
    assert found == {*names, "config.json"}
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in names)
    (source / "tokenizer.model").unlink()
    (source / "additional_chat_templates" / "tools.jinja").unlink()
    copy_files(source, target)
    assert not (target / "tokenizer.model").exists()
    assert not (target / "additional_chat_templates" / "tools.jinja").exists()
    assert (target / "config.json").read_text() == "kept"


def test_a_copy_is_whole_or_not_there(tmp_path, monkeypatch):
    """Catches half a tokenizer in the place of the one before, and a traceback on a full disk."""
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(name)

    def full(source, copy):
        copy.write_text("so")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(InputError, match="tokenizer.json: cannot be written .No space left"):
        copy_files(tmp_path / "source", tmp_path / "target")
    (file,) = (tmp_path / "target").iterdir()
    assert file.read_text() == "target"


# -------------------------------------------------------------------------------- what others wrote


def test_tied_embeddings_that_were_saved_as_the_head(tmp_path):
    """Catches a tied model whose file has lm_head.weight alone and is refused; transformers ties
    the embeddings to it. With both, differing ones are refused."""
    model = redraw(Llama(tiny_config(tie_word_embeddings=True))).eval()
    save_model(model, tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / "checksums.json").unlink()
    tensors = rewrite(tmp_path, lambda t: {HEAD if k == EMBED else k: v for k, v in t.items()})
    assert EMBED not in tensors and same(tmp_path, model)
    agree(tmp_path)
    rewrite(tmp_path, lambda t: t | {EMBED: t[HEAD].clone()})
    assert same(tmp_path, model)
    agree(tmp_path)
    rewrite(tmp_path, lambda t: t | {HEAD: t[HEAD].double()})  # the same numbers
    assert same(tmp_path, model)
    for change in (torch.Tensor.bfloat16, lambda head: head + 1):
        rewrite(tmp_path, lambda t, change=change: t | {HEAD: change(t[EMBED])})
        with pytest.raises(InputError, match="ties the embeddings, but lm_head.weight differs"):
            load_model(tmp_path)


def test_a_missing_head_is_refused(folder):
    """Catches an untied model that answers with a head of random weights."""
    rewrite(folder, lambda t: {key: t[key] for key in t if key != HEAD})
    with pytest.raises(InputError, match="missing tensor lm_head.weight"):
        load_model(folder)


def test_buffers_of_the_rotary_embedding_are_ignored(folder):
    """Catches old checkpoints that are refused for buffers that follow from config.json."""
    wanted = load_model(folder)
    names = ("inv_freq", "cos_cached", "sin_cached", "original_inv_freq")
    places = ("model.layers.0.self_attn.rotary_emb", "model.rotary_emb", "rotary_emb")
    extra = {f"{place}.{name}": torch.ones(4) for place in places for name in names}
    extra["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.full((4,), torch.nan)
    extra["model.rotary_emb.cos_cached"] = torch.ones(4, dtype=torch.int8)
    rewrite(folder, lambda t: t | extra)
    assert same(folder, wanted)
    agree(folder)
    rewrite(folder, lambda t: t | {"model.rotary_emb.scale": torch.ones(4)})
    with pytest.raises(InputError, match="unexpected tensor model.rotary_emb.scale"):
        load_model(folder)


@pytest.mark.parametrize(
    "prefix, origin",
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DistributedDataParallel"),
        ("base_model.model.", "PEFT"),
        ("pretrained_model.", "TRL"),
    ],
)
def test_names_of_wrapped_models_are_refused(folder, prefix, origin):
    """Catches a refusal that names one tensor and does not say what is wrong with all of them."""
    rewrite(folder, lambda t: {prefix + key: t[key] for key in t})
    with pytest.raises(InputError, match=f"prefix '{prefix}' of {origin}; save the model inside"):
        load_model(folder)


def test_names_of_wrapped_blocks_are_refused(folder):
    """Catches wrappers that stand in the middle of a name."""
    inner = "model.layers.0._orig_mod."
    rewrite(folder, lambda t: {k.replace("model.layers.0.", inner): v for k, v in t.items()})
    with pytest.raises(InputError, match="_orig_mod"):
        load_model(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_its_head_loads_if_tied(tmp_path, tied):
    """Catches the names of a base model (AutoModel), which transformers reads, and a head that is
    missing and drawn at random."""
    from transformers import AutoModel

    model = redraw(Llama(tiny_config(tie_word_embeddings=tied))).eval()
    save_model(model, tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    base.save_pretrained(tmp_path / "base")
    shutil.copyfile(
        tmp_path / "whole" / "value_head.safetensors", tmp_path / "base" / "value_head.safetensors"
    )
    assert "embed_tokens.weight" in load_file(tmp_path / "base" / "model.safetensors")
    if tied:
        assert same(tmp_path / "base", model)
        agree(tmp_path / "base")
        return
    with pytest.raises(InputError, match="missing tensor lm_head.weight"):
        load_model(tmp_path / "base")
    rewrite(tmp_path / "base", lambda t: t | {HEAD: model.lm_head.weight.detach()})
    assert same(tmp_path / "base", model)
    agree(tmp_path / "base")
    rewrite(tmp_path / "base", lambda t: t | {NORM: t["norm.weight"].clone()})
    with pytest.raises(InputError, match="two tensors model.norm.weight"):
        load_model(tmp_path / "base")


@pytest.mark.parametrize("whole", [True, False])
def test_adapters_are_refused(folder, whole):
    """Catches a LoRA adapter that is not applied: the model loads as it was before, or the refusal
    does not say what to do."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    if not whole:
        os.rename(folder / "model.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="LoRA adapter; merge it into its model"):
        load_model(folder)


def test_other_weight_formats_are_refused(folder):
    """Catches a folder with pytorch_model.bin alone that is refused without a way out."""
    (folder / INDEX).unlink()
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="no such file; convert other weight formats"):
        load_model(folder)


def test_value_heads_stand_in_one_file(folder):
    """Catches tensors of the model that the value head's file silently replaces, and two value
    heads of which one is taken."""
    wanted = load_model(folder)
    head = load_file(folder / "value_head.safetensors")
    rewrite(folder, lambda t: t | {NORM: torch.zeros(32)}, "value_head.safetensors")
    with pytest.raises(InputError, match="model.norm.weight is no tensor of a value head"):
        load_model(folder)
    save_file(head, folder / "value_head.safetensors")
    rewrite(folder, lambda t: t | head)
    with pytest.raises(InputError, match="value_head.bias is in another file of the folder, too"):
        load_model(folder)
    (folder / "value_head.safetensors").unlink()
    assert same(folder, wanted)


def test_a_tensor_in_two_shards(folder):
    """Catches a tensor that depends on the order in which shards are read; the same twice is no
    matter."""
    wanted = load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    twice = {NORM: tensors[NORM]}
    cut(folder, {"a.safetensors": tensors, "b.safetensors": twice})
    assert same(folder, wanted)
    agree(folder)
    save_file({NORM: tensors[NORM] + 1}, folder / "b.safetensors", {"format": "pt"})
    for shard in ("a.safetensors", "b.safetensors"):
        names = {**dict.fromkeys(tensors, "a.safetensors"), "x": "b.safetensors", NORM: shard}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
        with pytest.raises(InputError, match="b.safetensors: model.norm.weight is in another file"):
            load_model(folder)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/../../x"])
def test_shards_outside_the_folder_are_refused(folder, name):
    """Catches an index of a stranger that has another file of this machine read."""
    shutil.copytree(folder, folder.parent / "other")
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: name}}))
    with pytest.raises(InputError, match=f"'{name}' is no file of this folder"):
        load_model(folder)


def test_one_file_goes_before_shards(folder):
    """Catches shards that are read though model.safetensors is there; transformers reads that."""
    wanted = load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {key: tensors[key] + 1 for key in tensors}, folder / "a.safetensors", {"format": "pt"}
    )
    names = {"weight_map": dict.fromkeys(tensors, "a.safetensors"), "metadata": {}}
    (folder / INDEX).write_text(json.dumps(names))
    assert same(folder, wanted)
    agree(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_that_load(folder, dtype):
    """Catches float types that are refused or rounded."""
    wanted = load_model(folder).to(dtype).float()
    for name in ("model.safetensors", "value_head.safetensors"):
        rewrite(folder, lambda t: {key: t[key].to(dtype) for key in t}, name)
    assert same(folder, wanted)
    agree(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_quantized_weights_are_refused(folder, dtype):
    """Catches quantized weights that load without their scales."""
    key = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t | {key: t[key].to(dtype)})
    with pytest.raises(InputError, match="up_proj.weight is quantized"):
        load_model(folder)


# ---------------------------------------------------------------------------------------- downloads


def found_offline(cache, name: str, code: str = "print(find_folder(sys.argv[1]))"):
    """A command that looks for a model while huggingface-hub is offline, with this cache."""
    imports = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    imports += (
        "from support.hugging_face import find_folder\nfrom support.flags import run_command\n"
    )
    text = f"{imports}def main():\n    {code}\nrun_command(main)\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", text, name]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache)


def test_a_cached_repository_is_found_offline(tmp_path, folder):
    """Catches a preset or repository id that needs the network though its files are there."""
    cache = tmp_path / "hub"
    snapshot = hub_cache(cache, "huggyllama/llama-7b", folder)
    for name in ("llama-7b", "huggyllama/llama-7b"):
        done = found_offline(cache, name)
        assert done.stdout == f"{snapshot}\n", done.stderr
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    cut(
        snapshot,
        {
            "a.safetensors": {k: tensors[k] for k in names[:3]},
            "b.safetensors": {k: tensors[k] for k in names[3:]},
        },
    )
    assert found_offline(cache, "llama-7b").stdout == f"{snapshot}\n"
    assert same(snapshot, load_model(folder))
    done = found_offline(cache, "somebody/else")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: somebody/else: no such folder, and the download failed: ")
    assert done.stderr.count("\n") == 1 and "HF_HUB_OFFLINE" in done.stderr


REPOSITORY = """
    config.json tokenizer.json tokenizer.model merges.txt chat_template.jinja README.md
    additional_chat_templates/tools.jinja original/params.json original/tokenizer.model
    original/consolidated.00.safetensors consolidated.safetensors pytorch_model.bin
    model.fp16.safetensors onnx/model.safetensors onnx/config.json value_head.safetensors
""".split()
WANTED = REPOSITORY[:5] + ["additional_chat_templates/tools.jinja", "value_head.safetensors"]


@pytest.mark.parametrize("sharded", [False, True])
def test_only_what_is_needed_is_downloaded(tmp_path, monkeypatch, sharded):
    """Catches weights that are downloaded twice, in another layout or for another program, and a
    tokenizer, template or shard that is left out."""
    from huggingface_hub.utils import filter_repo_objects

    shards = ["a.safetensors", "b[1].safetensors"]
    weights = [*shards, INDEX] if sharded else ["model.safetensors"]
    repository = REPOSITORY + [*shards, INDEX, *weights]
    revisions = []

    def download(name, revision=None, **patterns):
        revisions.append((name, revision))
        for file in filter_repo_objects(repository, **patterns):
            path = tmp_path / COMMIT / file
            path.parent.mkdir(parents=True, exist_ok=True)
            text = {"weight_map": dict(enumerate(shards))} if file == INDEX else {}
            path.write_text(json.dumps(text))
        return str(tmp_path / COMMIT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = find_folder("owner/name")
    found = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert found == {*WANTED, *weights, INDEX}
    assert revisions == [("owner/name", None), ("owner/name", COMMIT)][: 1 + sharded]
    shutil.rmtree(folder)
    assert find_folder("llama-7b", ("config.json",)) == folder
    assert [file.name for file in folder.rglob("*")] == ["config.json"]


def test_a_refused_download_is_one_line(monkeypatch):
    """Catches the reason of a gated repository, which comes after an empty line and is cut off."""

    def refuse(*_, **__):
        raise OSError("403 Client Error.\n\nCannot access gated repo for url x.\nAsk for access.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError) as error:
        find_folder("owner/name")
    reason = "403 Client Error. Cannot access gated repo for url x. Ask for access."
    assert str(error.value).endswith(f"the download failed: {reason}")


def test_a_folder_goes_before_a_preset(tmp_path, monkeypatch):
    """Catches a download in the place of the folder that a name stands for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(support.hugging_face, "download", None)
    for name in ("llama-7b", "owner/name"):
        (tmp_path / name).mkdir(parents=True)
        assert str(find_folder(name)) == name
