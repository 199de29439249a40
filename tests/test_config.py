"""config.json against transformers: the same logits, or a refusal that names the field."""

import json
import zlib

import pytest
import torch
from preset_configs import CONFIGS, tiny_fields
from safetensors.torch import save_file

from model import LlamaConfig, load_model, read_config
from support.config_json import DEFAULTS
from support.flags import InputError
from support.hugging_face import PRESETS

TOKEN_BT = torch.randint(0, 97, (1, 24), generator=torch.Generator().manual_seed(1))
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
BASE = {  # config.json as transformers 4 writes it
    **SHAPE,
    "_name_or_path": "a/b",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-2,
    "rope_scaling": None,
    "rope_theta": 500.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.45.0",
    "use_cache": True,
}
LINEAR = {"type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {**LLAMA3, "original_max_position_embeddings": 32}
SLIDING = {"use_sliding_window": True, "sliding_window": 8}
FULL = ["full_attention"] * 3
MIXED = ["full_attention", "sliding_attention", "full_attention"]
CHANGES = [
    {"hidden_act": "gelu"},
    {"hidden_act": "swish"},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"tie_word_embeddings": True},
    {"rms_norm_eps": 0.1},
    {"head_dim": 16},
    {"head_dim": None},
    {"num_key_value_heads": None},
    {"is_causal": False},
    {"is_causal": True},
    {"attention_chunk_size": 8},
    {"attention_chunk_size": None},
    {"per_layer_config": {"0": {"rms_norm_eps": 0.5}}},
    {"per_layer_config": {}},
    {"quantization_config": None},
    {"transformers_weights": None},
    {"configuration_files": []},
    # rope
    {"rope_theta": 77.0},
    {"rope_theta": 77},
    {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 77.0}, "rope_theta": None},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": {**LONG, "rope_theta": 77.0}, "rope_scaling": {"type": "default"}},
    {"rope_parameters": {"rope_theta": 77.0}, "rope_scaling": LONG},
    {"rope_parameters": {"rope_theta": 77.0}, "rope_scaling": {}},
    {"rope_parameters": {"full_attention": {"rope_theta": 77.0, "rope_type": "default"}}},
    {"rope_scaling": {**LONG, "rope_theta": 77.0}},
    {"rope_scaling": LONG},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
    {"rope_scaling": {**LONG, "unknown": 3}, "original_max_position_embeddings": 16},
    {"rope_scaling": {**LONG, "type": "linear"}},
    {"rope_scaling": {**LLAMA3, "factor": 1.0}},
    {"rope_scaling": {**LONG, "partial_rotary_factor": 0.5}},
    {"rope_scaling": LONG, "partial_rotary_factor": 1.0},
    {"rope_scaling": LINEAR},
    {"rope_scaling": {**LINEAR, "factor": 1.0}},
    {"rope_scaling": {**LINEAR, "factor": 1.0, "partial_rotary_factor": 1.0}},
    {"rope_scaling": {**LINEAR, "type": "dynamic"}},
    {"rope_scaling": {"rope_type": "default", "factor": 8.0, "mrope_section": [1, 1, 2]}},
    {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    {"rope_scaling": YARN},
    {"rope_scaling": {**YARN, "factor": 1.0}},
    {"rope_scaling": {**YARN, "factor": 1.0, "attention_factor": 2.0}},
    {"partial_rotary_factor": 1.0},
    {"partial_rotary_factor": 0.5},
    {"rope_interleaved": True},
    # windows
    {"sliding_window": 8},
    {"sliding_window": 24},
    {**SLIDING, "use_sliding_window": None},
    SLIDING,
    {**SLIDING, "max_window_layers": 3},
    {**SLIDING, "max_window_layers": 2},
    {**SLIDING, "max_window_layers": 2, "sliding_window": 128},
    {**SLIDING, "max_window_layers": 0, "layer_types": FULL},
    {**SLIDING, "layer_types": MIXED},
    {"layer_types": FULL},
    {"layer_types": ["attention"] * 3},
    {"layer_types": MIXED},
    # read by nobody, or without an effect on logits
    {"unsloth_version": "2025.1", "tokenizer_class": "X", "auto_map": {"AutoConfig": "x.Y"}},
    {"attn_implementation": "eager", "use_mrope": False, "logit_softcap": 30, "clip_qkv": 8},
    {"pretraining_tp": 2, "pad_token_id": 5, "attention_dropout": 0.5, "initializer_range": 0.5},
    {"torch_dtype": "float16", "is_encoder_decoder": True, "use_cache": False, "clip": None},
]


