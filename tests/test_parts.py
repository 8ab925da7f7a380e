"""Whisper's encoder and Qwen2's decoder become a Qwen2-Audio to pretrain, and keep every bit."""

import json
import runpy
import shutil
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
import transformers
import words

from convert import from_parts
from qwen2audio_jax import Processor, Qwen2Audio, prompt
from qwen2audio_jax.weights import huggingface, parts, settings, table

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TEXT_WORDS = words.SPECIAL[:3]  # Qwen2's own special tokens
TEXT = 402  # words of the small tokenizer
KEPT = 416  # rows of the small decoders
JOINED = 3456  # rows when there is one for each of `parts.WORDS` too, and as many as divide by 128


def build(kind, config):
    """A random model, its weights large enough for every mistake to show."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(0.2 * torch.randn_like(parameter) + (1 if norm else 0))
    return model


def whisper_of(**changes):
    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 16,
        "max_target_positions": 8,
        "vocab_size": 40,
        "num_mel_bins": 80,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        "decoder_start_token_id": 1,
    }
    config = transformers.WhisperConfig(**sizes | changes)
    return build(transformers.WhisperForConditionalGeneration, config)


def qwen_of(**changes):
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": KEPT,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
    }
    config = transformers.Qwen2Config(**sizes | changes)
    return build(transformers.Qwen2ForCausalLM, config)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """Whisper's model, and the folder that it is saved in."""
    model, folder = whisper_of(), tmp_path_factory.mktemp("whisper")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def qwen(request, tmp_path_factory):
    """Qwen2's model, and the folder that it is saved in with its tokenizer: in shards if untied."""
    model, folder = qwen_of(tie_word_embeddings=request.param), tmp_path_factory.mktemp("qwen")
    model.save_pretrained(folder, max_shard_size="1GB" if request.param else "60KB")
    words.made_tokenizer(folder, TEXT_WORDS)
    return model, folder


@pytest.fixture(scope="module")
def joined(whisper, qwen, tmp_path_factory):
    """What is made of the two."""
    folder = tmp_path_factory.mktemp("joined") / "model"
    assert join(whisper[1], qwen[1], folder) == 0
    return folder


@pytest.fixture
def pair(whisper, tmp_path):
    """Copies of two parts, to be changed; the decoder is untied."""
    model = qwen_of()
    model.save_pretrained(tmp_path / "qwen")
    words.made_tokenizer(tmp_path / "qwen", TEXT_WORDS)
    return shutil.copytree(whisper[1], tmp_path / "whisper"), tmp_path / "qwen"


def join(*args):
    return from_parts.main([*map(str, args), "--quiet"])


def one_line(capsys):
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


