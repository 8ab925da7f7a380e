import json
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import words
from transformers import AutoProcessor, Qwen2AudioProcessor

import qwen2audio_jax.weights.source as source
from qwen2audio_jax import audio, mel
from qwen2audio_jax.processor import (
    FRAME_BUCKETS,
    LongAudioWarning,
    Processor,
    count_tokens,
    needed_frames,
)

QUESTION = {"type": "text", "text": "What is that sound?"}
HEAR = {"type": "audio", "audio": "one second, to be filled in"}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(text):
    return {"role": "assistant", "content": text}


CONVERSATIONS = {
    "single": [user(HEAR, QUESTION)],
    "voice chat": [user(HEAR)],
    "no clip": [{"role": "user", "content": "What can you hear?"}],
    "text before the clip": [user(QUESTION, HEAR)],
    "several clips": [user(HEAR, HEAR, QUESTION), assistant("A dog."), user(HEAR)],
    "multi-turn": [
        user(HEAR, QUESTION),
        assistant("It is the sound of glass shattering."),
        {"role": "user", "content": [{"type": "text", "text": "And over?"}]},
        assistant("Yes\n\n"),
        user(HEAR, QUESTION),
    ],
    "system": [{"role": "system", "content": "You hear."}, user(HEAR, QUESTION)],
    "Chinese": [user(HEAR, {"type": "text", "text": "那是什么声音？今天天气，狗。"})],
    "decomposed": [user(HEAR, {"type": "text", "text": "Cafe\u0301 🦙 <|im_end|>?"})],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return words.made_tokenizer(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def processor(made):
    return Processor.from_pretrained(made)


@pytest.fixture(scope="module")
def reference(made):
    return words.reference_processor(made)


def fill(conversation, chirp, seconds):
    """Puts made clips in a conversation's places; gives it and the clips."""
    waves = []
    filled = []
    for message in conversation:
        content = message["content"]
        if isinstance(content, list):
            content = list(content)
            for i, part in enumerate(content):
                if part is HEAR:
                    waves.append(chirp(seconds + 0.37 * len(waves), seed=len(waves)))
                    content[i] = {"type": "audio", "audio": (waves[-1], audio.SAMPLE_RATE)}
        filled.append({**message, "content": content})
    return filled, waves


def reference_inputs(reference, conversations, waves, padding_side="left", generate=True):
    texts = [
        reference.apply_chat_template(
            [{**m, "content": m["content"]} for m in c],
            add_generation_prompt=generate,
            tokenize=False,
        )
        for c in conversations
    ]
    return reference_texts(reference, texts, waves, padding_side)


def reference_texts(reference, texts, waves, padding_side="left"):
    return reference(
        text=texts,
        audio=waves or None,
        padding=True,
        padding_side=padding_side,
        return_tensors="np",
        **({"sampling_rate": audio.SAMPLE_RATE} if waves else {}),
    )


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for key, wanted in theirs.items():
        got = ours[key]
        if key.startswith(("input_feature", "feature")):
            wanted = wanted[..., : got.shape[-1]]
        # How exact the log-mel itself is, is test_mel's matter: torch's float32 errs by 2e-5 here.
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
        assert got.dtype == (np.float32 if key == "input_features" else np.int32)


# Equal to the reference.


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_prepared_as_by_the_reference(name, processor, reference, chirp):
    conversation, waves = fill(CONVERSATIONS[name], chirp, 0.8)
    assert_same(processor(conversation), reference_inputs(reference, [conversation], waves))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_is_prepared_as_by_the_reference(padding_side, processor, reference, chirp):
    pairs = [fill(c, chirp, 0.3 + 0.5 * i) for i, c in enumerate(CONVERSATIONS.values())]
    conversations, waves = [c for c, _ in pairs], [w for _, ws in pairs for w in ws]
    ours = processor(conversations, padding_side=padding_side, frames=3000)
    theirs = reference_inputs(reference, conversations, waves, padding_side)
    assert_same(ours, theirs)
    assert ours["input_features"].shape == (len(waves), 128, 3000)


def test_a_base_models_prompts_are_prepared_as_by_the_reference(processor, reference, chirp):
    tag = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    texts = [f"{tag}What is that sound:", f"{tag}{tag}", "No clip", f"{tag} 今天"]
    waves = [chirp(s, seed=i) for i, s in enumerate((0.5, 1.1, 0.03, 2.0))]
    sources = [(wave, audio.SAMPLE_RATE) for wave in waves]
    ours = processor(text=texts, audio=sources)
    assert_same(ours, reference_texts(reference, texts, waves))
    expanded = [f"{t}" for t in texts]
    counts = iter([count_tokens(wave) for wave in waves])
    for i, text in enumerate(texts):
        pieces = text.split("<|AUDIO|>")
        expanded[i] = pieces[0] + "".join("<|AUDIO|>" * next(counts) + p for p in pieces[1:])
    again = processor(text=expanded, audio=sources)
    for key in ours:
        np.testing.assert_array_equal(again[key], ours[key])
    assert set(processor(text="Hello")) == {"input_ids", "attention_mask"}


def test_the_real_vocabulary_is_used_as_by_the_reference(shared_data, tmp_path, chirp):
    """transformers' own Qwen2 tokenizer, from vocab.json and merges.txt, gives the same ids."""
    from transformers import Qwen2Tokenizer, WhisperFeatureExtractor

    words.real_tokenizer(shared_data, tmp_path)
    ours = Processor.from_pretrained(tmp_path)
    vocabulary = shared_data / "qwen2_tokenizer"
    merges = (vocabulary / "merges.txt").read_text("utf-8").splitlines()
    tokenizer = Qwen2Tokenizer(
        vocab=json.loads((vocabulary / "vocab.json").read_text("utf-8")),
        merges=[tuple(line.split(" ")) for line in merges if line],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": words.SPECIAL})
    reference = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128), tokenizer)
    pairs = [fill(c, chirp, 0.3) for c in CONVERSATIONS.values()]
    conversations, waves = [c for c, _ in pairs], [w for _, ws in pairs for w in ws]
    inputs = ours(conversations)
    assert_same(inputs, reference_inputs(reference, conversations, waves))
    wanted = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert ours.decode(inputs["input_ids"]) == wanted


def test_the_golden_prompt_from_a_clip(shared_data, tmp_path, chirp):
    """4.032 s of sound become 101 audio tokens."""
    golden = json.loads((shared_data / "golden/hf_qwen2_audio.json").read_text())["single"]
    ours = Processor.from_pretrained(words.real_tokenizer(shared_data, tmp_path))
    question = {"type": "text", "text": golden["question"]}
    clip = {"type": "audio", "audio": (chirp(4.032), audio.SAMPLE_RATE)}
    wanted = [token for token, n in golden["input_ids_rle"] for _ in range(n)]
    assert ours([user(clip, question)])["input_ids"].tolist() == [wanted]


# Labels.


def test_labels_are_the_assistants_words(processor, chirp):
    answered = [*CONVERSATIONS["multi-turn"], assistant("今天")]
    one, _ = fill(answered, chirp, 0.5)
    two, _ = fill([*CONVERSATIONS["single"], assistant("A dog.")], chirp, 0.7)
    inputs = processor([one, two], labels=True, padding_side="right")
    kept = [row[row != -100] for row in inputs["labels"]]
    end = "<|im_end|>"
    assert processor.decode(kept, skip_special_tokens=False) == [
        f"It is the sound of glass shattering.{end}Yes\n\n{end}今天{end}",
        f"A dog.{end}",
    ]
    learned = inputs["labels"] != -100
    np.testing.assert_array_equal(inputs["labels"][learned], inputs["input_ids"][learned])
    assert not learned[inputs["attention_mask"] == 0].any()


def test_labels_change_no_input(processor, reference, chirp):
    answered, waves = fill([*CONVERSATIONS["several clips"], assistant("狗")], chirp, 0.5)
    inputs = processor(answered, labels=True, padding_side="right")
    inputs.pop("labels")
    assert_same(inputs, reference_inputs(reference, [answered], waves, "right", generate=False))


def test_labels_move_with_the_padding(processor):
    short = [{"role": "user", "content": "a"}, assistant("b")]
    long = [{"role": "user", "content": "a"}, assistant("b and more of it")]
    left, right = (
        processor([short, long], labels=True, padding_side=side)["labels"][0]
        for side in ("left", "right")
    )
    np.testing.assert_array_equal(left[left != -100], right[right != -100])
    assert right[-1] == -100


# Shapes.


def test_as_many_frames_as_the_longest_clip_needs(processor, chirp):
    for seconds, frames in ((0.5, 104), (1.0, 104), (1.03, 204), (5.0, 504), (29.9, 3000)):
        clip = {"type": "audio", "audio": (chirp(seconds), audio.SAMPLE_RATE)}
        assert processor([user(clip)])["input_features"].shape == (1, 128, frames)


def test_needed_frames_are_within_the_input():
    for valid in range(1, 3001):
        needed = needed_frames(valid)
        assert valid <= needed <= 3000 and (needed > valid or valid >= 2999)
        assert any(bucket >= needed for bucket in FRAME_BUCKETS)


def test_given_frames_and_length(processor, chirp):
    clip = {"type": "audio", "audio": (chirp(1.0), audio.SAMPLE_RATE)}
    inputs = processor([user(clip)], frames=160, length=80)
    assert inputs["input_features"].shape == (1, 128, 160)
    assert inputs["input_ids"].shape == (1, 80)
    with pytest.raises(ValueError, match=r"wanted 102 to 3000 frames .* got 100"):
        processor([user(clip)], frames=100)
    with pytest.raises(ValueError, match=r"prompt of \d+ tokens does not fit the length 10"):
        processor([user(clip)], length=10)


# Long clips.


def test_a_long_clip_is_heard_as_windows_and_says_so(processor, chirp):
    """Exactly as if the windows had been given one by one."""
    wave = chirp(61.0)
    whole = [user({"type": "audio", "audio": (wave, 16_000)}, QUESTION)]
    parts = [
        {"type": "audio", "audio": (wave[start : start + 480_000], 16_000)}
        for start in (0, 480_000, 960_000)
    ]
    with pytest.warns(LongAudioWarning, match=r"61.00 s are heard as 3 windows .* Audio 1 to 3"):
        inputs = processor(whole)
    for key, wanted in processor([user(*parts, QUESTION)]).items():
        np.testing.assert_array_equal(inputs[key], wanted)
    assert inputs["feature_attention_mask"].sum(1).tolist() == [3000, 3000, 100]


def test_no_window_is_too_short_to_be_heard(processor, chirp):
    wave = chirp(30.01)
    with pytest.warns(LongAudioWarning, match="2 windows"):
        _, waves = processor.conversation([user({"type": "audio", "audio": (wave, 16_000)})])
    assert [len(w) for w in waves] == [len(wave) - 1600, 1600]
    np.testing.assert_array_equal(np.concatenate(waves), wave)


def test_a_long_clip_is_refused_where_asked_and_in_a_text(processor, chirp):
    clip = (chirp(45.2), 16_000)
    with pytest.raises(audio.AudioError, match=r"wanted at most 30 s, got 45.20 s"):
        processor([user({"type": "audio", "audio": clip})], long_audio="error")
    with pytest.raises(audio.AudioError, match=r"wanted at most 30 s, got 45.20 s"):
        processor(text="<|AUDIO|>", audio=[clip])


def test_thirty_seconds_are_one_window(processor, chirp):
    with warnings.catch_warnings(action="error"):
        inputs = processor([user({"type": "audio", "audio": (chirp(30.0), 16_000)})])
    assert (inputs["input_ids"] == processor.tokenizer.audio_id).sum() == 750


# Refusals.


def test_a_clip_without_a_token_is_refused_with_its_length(processor):
    with pytest.raises(audio.AudioError, match="320 samples is too short"):
        count_tokens(np.ones(320, np.float32))
    assert count_tokens(np.ones(321, np.float32)) == 1
    with pytest.raises(audio.AudioError, match="ms"):
        processor([user({"type": "audio", "audio": (np.ones(300, np.float32), 16_000)})])


def test_wrong_counts_are_told_with_both_numbers(processor, chirp):
    clip = (chirp(1.0), 16_000)
    with pytest.raises(ValueError, match=r"has 2 <\|AUDIO\|>, wanted 1 for 1 clips \(or 25"):
        processor(text="<|AUDIO|><|AUDIO|>", audio=[clip])
    with pytest.raises(ValueError, match=r"has 1 <\|AUDIO\|>, wanted 0 for 0 clips"):
        processor([{"role": "user", "content": "What is <|AUDIO|>?"}])
    with pytest.raises(ValueError, match=r"has 2 <\|AUDIO\|>, wanted 1 for 1 clips of 25"):
        part = {"type": "text", "text": "What is <|AUDIO|>?"}
        processor([user({"type": "audio", "audio": clip}, part)])


def test_expanded_texts_that_share_a_clip_are_refused(processor, chirp):
    clips = [(chirp(0.1), 16_000)] * 2
    with pytest.raises(ValueError, match=r"has 1 <\|AUDIO\|>, wanted 2"):
        processor(text=["<|AUDIO|>", "<|AUDIO|>" * 3], audio=clips)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({}, "either conversations or text"),
        ({"conversations": []}, "at least one prompt"),
        ({"conversations": [[]]}, "no messages"),
        ({"text": []}, "at least one prompt"),
        ({"text": "a", "labels": True}, "wants conversations"),
        ({"conversations": [user(QUESTION)], "audio": ["a.wav"]}, "audio= goes with text="),
        ({"conversations": [user(QUESTION), assistant("a")]}, "message 2: wanted a user's turn"),
        ({"conversations": [user(QUESTION)], "labels": True}, "no assistant turn"),
        ({"text": "<|AUDIO|>", "audio": "absent.wav"}, "absent.wav"),
    ],
)
def test_a_wrong_call_is_told_in_a_line(processor, call, told):
    with pytest.raises(ValueError, match=told) as error:
        processor(**call)
    assert "\n" not in str(error.value)