def tiny_twin(folder, fields: dict):
    """A model of transformers for a config.json, saved beside it. A weight is drawn by its name, so
    that one more parameter leaves the others as they are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    config = AutoConfig.from_pretrained(folder)
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = 0.2 * torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + noise if "norm" in name else noise)
    save_file(dict(twin.named_parameters()), folder / "model.safetensors")
    return twin


@torch.no_grad()
def all_logits(twin) -> torch.Tensor:
    """The logits of a plain forward pass, and of the last token after the others were cached."""
    plain = twin(TOKEN_BT, use_cache=False).logits
    cache = twin(TOKEN_BT[:, :-1], use_cache=True).past_key_values
    return torch.cat([plain, twin(TOKEN_BT[:, -1:], past_key_values=cache).logits], dim=1)[0]


def family_config(family: str, changes: dict) -> dict:
    fields = {**BASE, "model_type": family, **changes}
    return {key: value for key, value in fields.items() if value != "missing"}


@pytest.fixture(scope="module", params=list(DEFAULTS))
def untouched(request, tmp_path_factory):
    """A family, and the logits of its model before a field is changed."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, all_logits(tiny_twin(folder, family_config(request.param, {})))


MISSING = [{key: "missing"} for key in BASE]
NULL = [{key: None} for key in BASE if BASE[key] is not None]


@pytest.mark.parametrize("changes", [*CHANGES, *MISSING, *NULL], ids=str)
def test_a_field_of_config_json(tmp_path, untouched, changes):
    """Catches a field that is read otherwise than transformers reads it, so that logits differ, one
    that is refused though it changes nothing, and a refusal that does not name the field."""
    family, before = untouched
    try:
        twin = tiny_twin(tmp_path / "model", family_config(family, changes))
        theirs = all_logits(twin)
    except Exception:  # transformers cannot run it: only a traceback would be wrong here
        theirs = None
    try:
        config = read_config(tmp_path / "model")
    except InputError as error:
        assert any(key in str(error) for key in changes), error
        assert (
            theirs is None or theirs.shape != before.shape or (theirs - before).abs().max() > 1e-3
        )
        return
    if theirs is None:
        return
    length = min(24, config.max_position_embeddings)
    with torch.no_grad():
        ours = load_model(tmp_path / "model")(TOKEN_BT[:, :length])[0][0]
    wide = config.hidden_size > 1000  # longer sums are rounded more on some machines
    torch.testing.assert_close(ours, theirs[:length], atol=1e-3 if wide else 1e-4, rtol=0)
    if length == 24:
        torch.testing.assert_close(ours[-1], theirs[-1], atol=1e-4, rtol=0)
    kinds = getattr(twin.config, "layer_types", None) or ["sliding_attention"]
    window = getattr(twin.config, "sliding_window", None)
    bounded = "sliding_attention" in kinds and window or 2**24
    assert config.max_position_embeddings == min(bounded, twin.config.max_position_embeddings)


def read_fields(folder, fields: dict) -> LlamaConfig:
    (folder / "config.json").write_text(json.dumps(fields))
    return read_config(folder)


