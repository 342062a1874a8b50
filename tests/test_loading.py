"""From a path to a decoder: where parts are looked for, what is loaded, what is refused."""

import base64
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

from kvchat.errors import CapacityError, ModelError, UsageError
from kvchat.model.families import SUPPORTED, parse_config, tensor_shapes
from kvchat.model.source import resolve
from kvchat.model.weights import choose_dtype, load_decoder

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def load(target: Path, dtype: str = "float32"):
    source = resolve(str(target))
    return load_decoder(source, parse_config(source), dtype)


def refusal(target: Path | str) -> str:
    """The message of the ModelError that loading ends with."""
    with pytest.raises(ModelError) as caught:
        load(Path(target))
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 300 and caught.value.exit_code == 3
    return message


def change_config(model: Path, **changes) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value != "absent"}
    (model / "config.json").write_text(json.dumps(kept))


def change_weights(model: Path, change, metadata=None) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata)


def shard(model: Path) -> None:
    """Split the one weight file into two and an index."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2]}
    halves["model-00002-of-00002.safetensors"] = names[1::2]
    for file_name, held in halves.items():
        save_file({name: tensors[name] for name in held}, model / file_name)
    where = {name: file_name for file_name, held in halves.items() for name in held}
    (model / INDEX).write_text(json.dumps({"weight_map": where}))
    (model / "model.safetensors").unlink()


# --- where the parts are


def test_a_file_a_folder_and_an_index_give_the_same_model(model):
    one = load(model)
    assert torch.equal(load(model / "model.safetensors").embedding, one.embedding)

    shard(model)

    for target in (model, model / INDEX, model / "model-00002-of-00002.safetensors"):
        assert torch.equal(load(target).layers[1].qkv.weight, one.layers[1].qkv.weight)


def test_a_lone_file_brings_its_parts_in_its_metadata(model, tmp_path):
    parts = {"config.json", "tokenizer_config.json"}
    metadata = {name: (model / name).read_text() for name in parts}
    tokenizer = (model / "tokenizer.model").read_bytes()
    metadata["tokenizer.model"] = base64.b64encode(tokenizer).decode()
    metadata["generation_config.json"] = '{"eos_token_id": [2, 3], "temperature": 0.5}'
    alone = tmp_path / "alone.safetensors"
    save_file(load_file(model / "model.safetensors"), alone, metadata)

    source = resolve(str(alone))

    assert source.name == "alone" and source.tokenizer_model == tokenizer
    assert source.config == json.loads(metadata["config.json"])
    assert source.chat_template == resolve(str(model)).chat_template is not None
    assert source.generation_config["temperature"] == 0.5
    eos = json.loads(metadata["config.json"])["eos_token_id"]
    assert parse_config(source).eos_token_ids == tuple(dict.fromkeys((eos, 2, 3)))


def test_a_lone_file_without_a_config_asks_for_it(model, tmp_path):
    alone = shutil.copy(model / "model.safetensors", tmp_path / "alone.safetensors")

    message = refusal(alone)

    assert "no config.json in" in message and "tokenizer.json (or tokenizer.model)" in message


def test_the_template_file_wins_and_a_list_gives_its_default(model):
    texts = {
        "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    }
    (model / "tokenizer_config.json").write_text(json.dumps(texts))
    assert resolve(str(model)).chat_template == "d"

    (model / "chat_template.jinja").write_text("from the file")

    assert resolve(str(model)).chat_template == "from the file"


def test_a_wrong_path_suggests_near_names(tiny):
    with pytest.raises(UsageError, match=r"did you mean .*model\.safetensors\?"):
        resolve(str(tiny / "modle.safetensors"))
    with pytest.raises(UsageError, match="is no folder either"):
        resolve(str(tiny / "nowhere" / "model.safetensors"))
    with pytest.raises(UsageError, match=r"x\\x1b\[2J"):
        resolve(str(tiny / "x\x1b[2J"))
    with pytest.raises(UsageError, match="cannot be opened: File name too long"):
        resolve("x" * 5000)


def test_fingerprints_tell_weights_and_configs_apart(model, tiny):
    first = resolve(str(tiny)).fingerprint
    assert resolve(str(model)).fingerprint == first and len(first) == 32

    change_config(model, rms_norm_eps=2e-5)
    second = resolve(str(model)).fingerprint
    change_weights(model, lambda tensors: tensors["model.norm.weight"].mul_(2))

    assert len({first, second, resolve(str(model)).fingerprint}) == 3


# --- what the decoder gets


def test_tied_embeddings_load_from_either_tensor(model):
    wanted = load(model).embedding

    change_weights(
        model, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})
    )
    decoder = load(model)

    assert torch.equal(decoder.embedding, wanted) and decoder.lm_head.weight is decoder.embedding


def test_tied_embeddings_with_two_values_are_not_tied(model):
    def double(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    assert load(model).config.tie_word_embeddings
    change_weights(model, double)

    decoder = load(model)

    assert not decoder.config.tie_word_embeddings
    assert torch.equal(decoder.lm_head.weight, decoder.embedding * 2)


def test_old_rotary_buffers_are_ignored(model):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(model, lambda tensors: tensors.update({name: torch.ones(8)}))

    stored = load_file(model / "model.safetensors")
    expected = {n: list(t.shape) for n, t in stored.items() if n != name}
    assert {n: list(s) for n, s in tensor_shapes(load(model).config).items()} == expected


def test_progress_counts_every_byte_once(tiny):
    source, seen = resolve(str(tiny)), []

    load_decoder(source, parse_config(source), "bfloat16", "cpu", lambda *at: seen.append(at))

    total = sum(info.num_bytes for info in source.tensors.values())
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted({d for d, _ in seen})


def test_progress_ends_at_its_total_though_one_of_two_tied_tensors_is_not_read(model):
    name = "model.embed_tokens.weight"
    change_weights(model, lambda t: t.update({"lm_head.weight": t[name].clone()}))
    source, seen = resolve(str(model)), []

    load_decoder(source, parse_config(source), "float32", "cpu", lambda *at: seen.append(at))

    assert seen[-1][0] == seen[-1][1]


def test_dtype_auto_is_float32_on_a_cpu_while_it_fits(model):
    change_weights(model, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    source = resolve(str(model))
    config, stored = parse_config(source), sum(source.stored_bytes().values())

    assert config.checkpoint_dtype == "bfloat16"
    assert choose_dtype("auto", source, config, "cuda:0", 5 * stored) == "bfloat16"
    assert choose_dtype("auto", source, config, "cpu", 5 * stored) == "float32"
    assert choose_dtype("auto", source, config, "cpu", 5 * stored - 1) == "bfloat16"
    assert choose_dtype("float16", source, config, "cpu", stored) == "float16"
    with pytest.raises(UsageError, match="--dtype fp8: use auto, float32, bfloat16, float16"):
        choose_dtype("fp8", source, config, "cpu", 0)


def test_weights_that_do_not_fit_are_refused_with_the_sum(tiny):
    source = resolve(str(tiny))
    config, stored = parse_config(source), sum(source.stored_bytes().values())

    assert choose_dtype("auto", source, config, "cpu", stored) == "float32"
    with pytest.raises(CapacityError, match=r"need 374.2 KiB as float32, 374.2 KiB are available"):
        choose_dtype("auto", source, config, "cpu", stored - 1)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"num_hidden_layers": -1}, "config.json: num_hidden_layers = -1 is not allowed"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 is not allowed"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"hidden_size": True}, "hidden_size = True is not allowed"),
        ({"hidden_size": "64"}, "hidden_size = '64' is not allowed"),
        ({"hidden_size": None}, "hidden_size = None is not allowed"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan is not allowed"),
        ({"rope_theta": float("inf")}, "rope_theta = inf is not allowed"),
        ({"rope_theta": 10**400}, "rope_theta = 1000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 is not allowed"),
        ({"head_dim": 15}, "head_dim"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' is not allowed"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map asks for code"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized (awq)"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized (gptq)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized (bitsandbytes)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized (fp8)"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors)"),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "mixture of experts"),
        ({"model_type": "qwen2_moe", "num_experts": 60}, "mixture of experts"),
        ({"vision_config": {}, "architectures": ["LlavaForConditionalGeneration"]}, "multimodal"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, f"kvchat runs {SUPPORTED}"),
        ({"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]}, "SmolLM3ForCausalLM"),
        ({"model_type": ["llama"], "architectures": 7}, "architecture 7 is not supported"),
        ({"model_type": "\x1b]52;c;x\x07", "architectures": "absent"}, "\\x1b]52;c;x\\x07"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "needs LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope type dynamic is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type longrope is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters.factor = None is not allowed"),
        ({"rope_scaling": {"full_attention": {}}}, "one RoPE rule for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": 3}, "missing 9 tensors (first: model.layers.2.input_layernorm"),
        ({"num_hidden_layers": 1}, "unexpected 9 tensors (first: model.layers.1."),
        ({"intermediate_size": 64}, "has shape [128, 64], config.json implies [64, 64]"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_run_is_refused(model, changes, wanted):
    change_config(model, **changes)

    assert wanted in refusal(model)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_config_that_is_no_json_object_is_refused(model, text):
    (model / "config.json").write_bytes(text)

    assert "config.json is not" in refusal(model)


def test_a_config_above_a_megabyte_is_refused(model):
    (model / "config.json").write_bytes(b" " * (1 << 20) + b"{}")

    assert "config.json is 1 MB; limit 1 MB" in refusal(model)


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("w.bin", b"\x80\x02}q\x00.", "is a pickle checkpoint"),
        ("w.pt", b"PK\x03\x04", "is a pickle checkpoint"),
        ("w.safetensors", b"PK\x03\x04" + bytes(99), "is a pickle checkpoint"),
        ("w.safetensors", b"\x80\x02}q\x00X\x05" + bytes(99), "is a pickle checkpoint"),
        ("w.gguf", b"GGUF\x03", "is a GGUF file"),
        ("w.safetensors", b"GGUF\x03\x00\x00\x00" + bytes(99), "is a GGUF file"),
        ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("w.safetensors", b"", "header says 0 bytes, file has 0"),
        ("w.safetensors", bytes(9), "header says 0 bytes, file has 9"),
        ("w.safetensors", struct.pack("<Q", 2**63) + b"{}", "file has 10"),
    ],
)
def test_another_format_is_refused_by_name(model, name, content, wanted):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(content)

    assert wanted in refusal(model / name) and wanted in refusal(model)


def test_a_header_above_the_limit_is_refused_unread(model):
    path = model / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 30_000_000) + b"{")
        file.truncate(40_000_000)

    assert "header is 30 MB; limit 25 MB" in refusal(model)


def test_files_that_are_no_files_are_refused(model):
    path = model / "model.safetensors"
    path.rename(model.parent / "outside")
    path.symlink_to(model.parent / "outside")
    assert "not a regular file, a link to" in refusal(model)

    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refusal(path)

    path.unlink()
    assert "no weights in" in refusal(model)


def test_a_link_out_of_the_folder_brings_no_tokenizer_in(model):
    path = model / "tokenizer.model"
    path.rename(model.parent / "outside")
    path.symlink_to(model.parent / "outside")

    assert "tokenizer.model: not a regular file, a link to" in refusal(model)


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
def test_a_shard_outside_the_folder_is_refused(model, name):
    shard(model)
    (model / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))

    assert f'index: shard "{name}" is outside the model directory' in refusal(model)


def test_a_missing_shard_is_named(model):
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()

    assert 'index: 1 of 2 shards are missing, first "model-00002-of' in refusal(model)


def test_an_adapter_is_refused(model):
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text("{}")

    assert "is a LoRA adapter" in refusal(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_counted(model, value):
    def spoil(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5:7] = value

    change_weights(model, spoil)

    assert 'up_proj.weight": 2 non-finite values; the file is damaged' in refusal(model)


def test_a_float32_weight_too_large_for_float16_is_refused_with_the_way_out(model):
    change_weights(model, lambda t: t["model.norm.weight"].fill_(70000.0))

    load(model, "float32")
    with pytest.raises(ModelError, match="64 non-finite values; float16 holds up to 65504: use"):
        load(model, "float16")


def test_weights_in_8_bits_are_refused(model):
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(model, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))

    assert f'tensor "{name}" is F8_E4M3; kvchat reads F32, BF16, F16' in refusal(model)