# Text.


def test_decoding_takes_rows_of_any_kind(processor, reference):
    ids = reference.tokenizer("  a  dog , \n今天<|im_end|><|endoftext|>")["input_ids"]
    wanted = reference.batch_decode([ids], skip_special_tokens=True)
    for rows in ([ids], np.array([ids]), jnp.array([ids]), [jnp.array(ids)], ids, np.array(ids)):
        assert processor.decode(rows) == wanted == ["  a  dog , \n今天"]
    assert processor.decode([ids, ids[:1]], skip_special_tokens=False) == [
        "  a  dog , \n今天<|im_end|><|endoftext|>",
        reference.decode(ids[:1]),
    ]
    assert processor.decode([]) == [""]


def test_streaming_gives_the_decoded_text(processor):
    ids, stream = processor.tokenizer.encode("今天天气<|im_end|>"), processor.detokenizer()
    assert "".join([stream(i) for i in ids]) + stream.flush() == processor.decode(ids)[0]


# Folders.


@pytest.mark.parametrize("kind", [Qwen2AudioProcessor, AutoProcessor])
def test_transformers_loads_what_we_save(kind, processor, tmp_path, chirp):
    processor.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert isinstance(loaded, Qwen2AudioProcessor)
    pairs = [fill(c, chirp, 0.5) for c in CONVERSATIONS.values()]
    conversations, waves = [c for c, _ in pairs], [w for _, ws in pairs for w in ws]
    inputs = processor(conversations)
    assert_same(inputs, reference_inputs(loaded, conversations, waves))
    wanted = loaded.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert processor.decode(inputs["input_ids"]) == wanted


