"""The small world's samples are valid, true, repeatable, and split."""

import pickle
import re

import numpy as np
import pytest

from qwen2audio_jax import Processor, preset
from qwen2audio_jax.data import dialogue, lexicon, scenes, sounds, synth
from qwen2audio_jax.data.chats import from_messages, from_preference
from qwen2audio_jax.data.world import MODES, SPECIAL, World

pytest.importorskip("espeakng_loader")

VOCABULARY = {"small": 576, "full": 1100}


@pytest.fixture(scope="module", params=["small", "full"])
def world(request):
    return World.named(request.param)


@pytest.fixture(scope="module")
def processor(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp(world.name)
    world.write_tokenizer(folder, vocabulary=VOCABULARY[world.name])
    return Processor.from_pretrained(folder)


@pytest.fixture
def voices(monkeypatch):
    """Lets everybody say the same, which is quick, and notes who spoke."""
    heard, wave = set(), np.full(8000, 1000, np.int16)
    monkeypatch.setattr(lexicon, "_speak", lambda text, voice, *how: heard.add(voice) or wave)
    return heard


def learned(processor, compiled):
    ids = [token for segment in compiled for token in segment.ids if segment.learned]
    return processor.decode(ids, skip_special_tokens=False)[0]


def given(processor, compiled):
    ids = [t for s in compiled for t in s.ids if not s.learned and s.clip is None]
    return processor.decode(ids, skip_special_tokens=False)[0]


def test_every_task_makes_valid_samples(world, processor):
    """They compile in each style, their clips are short and level, answers are in their sets."""
    for skill in world.tasks:
        for split in ("train", "test"):
            for seed in range(2):
                sample = skill.sample(seed, split)
                wave, rate = sample["audio"]
                assert rate == 16_000 and wave.dtype == np.float32 and wave.ndim == 1
                assert 0.1 < len(wave) / rate <= skill.seconds and 0 < np.abs(wave).max() <= 1
                example = skill.compile(sample, processor)
                assert (
                    re.sub(r"<\|[a-z]+\|>", "", learned(processor, example.prompt)).strip()
                    == (sample["text"])
                )
                if skill.closed_set:
                    assert sample["text"] in skill.closed_set
                    choices = skill.task(sample["prompt"]).choices(sample)
                    assert len(choices) == len(skill.closed_set)
                asked = skill.compile(sample, processor, paraphrased=True, learn=False)
                assert not learned(processor, asked.prompt)
                tagged = skill.compile(sample, processor, style="tags", learn=False)
                assert skill.tags in given(processor, tagged.prompt)
                assert sample.get("question", "") in given(processor, tagged.prompt)


def test_equal_seeds_make_equal_samples(world):
    """Bit for bit, after a pickle too, as in another process; other seeds and splits differ."""
    for skill in pickle.loads(pickle.dumps(world)).tasks:
        waves = set()
        for seed in range(3):
            for split in ("train", "test"):
                here, there = world[skill.name].sample(seed, split), skill.sample(seed, split)
                np.testing.assert_array_equal(here.pop("audio")[0], there["audio"][0])
                waves.add(there.pop("audio")[0].tobytes())
                assert here == there
        assert len(waves) == 6, skill.name


def test_training_and_test_share_no_voice(world, voices, monkeypatch):
    """Nor any cell of a dial: what is held out is held out in every part of every sample. Those who
    are known by name are heard in both, for just that."""
    cells, dial = set(), sounds.dial

    def note(rng, low, high, *, held_out):
        drawn = dial(rng, low, high, held_out=held_out)
        part = np.log(drawn / low) / np.log(high / low)
        cells.add((low, high, int(part * sounds.CELLS)))
        return drawn

    monkeypatch.setattr(sounds, "dial", note)
    heard = {}
    for split in ("train", "test"):
        voices.clear(), cells.clear()
        for seed in range(10):
            for skill in world.tasks:
                skill.sample(seed, split)
            for mode in MODES:
                world.messages(seed, split, mode=mode)
            world.preference(seed, split)
        named = set(lexicon.PEOPLE.values()) & voices if split == "test" else set()
        assert bool(named) == (world.name == "full" and split == "test")
        heard[split] = {voice.partition("+")[2] for voice in voices - named}, set(cells)
    assert heard["test"][0] <= set(synth.HELD_OUT_VARIANTS)
    assert heard["train"][0] <= set(synth.TRAIN_VARIANTS)
    assert not heard["train"][1] & heard["test"][1] and len(heard["test"][1]) > 20


def test_words_of_answers_are_single_tokens(world, processor, tmp_path):
    """With and without a space before them; ids are the preset's; Chinese words stay whole."""
    encode, config = processor.tokenizer.encode, preset("tiny")
    for word in world.closed_words():
        assert len(encode(word)) == len(encode(f" {word}")) == 1, word
    assert processor.tokenizer.audio_id == config.audio_token
    assert {processor.tokenizer.pad_id, processor.tokenizer.im_end_id} == set(config.end_tokens)
    assert processor.tokenizer.core.get_vocab_size() <= VOCABULARY[world.name]
    for each in world.special():
        assert len(encode(each)) == 1
    assert world.special()[: len(SPECIAL)] == list(SPECIAL)
    for language, words in world.words.items():
        said = [words[i] for i in (0, 5, 11, 3, -1)]
        assert len(encode(lexicon.join(said, language))) == 5
    with pytest.raises(
        ValueError, match=r"a vocabulary of 300 splits \d+ of \d+ words, '.*' among"
    ):
        world.write_tokenizer(tmp_path, vocabulary=300)


def test_paraphrases_are_new_but_their_words_are_not(world):
    """What is asked otherwise is asked in words that were learned."""
    words = lambda texts: {word for text in texts for word in re.findall(r"\w+", text)}
    known = words(prompt for skill in world.tasks for prompt in skill.prompts)
    for skill in world.tasks:
        assert len(skill.prompts) >= 3 and len(skill.paraphrases) >= 2
        assert not set(skill.prompts) & set(skill.paraphrases)
        new = words(skill.paraphrases) - known
        assert not new, (skill.name, new)


def test_what_is_asked_and_answered_is_in_the_texts(world, voices):
    """The vocabulary is made from every word of every question and answer."""
    # Chinese is written without spaces between its words
    words = lambda text: {w for w in re.findall(r"\w+", text) if max(w) < "\u4e00"}
    known = words(" ".join(world.texts()))
    for seed in range(30):
        for skill in world.tasks:
            sample = skill.sample(seed, "train")
            text = re.sub(r"<\|.*?\|>", " ", sample["text"])
            assert words(f"{text} {sample.get('question', '')}") <= known
        for mode in MODES:
            for message in world.messages(seed, "train", mode=mode)["messages"]:
                parts = message["content"]
                texts = [parts] if isinstance(parts, str) else [p.get("text", "") for p in parts]
                assert words(" ".join(texts)) <= known


def test_voices_are_who_they_are_said_to_be():
    """Fundamentals of men are below 130 Hz and of women above 140, in training and held out."""
    for variant, gender in lexicon.GENDERS.items():
        assert variant in synth.TRAIN_VARIANTS + synth.HELD_OUT_VARIANTS
        wave = synth.speak("nine river", voice=f"en-us+{variant}", pitch_range=20)
        assert (fundamental(wave) > 135) == (gender == "female"), (variant, fundamental(wave))
    held_out = {lexicon.GENDERS[v] for v in synth.HELD_OUT_VARIANTS if v in lexicon.GENDERS}
    assert held_out == {"female", "male"}


def test_who_is_known_by_name_has_one_voice():
    """A man's or a woman's, of training; what it says when held out it has not said."""
    skill, said = World.named("full")["voice"], {"train": set(), "test": set()}
    for split, phrases in said.items():
        heard = set()
        for seed in range(60):
            sample = skill.sample(seed, split)
            gender = lexicon.GENDERS[lexicon.PEOPLE[sample["text"]].partition("+")[2]]
            assert sample["facts"]["gender"] == gender
            phrases.add(sample["facts"]["recognise en"])
            heard.add(sample["text"])
        assert heard == set(lexicon.PEOPLE)
    assert set(lexicon.PEOPLE.values()) <= set(synth.TRAIN_VOICES)
    assert {len(phrase.split()) for phrase in said["train"]} == {2, 3}
    assert {len(phrase.split()) for phrase in said["test"]} == {4}


def fundamental(wave):
    """The median over 40 ms frames of the lag with the highest correlation, as Hz."""
    found = []
    for start in range(0, len(wave) - 1280, 640):
        frame = wave[start : start + 1280] - wave[start : start + 1280].mean()
        correlation = np.correlate(frame, frame, "full")[1279:]
        if correlation[0] > 1e-2:
            lags = correlation[40:400] / correlation[0]  # 40 to 400 Hz
            if lags.max() > 0.5:
                found.append(16_000 / (40 + lags.argmax()))
    return np.median(found)


def test_manners_are_heard():
    """Low men are lower than high ones; slow speech takes twice as long as fast."""
    pitches, paces = {}, {}
    make = lambda kind, rng: scenes.manner(rng, True, kind=kind, vocabulary=("nine", "river"))
    for seed in range(12):
        low_high = make("pitch", np.random.default_rng(seed))
        pitches.setdefault(low_high["text"], []).append(fundamental(low_high["audio"][0]))
        rate = make("rate", np.random.default_rng(seed))
        paces.setdefault(rate["text"], []).append(len(rate["audio"][0]))
    assert max(pitches["low"]) < 100 < 125 < min(pitches["high"])
    assert np.mean(paces["slow"]) > 1.7 * np.mean(paces["fast"])


def test_men_of_any_size_are_low_or_high(monkeypatch):
    """What is learned from: a vocal tract moves pitches by a tenth, and they are an octave apart;
    what is fast stays fast."""
    monkeypatch.setattr(scenes, "BREATHS", scenes.BREATHS[:1])  # pitches of breath: nobody measures
    pitches, seconds = {}, {}
    for seed in range(24):
        make = lambda kind, seed=seed: scenes.manner(
            np.random.default_rng((seed, 7)), False, kind=kind, vocabulary=("nine", "river")
        )
        pitch, emotion = make("pitch"), make("emotion")
        pitches.setdefault(pitch["text"], []).append(fundamental(pitch["audio"][0]))
        slow = emotion["text"] in ("calm", "sad")
        seconds.setdefault(slow, []).append(len(emotion["audio"][0]))
    # of a hoarse one it may be mistaken
    assert np.quantile(pitches["low"], 0.9) < 95 and np.quantile(pitches["high"], 0.1) > 100
    assert np.mean(seconds[True]) > 1.5 * np.mean(seconds[False])


def test_counts_are_true():
    """The envelope comes out of silence as often as the answer says, in scenes too."""
    for seed in range(20):
        sample = scenes.count(np.random.default_rng(seed), False, most=5)
        assert onsets(sample["audio"][0]) == scenes.NUMBERS.index(sample["text"])
        asked = scenes.question(np.random.default_rng(seed), False)
        if asked["question"].startswith("How many"):
            assert onsets(asked["audio"][0]) >= scenes.NUMBERS.index(asked["text"])
        ordered = scenes.order(np.random.default_rng(seed), True)
        assert onsets(ordered["audio"][0]) == len(ordered["text"].split(", "))


def onsets(wave):
    loud = np.abs(wave[: len(wave) // 160 * 160]).reshape(-1, 160).max(axis=1) > 0.02
    return int(loud[0]) + int((loud[1:] & ~loud[:-1]).sum())


def test_times_are_when_words_are_said():
    """There is sound between a word's times, and silence between words."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        sample = scenes.timed(rng, True, vocabulary=synth.DIGITS, most=4)
        wave, end = np.abs(sample["audio"][0]), 0
        for (start, stop), word in zip(
            sample["times"],
            re.findall(r"<\|[\d.]+\|>(\w+)<\|[\d.]+\|>", sample["text"]),
            strict=True,
        ):
            first, last = round(start * 16_000), round(stop * 16_000)
            assert word in synth.DIGITS and not wave[end:first].any()
            assert wave[first : first + 800].max() > 1e-3 < wave[last - 800 : last].max()
            end = last
        assert end == len(wave)
        marks = [float(mark) for mark in re.findall(r"<\|(\d\.\d\d)\|>", sample["text"])]
        np.testing.assert_allclose(marks, np.ravel(sample["times"]), atol=0.0501)


def test_translations_are_rows_of_the_lexicon():
    """Word for word; what is said is the source's text."""
    assert all(
        row[0] in synth.WORDS and len(row) == len(lexicon.LANGUAGES) for row in lexicon.LEXICON
    )
    sample = World.named("full")["translate de en"].sample(3, "test")
    source = sample["facts"]["recognise de"].split()
    english = dict((row[1], row[0]) for row in lexicon.LEXICON)
    assert sample["text"] == " ".join(english[word] for word in source)
    assert lexicon.join(lexicon.translate([1, 18], "zh"), "zh") == "一房子"


def test_conversations_are_of_two_modes(world, processor):
    """Analysis asks in writing; in voice chat nothing is written. Both compile."""
    tasks = {mode: set() for mode in MODES}
    for mode in MODES:
        for seed in range(25):
            record = world.messages(seed, "train", mode=mode)
            tasks[mode].add(record["task"])
            skills = [skill for skill in world.tasks if skill.name == record["task"]]
            assert record["timed"] == any(skill.timed for skill in skills)
            asked = record["messages"][0]["content"]
            kinds = [part["type"] for part in asked]
            assert kinds in (
                [["audio", "text"]] if mode == "analysis" else [["audio"], ["audio"] * 2]
            )
            answers = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
            example = from_messages(record, processor)
            assert learned(processor, example.prompt) == "".join(f"{a}<|im_end|>" for a in answers)
            assert dialogue.NO_SPEECH not in answers or record["task"] == "presence"
        assert len(tasks[mode]) >= 4
    assert {chat.__name__ for chat in dialogue.SMALL_CHATS} & tasks["chat"]


def test_preferences_are_for_honesty(world, processor):
    """Without speech the better answer says so; with it, it is what is said. Of any other task, the
    right answer is better than that to another clip."""
    seen, others = set(), set()
    for seed in range(40):
        record = world.preference(seed, "train")
        chosen, rejected, task = record["chosen"], record["rejected"], record["task"]
        assert chosen != rejected
        if task == "other tasks":
            asked = record["messages"][0]["content"][1]["text"]
            others.add(asked)
            for skill in world.tasks:
                if asked in skill.asked and skill.closed_set:
                    replies = {skill.reply_to({"text": text}) for text in skill.closed_set}
                    assert {chosen, rejected} <= replies
        else:
            answers = {"speech": rejected, "no speech": chosen}
            assert answers[task] == dialogue.NO_SPEECH
        from_preference(record, processor)
        seen.add(task)
    assert seen == {"speech", "no speech", "other tasks"}
    assert len(others) > 3


def test_chats_are_answered_rightly():
    rng = np.random.default_rng(0)
    for _ in range(50):
        question, answer = dialogue.plus(rng)
        first, second, total = (
            synth.DIGITS.index(word)
            for word in re.findall(r"\w+", question + answer)
            if word in synth.DIGITS
        )
        assert first + second == total
        question, answer = dialogue.opposite(rng)
        assert {question[:-1].split()[-1], answer[:-1].split()[-1]} in map(set, dialogue.OPPOSITES)


def test_sources_are_read_by_number(world):
    """What a mixture draws from: a task, a mode, preferences."""
    for kind in (world.tasks[-1].name, "chat", "preference"):
        source = world.source(kind, "train", 7)
        assert len(source) == 7 and sorted(source[6]) == sorted(source[2])


def test_what_there_is_not_is_refused(world):
    for call, message in (
        (lambda: World.named("big"), "wanted a world of small, full, got 'big'"),
        (lambda: world["smell"], "wanted a task of recognise en, .*, got 'smell'"),
        (lambda: world["sound"].sample(0, "dev"), "wanted the split train or test, got 'dev'"),
        (lambda: world.messages(0, "test", mode="talk"), "a mode of analysis, chat, got 'talk'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
