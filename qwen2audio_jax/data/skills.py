"""What a small made world can be asked: each task's line, prompts, questions and right answers."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np

from qwen2audio_jax.audio import SAMPLE_RATE
from qwen2audio_jax.data import dialogue, lexicon, scenes, sounds
from qwen2audio_jax.data.example import Example
from qwen2audio_jax.data.instruction import Task, hierarchical_tags
from qwen2audio_jax.data.lexicon import LANGUAGES
from qwen2audio_jax.processor import Processor

# Paraphrases that are never trained on use words that are: what is new is how they are put.
RECOGNISE = (
    "Detect the language and recognize the speech:",
    "Recognize the speech and detect the language:",
    "Write the words of the speech:",
)
RECOGNISE_OTHERWISE = ("Write the words and detect the language:", "Recognize the words:")
TRANSLATE = (
    "Detect the language and translate the speech into {}:",
    "Translate the speech into {}:",
    "Write the translation of the speech in {}:",
)
TRANSLATE_OTHERWISE = ("Write the speech in {}:", "Translate the words into {}:")
CLASSIFY = (
    "Classify {} in English:",
    "Recognize {} with keywords in English:",
    "Name {}:",
)
CLASSIFY_OTHERWISE = ("Classify {} with keywords:", "Name {} in English:")
CAPTION = ("Generate the caption in English:", "Write a caption:", "Describe the audio in English:")
CAPTION_OTHERWISE = ("Describe the audio:", "Write the caption in English:")
ANSWER = ("Answer the question:", "Answer in English:", "Listen to the audio and answer:")
ANSWER_OTHERWISE = ("Answer the question in English:", "Listen and answer the question:")
TIMES = (
    "Recognize the speech with the time of each word:",
    "Write the words of the speech with the time of each:",
    "Detect the time of each word:",
)
TIMES_OTHERWISE = (
    "Write the time of each word of the speech:",
    "Recognize each word with the time:",
)
TAGGED = "<|[TEXT:language]|>[TEXT:text]"  # the model says the language, too

# In a conversation: what is asked, and the answer.
SAID = ("What does the person say?", "What is said?")
MEANT = ("What does that mean in {}?", "How do you say that in {}?")
# fmt: off
CLASSES = {
    # what is classified, the answer in a conversation, questions
    "voice": ("the speaker", "It is {text}.", ("Whose voice is that?",)),
    "gender": ("the gender of the speaker", "The speaker is {text}.",
               ("Who is speaking?", "Is the speaker male or female?")),
    "pitch": ("the pitch of the voice", "The voice is {text}.", ("Is the voice low or high?",)),
    "rate": ("the speed of the speech", "The speech is {text}.", ("Is the speech slow or fast?",)),
    "emotion": ("the emotion of the speaker", "The speaker is {text}.",
                ("How does the speaker feel?",)),
    "presence": ("the presence of speech", "I hear {text}.",
                 ("Is there speech?", "Do you hear speech?")),
    "sound": ("the sound", "It is a {text}.", ("What sound is that?", "What do you hear?")),
    "count": ("the number of sounds", "I hear {text}.", ("How many sounds do you hear?",)),
    "order": ("the sounds in order", "I hear {text}.", ("Which sounds do you hear in order?",)),
    "tone": ("the pitch of the tone", "The tone is {text}.", ("Is the tone low or high?",)),
    "interval": ("the higher tone", "The {text} tone is higher.", ("Which tone is higher?",)),
    "chord": ("the chord", "The chord is {text}.", ("Is the chord rising or falling?",)),
    "rhythm": ("the speed of the rhythm", "The rhythm is {text}.",
               ("Is the rhythm slow or fast?",)),
    "instrument": ("the instrument", "It is the {text}.", ("Which instrument is playing?",)),
}
# fmt: on
SETS = {
    "voice": tuple(lexicon.PEOPLE),
    "gender": ("male", "female"),
    "pitch": tuple(scenes.PITCHES),
    "rate": tuple(scenes.SPEEDS),
    "emotion": tuple(scenes.EMOTIONS),
    "presence": ("speech", "no speech"),
    "sound": sounds.EVENTS,
    "tone": tuple(sounds.TONES),
    "interval": ("first", "second"),
    "chord": tuple(sounds.CHORDS),
    "rhythm": tuple(sounds.BEATS),
    "instrument": tuple(sounds.INSTRUMENTS),
}
# Weights of who speaks and how: what is heard in the pitch of a voice is learned late.
SPEAKING = {"voice": 2.0, "gender": 4.0, "pitch": 6.0, "rate": 1.0, "emotion": 6.0}
AT_ANY_SPEED = ("gender",)  # of these: played faster, a man is still a man, but nobody's low voice
OWN = "{question}"  # where a sample brings its question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skill:
    """One thing to hear, how it is asked, and what is right."""

    name: str
    make: Callable[[np.random.Generator, bool], dict[str, Any]]  # see scenes.py
    prompts: tuple[str, ...]
    paraphrases: tuple[str, ...]  # never trained on
    tags: str
    answer: str = "[TEXT:text]"  # what follows the arrow
    closed_set: tuple[str, ...] = ()
    metric: Literal["exact", "wer", "times"] = "exact"
    asked: tuple[str, ...] = ()  # in a conversation; {question} is the sample's own
    reply: str = "{text}"
    words: bool = False  # whether what is answered is what is said, word by word
    timed: bool = False  # whether the answer is untrue at another speed, or behind silence
    weight: float = 1.0  # of samples, relative to the other skills
    seconds: float = 5.0  # the longest clip

    def sample(self, seed: int, split: str) -> dict[str, Any]:
        """Makes the `seed`th sample: the line's fields, and which of the prompts asks for it."""
        rng, held_out = generator(self.name, seed, split)
        fields = self.draw(rng, held_out) | {"timed": self.timed}
        return fields | {"prompt": int(rng.integers(len(self.prompts)))}

    def draw(self, rng: np.random.Generator, held_out: bool) -> dict[str, Any]:
        """The fields of a sample whose clip is within the limit."""
        while True:
            sample = self.make(rng, held_out)
            if len(sample["audio"][0]) <= self.seconds * SAMPLE_RATE:
                return sample

    def line(self, prompt: str) -> str:
        """The declaration of the task, in some prompt's words."""
        closed = f",closed_set={'|'.join(self.closed_set)}" if self.closed_set else ""
        answer = self.answer.replace("[TEXT:text]", f"[TEXT:text{closed}]")
        words = ",words=text" if self.words else ""
        return f"[AUDIO:audio,max_seconds={self.seconds:g}{words}] {prompt} -> {answer}"

    def task(self, prompt: int = 0, *, style: str = "prompt", paraphrased: bool = False) -> Task:
        """The task in one of its prompts' words, or in those of a paraphrase."""
        prompts = self.paraphrases if paraphrased else self.prompts
        return _parse(self.line(prompts[prompt % len(prompts)]), self.tags, style)

    def compile(
        self,
        sample: Mapping,
        processor: Processor,
        *,
        style: str = "prompt",
        paraphrased: bool = False,
        learn: bool = True,
    ) -> Example:
        """Fills in a sample: to be learned, or (not `learn`) to be answered."""
        task = self.task(sample["prompt"], style=style, paraphrased=paraphrased)
        return task.compile(sample, processor, learn=learn)

    def question(self, sample: Mapping, rng: np.random.Generator) -> str:
        """What is asked about a sample in a conversation."""
        return scenes.pick(rng, self.asked).format(question=sample.get("question"))

    def reply_to(self, sample: Mapping) -> str:
        return self.reply.format(text=sample["text"])