def change(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def tensors_of(folder):
    found = huggingface.find(folder, settings.read(folder))
    return {name: tensor.read() for name, tensor in found.items()}


def same(wanted, got):
    return wanted.detach().numpy().tobytes() == np.ascontiguousarray(got).tobytes()


# What is copied


def test_both_parts_keep_every_bit(whisper, qwen, joined):
    """Of the encoder and of the decoder nothing is missing, nothing else is there but the new."""
    made, rest = tensors_of(joined), set(tensors_of(joined))
    for name, tensor in whisper[0].model.encoder.state_dict().items():
        assert same(tensor, made[f"audio_tower.{name}"])
        rest.remove(f"audio_tower.{name}")
    for name, tensor in qwen[0].state_dict().items():
        assert same(tensor, made[f"language_model.{name}"][: len(tensor)])
        rest.remove(f"language_model.{name}")
    assert rest == {"multi_modal_projector.linear.weight", "multi_modal_projector.linear.bias"}
    assert settings.read(joined).decoder.tied == qwen[0].config.tie_word_embeddings


def test_the_encoder_hears_as_whisper_does(whisper, joined, chirp):
    """Every block's output is Whisper's; pairs of the last are pooled, then comes its norm."""
    encoder = whisper[0].model.encoder
    mel = transformers.WhisperFeatureExtractor(feature_size=80)(
        chirp(30, 1), sampling_rate=16_000, return_tensors="pt"
    ).input_features
    theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(joined).eval()
    blocks = {"whisper": [], "joined": []}
    for name, tower in (("whisper", encoder), ("joined", theirs.model.audio_tower)):
        for block in tower.layers:
            keep = lambda _, __, out, to=blocks[name]: to.append(
                out[0] if isinstance(out, tuple) else out
            )
            block.register_forward_hook(keep)
    with torch.no_grad():
        encoder(mel)
        got = theirs.model.audio_tower(mel).last_hidden_state
        pooled = torch.nn.functional.avg_pool1d(blocks["whisper"][-1].mT, 2).mT
        wanted = encoder.layer_norm(pooled)
    assert len(blocks["whisper"]) == len(blocks["joined"]) == 2
    for a, b in zip(blocks["whisper"], blocks["joined"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    ours = Qwen2Audio.from_pretrained(joined).encoder(jnp.array(mel), jnp.array([3000]))
    np.testing.assert_allclose(ours, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_text_is_read_as_qwen_does(qwen, joined):
    """On its words the logits are Qwen2's, in transformers and in ours."""
    ids = torch.randint(0, TEXT, (2, 24), generator=torch.Generator().manual_seed(0))
    theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(joined).eval()
    with torch.no_grad():
        wanted = qwen[0](ids).logits.numpy()
        got = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    ours = Qwen2Audio.from_pretrained(joined)(ids.numpy())
    np.testing.assert_allclose(got[..., :KEPT], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[..., :KEPT], wanted, rtol=1e-5, atol=1e-5)


# What is new


def test_the_seed_draws_what_is_new(whisper, qwen, joined, tmp_path):
    """The same one the same bits; another one other rows and another projector, and no more."""
    tables = {table.EMBEDDING, table.HEAD}
    projector = "multi_modal_projector.linear.weight"
    made = tensors_of(joined)
    assert made[table.EMBEDDING].shape == (JOINED, 48)
    for name in tables & made.keys():
        new = made[name][KEPT:]
        assert abs(new.std() * 48**0.5 - 1) < 0.02 and abs(new.mean()) < 1e-3
    assert abs(made[projector].std() * 32**0.5 - 1) < 0.1
    assert not made["multi_modal_projector.linear.bias"].any()
    for seed in (0, 1):
        assert join(whisper[1], qwen[1], tmp_path / f"{seed}", "--seed", seed) == 0
    same_seed, other_seed = tensors_of(tmp_path / "0"), tensors_of(tmp_path / "1")
    assert all(np.array_equal(same_seed[name], made[name]) for name in made)
    changed = {name for name in made if not np.array_equal(other_seed[name], made[name])}
    assert changed == (tables | {projector}) & made.keys()
    if not qwen[0].config.tie_word_embeddings:
        assert not np.array_equal(made[table.HEAD][KEPT:], made[table.EMBEDDING][KEPT:])


def test_rows_that_suffice_are_kept(whisper, pair, tmp_path, capsys):
    """A vocabulary that has room for the new words is Qwen2's, and only the projector is drawn."""
    model = qwen_of(vocab_size=JOINED + 1)
    model.save_pretrained(pair[1])
    assert join(whisper[1], pair[1], tmp_path / "model") == 0
    assert (
        capsys.readouterr().out == "drawn from seed 0: the projector; all else is the parts' own\n"
    )
    made = tensors_of(tmp_path / "model")
    assert same(model.model.embed_tokens.weight, made[table.EMBEDDING])
    assert same(model.lm_head.weight, made[table.HEAD])


def test_the_tokenizer_gets_the_words_that_it_lacks(joined, qwen):
    """Behind its own, which stay what they were; the config and the processors know them."""
    before = prompt.Tokenizer(joined / "tokenizer.json")
    assert [before.core.token_to_id(word) for word in parts.WORDS] == [*range(TEXT, TEXT + 3005)]
    config = settings.read(joined)
    assert (config.audio_token, config.pad_token) == (TEXT, before.pad_id)
    assert config.end_tokens == (before.pad_id, before.im_end_id)
    text = "What is that sound?\n<|im_end|>"
    core = parts._core(qwen[1] / "tokenizer.json")
    assert before.encode(text) == core.encode(text).ids
    assert before.encode("<|0.00|><|29.99|>") == [TEXT + 4, TEXT + 4 + 2999]


def test_real_words_lie_where_qwen2_audio_has_them(shared_data, whisper, tmp_path):
    """Qwen2's own tokenizer: the published ids, and as many rows as Qwen2-Audio has."""
    model = qwen_of(hidden_size=8, vocab_size=151_936, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "qwen")
    shutil.copy(shared_data / "qwen2_tokenizer/tokenizer.json", tmp_path / "qwen")
    assert join(whisper[1], tmp_path / "qwen", tmp_path / "model") == 0
    known = json.loads((shared_data / "qwen2_audio_configs/added_tokens_known.json").read_text())
    core = prompt.Tokenizer(tmp_path / "model/tokenizer.json").core
    known = {word: token for word, token in known["tokens"].items() if token <= 154_650}
    assert {word: core.token_to_id(word) for word in known} == known
    assert settings.read(tmp_path / "model").decoder.vocabulary == 156_032


def test_a_tokenizer_of_the_users_is_taken_as_it_is(whisper, qwen, tmp_path):
    """With its template, but not with the settings of another encoder's mel bands."""
    folder = words.made_tokenizer(tmp_path / "words", [*TEXT_WORDS, "<|en|>", *words.SPECIAL[3:]])
    words.reference_processor(folder, mels=128).save_pretrained(folder)
    template = "{# mine #}" + prompt.CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(template)
    assert join(whisper[1], qwen[1], tmp_path / "model", "--tokenizer", folder) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert settings.read(tmp_path / "model").decoder.vocabulary == KEPT
    processor = Processor.from_pretrained(tmp_path / "model")
    assert (processor.tokenizer.audio_id, processor.mels) == (TEXT + 1, 80)


def test_types_stay_or_become_one(whisper, pair, tmp_path):
    """Each part has its own until --dtype rounds all; config.json names what holds every number."""
    half, brain = whisper_of().half(), qwen_of().bfloat16()
    half.save_pretrained(pair[0])
    brain.save_pretrained(pair[1])
    dtype_of = lambda path: json.loads((path / "config.json").read_text())["torch_dtype"]

    assert join(*pair, tmp_path / "stay") == 0
    made = tensors_of(tmp_path / "stay")
    types = {(name.startswith("audio_tower."), x.dtype) for name, x in made.items()}
    assert types == {(True, np.dtype(np.float16)), (False, BFLOAT16)}
    conv, head = half.model.encoder.conv1.weight, brain.lm_head.weight
    assert same(conv.view(torch.int16), made["audio_tower.conv1.weight"])
    assert same(head.view(torch.int16), made[table.HEAD][:KEPT])
    assert dtype_of(tmp_path / "stay") == "float32"

    assert join(*pair, tmp_path / "one", "--dtype", "bfloat16") == 0
    made = tensors_of(tmp_path / "one")
    assert {x.dtype for x in made.values()} == {BFLOAT16}
    assert same(conv.bfloat16().view(torch.int16), made["audio_tower.conv1.weight"])
    assert dtype_of(tmp_path / "one") == "bfloat16"


# What comes of it


def test_clips_are_heard_alike(joined, chirp):
    """A clip among words: transformers' own processor and model give what ours give."""
    theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(joined).eval()
    text = f"{prompt.AUDIO_BOS}{prompt.AUDIO}{prompt.AUDIO_EOS}What is that?"
    inputs = transformers.AutoProcessor.from_pretrained(joined)(
        text=text, audio=chirp(1, 2), sampling_rate=16_000, return_tensors="pt"
    )
    with torch.no_grad():
        wanted = theirs(**inputs).logits.numpy()
    ours = Processor.from_pretrained(joined)(text=text, audio=(chirp(1, 2), 16_000))
    np.testing.assert_array_equal(ours["input_ids"], inputs["input_ids"])
    logits = Qwen2Audio.from_pretrained(joined)(**ours)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_pretraining_begins_with_it(pair, tmp_path, chirp, monkeypatch):
    """The program takes it as --model, and moves it."""
    pytest.importorskip("grain")
    joined = tmp_path / "joined"
    assert join(*pair, joined) == 0
    for i in range(8):
        soundfile.write(tmp_path / f"{i}.wav", chirp(0.3, i), 16_000)
    rows = [json.dumps({"audio": f"{i}.wav", "text": "a dog"}) for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    flags = ["--no-from-scratch", "--model", joined, "--out", tmp_path / "run", "--ctc", 0]
    flags += ["--data.train", tmp_path / "rows.jsonl", "--data.held-out", "--data.workers", 0]
    flags += ["--data.tasks", "[AUDIO:audio] What is that? -> [TEXT:text]"]
    flags += ["--data.buckets", "8x40,8x60", "--optimizer.steps", 1, "--no-tensorboard"]
    flags += ["--optimizer.name", "adamw", "--optimizer.warmup-steps", 0]
    flags += ["--mesh.ici-data-parallelism", 8, "--mesh.ici-fsdp-parallelism", 1]
    monkeypatch.setattr(sys, "argv", ["train.pretrain", "tiny", *map(str, flags)])
    runpy.run_module("train.pretrain", run_name="__main__")
    before, after = tensors_of(joined), tensors_of(tmp_path / "run/model")
    assert before.keys() == after.keys()
    assert not np.array_equal(before[table.HEAD], after[table.HEAD])


# Mistakes

# what is wrong -> which of the two folders, fields of its config.json, what the line has to say
WRONG = {
    "no whisper": (0, {"model_type": "wav2vec2"}, "wanted model_type 'whisper' in config.json, "),
    "no qwen2": (1, {"model_type": "qwen"}, "wanted model_type 'qwen2' in config.json, got 'qwen'"),
    "mixture": (1, {"model_type": "qwen2_moe"}, "wanted model_type 'qwen2'"),
    "positions": (0, {"max_source_positions": 750}, "max_source_positions 1500, 30 s, got 750"),
    "heads": (0, {"encoder_attention_heads": 5}, "width 32 does not split into 5 heads"),
    "activation": (0, {"activation_function": "relu"}, "'relu' is not implemented, only 'gelu'"),
    "scale": (0, {"scale_embedding": True}, "scale_embedding True is not implemented"),
    "another width": (0, {"d_model": 64}, "model.encoder.conv1.bias has shape (32,), wanted (64,)"),
    "more layers": (0, {"encoder_layers": 1}, "model.encoder.layers.1.fc1.bias is unknown"),
    "fewer layers": (
        1,
        {"num_hidden_layers": 3, "layer_types": None},
        "model.layers.2.mlp.up_proj.weight is missing",
    ),
    "window": (1, {"use_sliding_window": True}, "use_sliding_window True is not implemented"),
    "tied": (1, {"tie_word_embeddings": True}, "ties lm_head.weight to model.embed_tokens.weight"),
    "nonsense": (1, {"hidden_size": "wide"}, "hidden_size: wanted 1 or more, got 'wide'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_parts_that_do_not_fit_are_refused(wrong, pair, tmp_path, capsys):
    """In a line that names the folder, and nothing is written."""
    which, fields, said = WRONG[wrong]
    change(pair[which], **fields)
    assert join(*pair, tmp_path / "model") == 2
    line = one_line(capsys)
    assert said in line and str(pair[which]) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen", "whisper"]


def test_files_that_do_not_hold_a_part_are_refused(pair, tmp_path, capsys):
    """Damaged, of another type, in two shards at once, or not there."""
    whisper, qwen = pair
    file = qwen / "model.safetensors"
    tensors = safetensors.torch.load_file(file)

    def refused(said):
        assert join(whisper, qwen, tmp_path / "model") == 2
        assert said in one_line(capsys)

    safetensors.torch.save_file({**tensors, "model.norm.weight": torch.ones(48).double()}, file)
    refused("model.norm.weight is F64, wanted one of BF16, F16, F32")
    safetensors.torch.save_file(tensors, qwen / "model-2.safetensors")
    file.rename(qwen / "model-1.safetensors")
    shards = {"model.norm.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    (qwen / huggingface.INDEX).write_text(json.dumps({"weight_map": shards}))
    safetensors.torch.save_file({"lm_head.weight": torch.ones(1)}, qwen / "model-1.safetensors")
    refused("lm_head.weight is there twice")
    with (qwen / "model-1.safetensors").open("r+b") as f:
        f.truncate(40)
    refused("model-1.safetensors is damaged")
    (qwen / huggingface.INDEX).unlink()
    refused("wanted model.safetensors or model.safetensors.index.json")
    (whisper / "config.json").unlink()
    refused("got a folder without config.json")
    whisper = tmp_path / "nothing"
    refused("nothing")


def test_tokenizers_that_do_not_fit_are_refused(pair, tmp_path, capsys):
    """Absent, without the words for clips or for turns, or with other words than the decoder's."""

    def refused(said, *args):
        assert join(*pair, tmp_path / "model", *args) == 2
        assert said in one_line(capsys)
        assert not (tmp_path / "model").exists()

    text_only = words.made_tokenizer(tmp_path / "text", TEXT_WORDS)
    refused("lacks the special tokens <|AUDIO|>, <|audio_bos|>,", "--tokenizer", text_only)
    other = json.loads((text_only / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["Ġis"], vocabulary["Ġthe"] = vocabulary["Ġthe"], vocabulary["Ġis"]
    other["added_tokens"] += [
        {**other["added_tokens"][0], "id": TEXT + i, "content": word}
        for i, word in enumerate(words.SPECIAL[3:])
    ]
    (text_only / "tokenizer.json").write_text(json.dumps(other))
    refused("wanted a tokenizer with 'Ġ", "--tokenizer", text_only)
    swapped = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", *words.SPECIAL[3:]]
    words.made_tokenizer(text_only, swapped)
    refused(f"'<|endoftext|>' as {TEXT - 3}, as", "--tokenizer", text_only)
    refused("wanted 'tiny', a folder or a hub id", "--tokenizer", tmp_path / "nowhere")
    words.made_tokenizer(pair[1], TEXT_WORDS[:1])
    refused("lacks the special tokens <|im_start|>, <|im_end|>")
    (pair[1] / "tokenizer.json").unlink()
    refused("wanted a tokenizer at ")


def test_a_folder_with_content_stays(pair, tmp_path, capsys):
    """Until --overwrite, which never replaces a part."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "precious").touch()
    assert join(*pair, target) == 2
    assert "is not empty; --overwrite replaces it" in one_line(capsys)
    assert [path.name for path in target.iterdir()] == ["precious"]
    for part in pair:
        assert join(*pair, part, "--overwrite") == 2
        assert f"wanted a folder apart from {part} to write to" in one_line(capsys)
    assert join(*pair, target, "--overwrite") == 0
    assert capsys.readouterr().out.startswith(
        f"drawn from seed 0: the projector, rows {KEPT} to {JOINED - 1} of embedding and head"
    )
    assert not (target / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "qwen", "whisper"]


def test_help_teaches(capsys):
    """A sentence, an example, every option."""
    with pytest.raises(SystemExit) as stop:
        from_parts.main(["--help"])
    assert stop.value.code == 0
    assert "python -m convert.from_parts openai/whisper-large-v3 " in capsys.readouterr().out