@pytest.mark.parametrize("mels", [80, 128])
def test_we_load_what_transformers_saves(made, tmp_path, chirp, mels):
    saved = words.reference_processor(made, mels)
    saved.chat_template = saved.chat_template.replace("helpful", "blunt")
    saved.save_pretrained(tmp_path)
    ours = Processor.from_pretrained(str(tmp_path))
    assert ours.mels == mels
    conversation, waves = fill(CONVERSATIONS["single"], chirp, 1.0)
    assert_same(ours(conversation), reference_inputs(saved, [conversation], waves))
    assert "blunt" in ours.decode(ours(conversation)["input_ids"])[0]


def test_a_sources_files_are_copied_byte_for_byte(made, tmp_path):
    origin, copy = tmp_path / "origin", tmp_path / "copy"
    words.made_tokenizer(origin)
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (origin / name).write_bytes(b"{ }\r\n")
    (origin / "chat_template.json").write_text('{"chat_template":"own <|AUDIO|>"}')
    (origin / "preprocessor_config.json").write_text('{"feature_size":  80}')
    (origin / "model.safetensors").write_bytes(b"weights")
    Processor.from_pretrained(origin).save_pretrained(copy)
    for path in copy.iterdir():
        if path.name != "tokenizer_config.json":
            assert path.read_bytes() == (origin / path.name).read_bytes()
    assert len(list(copy.iterdir())) == 8
    Processor.from_pretrained(copy).save_pretrained(copy)
    assert Processor.from_pretrained(copy).mels == 80