_parse = functools.lru_cache(maxsize=512)(
    lambda line, tags, style: Task.parse(line, tags=tags, style=style)
)


def generator(name: str, seed: int, split: str) -> tuple[np.random.Generator, bool]:
    """What draws a sample, and whether it is held out."""
    if split not in ("train", "test"):
        raise ValueError(f"wanted the split train or test, got {split!r}")
    held_out = split == "test"
    return np.random.default_rng((zlib.crc32(name.encode()), held_out, seed)), held_out


def small(words: tuple[str, ...], chats: tuple[dialogue.Chat, ...]) -> tuple[Skill, ...]:
    """What is learned in minutes."""
    others = [
        _classify("gender", partial(scenes.manner, kind="gender", vocabulary=words)),
        _classify("presence", partial(scenes.presence, vocabulary=words)),
        _classify("sound", scenes.sound),
        _classify("count", partial(scenes.count, most=3), scenes.NUMBERS[1:4]),
    ]
    return tuple(
        dataclasses.replace(skill, seconds=3.0)
        for skill in (_recognise_english(words, 3, others, chats, weight=4.0), *others)
    )


def full(words: tuple[str, ...], chats: tuple[dialogue.Chat, ...]) -> tuple[Skill, ...]:
    """What the reference is trained for."""
    languages = [language for language in LANGUAGES if language != "en"]
    manner = lambda kind: partial(scenes.manner, kind=kind, vocabulary=words)
    drawn = lambda kind, make: partial(scenes.drawn, make=make, among=SETS[kind])
    others = [
        *(
            # French and Chinese words are the shortest, and learned last
            _recognise(code, lexicon.words(code), 3, weight=3.0 if code in ("fr", "zh") else 2.0)
            for code in languages
        ),
        *(_translate(language, "en") for language in languages),
        *(_translate("en", language) for language in languages),
        *(
            _classify(kind, manner(kind), weight=weight, timed=kind not in AT_ANY_SPEED)
            for kind, weight in SPEAKING.items()
        ),
        _classify("presence", partial(scenes.presence, vocabulary=words)),
        _classify("sound", scenes.sound),
        _classify("count", partial(scenes.count, most=5), scenes.NUMBERS[1:6], weight=2.0),
        _classify("order", scenes.order),
        _classify("tone", drawn("tone", sounds.tone)),
        _classify("interval", drawn("interval", sounds.two_tones)),
        _classify("chord", scenes.chord, weight=2.0),
        _classify("rhythm", drawn("rhythm", sounds.rhythm)),
        _classify("instrument", drawn("instrument", sounds.melody)),
        _caption(words),
        _question(),
        _timestamps(words),
    ]
    return (_recognise_english(words, 5, others, chats, weight=6.0), *others)