@pytest.mark.parametrize("family", DEFAULTS)
def test_fields_that_are_missing(tmp_path, family):
    """Catches a default that is not that of the family's class."""
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(family)
    of_class = type(theirs).__dataclass_fields__
    assert DEFAULTS[family] == {key: of_class[key].default for key in DEFAULTS[family]}
    ours = read_fields(tmp_path, {"model_type": family})
    for key in SHAPE.keys() - {"max_position_embeddings"} | {"rms_norm_eps", "initializer_range"}:
        expected = getattr(theirs, key, theirs.hidden_size // theirs.num_attention_heads)
        assert getattr(ours, key) == expected, key
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    length = 4096 if family == "mistral" else theirs.max_position_embeddings
    assert ours.max_position_embeddings == length  # of Mistral, the window's


@pytest.mark.parametrize(
    "changes",
    [
        {"use_mrope": False},
        {"unsloth_version": "2025.1"},
        {"tokenizer_class": "LlamaTokenizer"},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"attn_implementation": "flash_attention_2"},
        {"pretraining_tp": 2},
        {"partial_rotary_factor": 1.0},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"use_sliding_window": None},
        {"attention_bias": None, "mlp_bias": None},
        {"quantization_config": None},
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1},
        {"max_window_layers": 1, "layer_types": FULL},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", DEFAULTS)
def test_what_has_no_effect_is_accepted(tmp_path, family, changes):
    """Catches a neutral field that keeps a checkpoint from being loaded."""
    untouched = read_fields(tmp_path, family_config(family, {}))
    assert read_fields(tmp_path, family_config(family, changes)) == untouched


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("qwen2", {"transformers_weights": "other.safetensors"}),
        ("mistral", {"configuration_files": ["config.4.0.json"]}),
        ("mistral", {"sliding_window": 0}),
        ("mistral", {"sliding_window": "8"}),
        ("qwen2", {**SLIDING, "max_window_layers": 2}),
        ("qwen3", {"layer_types": MIXED}),
        ("llama", {"layer_types": ["linear_attention"] * 3}),
        ("llama", {"is_causal": None}),
        ("llama", {"rope_scaling": "linear"}),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 8.0}}),
        ("qwen2", {"rope_scaling": {**LLAMA3, "factor": None}}),
        ("llama", {"pad_token_id": "</s>"}),
        ("llama", {"hidden_act": None}),
        ("llama", {"hidden_act": ["silu"]}),
    ],
    ids=str,
)
def test_what_has_an_effect_is_refused_by_name(tmp_path, family, changes):
    """Catches a checkpoint that loads and computes something else, and a traceback."""
    with pytest.raises(InputError, match="|".join(changes)):
        read_fields(tmp_path, family_config(family, changes))


def test_mistral_without_a_window_in_its_config(tmp_path):
    """Catches the class's window of 4096 that is not applied where the field is missing, or that is
    applied where it is null."""
    fields = family_config("mistral", {"max_position_embeddings": 32768})
    assert read_fields(tmp_path, fields).max_position_embeddings == 32768
    fields.pop("sliding_window")
    assert read_fields(tmp_path, fields).max_position_embeddings == 4096


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(tmp_path, preset):
    """Catches a preset whose real config.json is refused, or read as another shape than plans are
    made for; and logits other than transformers'."""
    config = read_fields(tmp_path, CONFIGS[preset])
    shape = {key: getattr(config, key) for key in PRESETS[preset][1]}
    assert shape == PRESETS[preset][1]
    fields = tiny_fields(preset, 97)
    assert fields.keys() == CONFIGS[preset].keys()
    twin = tiny_twin(tmp_path / "tiny", fields)
    model = load_model(tmp_path / "tiny")
    assert model.config.max_position_embeddings == config.max_position_embeddings
    with torch.no_grad():
        logits_BTV, theirs = model(TOKEN_BT)[0], twin(TOKEN_BT).logits
    torch.testing.assert_close(logits_BTV, theirs, atol=1e-4, rtol=0)