@pytest.mark.parametrize("theirs", [True, False])
def test_a_window_is_read_where_it_was_written(made, tmp_path, theirs):
    """Also where transformers has written the settings, which has a file of its own for them."""
    origin, copy = tmp_path / "origin", tmp_path / "copy"
    processor = words.reference_processor(made) if theirs else Processor(made)
    processor.save_pretrained(origin)
    before = {path.name for path in origin.iterdir()}
    Processor(origin).save_pretrained(copy, window=4.0)
    assert {path.name for path in copy.iterdir()} == before
    Processor(copy).save_pretrained(copy, window=6.5)
    assert Processor(copy).window == 6.5
    loaded = Qwen2AudioProcessor.from_pretrained(copy)
    assert loaded.feature_extractor.feature_size == 128


def test_a_checkpoint_that_hears_differently_is_refused(tmp_path):
    words.made_tokenizer(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"hop_length": 320}')
    with pytest.raises(ValueError, match="wanted hop_length 160, got 320"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config.json is not JSON"):
        Processor.from_pretrained(tmp_path)


def test_a_hub_id_is_fetched_and_its_absence_told(made, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(made))
    assert Processor.from_pretrained("Qwen/Qwen2-Audio-7B").folder == made

    def unreachable(*arguments, **options):
        raise FileNotFoundError("Name not known\nCheck your connection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"'Qwen/Absent' is neither .*: Name not known$"):
        Processor.from_pretrained("Qwen/Absent")


def test_a_source_that_is_none(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="wanted 'tiny', a folder or a hub id"):
        Processor.from_pretrained(tmp_path / "absent" / "folder")
    monkeypatch.setattr(source, "TINY", tmp_path / "absent")
    with pytest.raises(ValueError, match="'tiny' is not installed"):
        Processor.from_pretrained("tiny")
    monkeypatch.setattr(source, "TINY", tmp_path)
    assert source.locate("tiny", ()) == tmp_path


def test_tokens_are_counted_as_frames_are():
    for samples in (400, 16_000, 480_000):
        assert count_tokens(np.ones(samples, np.float32)) == (mel.frames(samples) + 1) // 4


def test_mels_without_a_feature_file(made, tmp_path):
    """A checkpoint that has no feature settings has its encoder's bands."""
    shutil.copyfile(made / "tokenizer.json", tmp_path / "tokenizer.json")
    assert Processor.from_pretrained(tmp_path).mels == 128
    (tmp_path / "config.json").write_text('{"audio_config": {"num_mel_bins": 80}}')
    alone = Processor.from_pretrained(tmp_path)
    assert alone.mels == 80
    alone.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "config.json").exists()
    assert Processor.from_pretrained(tmp_path / "copy").mels == 80


def test_labels_are_read_without_what_is_ignored(processor):
    """Negative ids, which are no tokens, are left out."""
    ids = processor.tokenizer.encode("a dog")
    assert processor.decode([[-100, *ids, -100], [-100] * (len(ids) + 2)]) == ["a dog", ""]
    assert processor.decode(np.array([-100, *ids])) == ["a dog"]