def _classify(
    name: str,
    make: Callable,
    closed_set: tuple[str, ...] = (),
    *,
    weight: float = 1.0,
    timed: bool = False,
) -> Skill:
    what, reply, asked = CLASSES[name]
    return Skill(
        name=name,
        make=make,
        prompts=tuple(prompt.format(what) for prompt in CLASSIFY),
        paraphrases=tuple(prompt.format(what) for prompt in CLASSIFY_OTHERWISE),
        tags=hierarchical_tags("keyword", instruction=name),
        closed_set=closed_set or SETS.get(name, ()),
        asked=asked,
        reply=reply,
        weight=weight,
        timed=timed,
    )


def _recognise(
    language: str,
    words: tuple[str, ...],
    most: int,
    questions: tuple[Callable, ...] = (),
    weight: float = 2.0,
) -> Skill:
    return Skill(
        name=f"recognise {language}",
        make=partial(
            scenes.speech, language=language, vocabulary=words, most=most, questions=questions
        ),
        prompts=RECOGNISE,
        paraphrases=RECOGNISE_OTHERWISE,
        tags=hierarchical_tags("transcribe", text_language="unknown"),  # it is to be detected
        answer=TAGGED,
        metric="wer",
        words=True,
        asked=SAID,
        weight=weight,
    )


def _recognise_english(
    words: tuple[str, ...],
    most: int,
    others: list[Skill],
    chats: tuple[dialogue.Chat, ...],
    *,
    weight: float,
) -> Skill:
    """Recognition, also of what will be asked aloud."""
    asked = sorted({*SAID, *(text for skill in others for text in skill.asked)} - {OWN})
    questions = [partial(dialogue.chat_question, chat=chat) for chat in chats]
    questions.append(partial(scenes.pick, options=tuple(asked)))
    if any(OWN in skill.asked for skill in others):
        questions.append(scenes.any_question)
    return _recognise("en", words, most, tuple(questions), weight)


def _translate(source: str, target: str) -> Skill:
    put = lambda texts: tuple(text.format(LANGUAGES[target]) for text in texts)
    return Skill(
        name=f"translate {source} {target}",
        make=partial(
            scenes.speech,
            language=source,
            vocabulary=tuple(row[list(LANGUAGES).index(source)] for row in lexicon.LEXICON),
            most=3,
            into=target,
        ),
        prompts=put(TRANSLATE),
        paraphrases=put(TRANSLATE_OTHERWISE),
        tags=hierarchical_tags("translate", text_language=target),
        answer=TAGGED,
        asked=put(MEANT),
        weight=3.0 if source == "zh" else 1.5,  # its words are heard last
    )


def _caption(words: tuple[str, ...]) -> Skill:
    return Skill(
        name="caption",
        make=partial(scenes.caption, vocabulary=words),
        prompts=CAPTION,
        paraphrases=CAPTION_OTHERWISE,
        tags=hierarchical_tags("caption"),
        asked=("What happens in the audio?", "Describe the audio."),
        reply="I hear {text}.",
        weight=4.0,
    )


def _question() -> Skill:
    return Skill(
        name="question",
        make=scenes.question,
        prompts=tuple(f"{prompt} [TEXT:question]" for prompt in ANSWER),
        paraphrases=tuple(f"{prompt} [TEXT:question]" for prompt in ANSWER_OTHERWISE),
        tags=hierarchical_tags("question"),
        asked=(OWN,),
        weight=3.0,
    )


def _timestamps(words: tuple[str, ...]) -> Skill:
    return Skill(
        name="timestamps",
        make=partial(scenes.timed, vocabulary=words, most=4),
        prompts=TIMES,
        paraphrases=TIMES_OTHERWISE,
        tags=hierarchical_tags("transcribe", text_language="unknown", timestamps=True),
        answer=TAGGED,
        metric="times",
        timed=True,
        weight=4.0,
    )
