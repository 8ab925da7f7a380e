"""A small made world: samples of every kind the reference is trained for, in closed vocabularies.

    world = World.named("small")
    skill = world["gender"]
    sample = skill.sample(7, "train")     # {"audio": (wave, 16000), "text": "female", ...}
    skill.compile(sample, processor)      # an Example: instruction.Task fills its line
    world.messages(7, "train", mode="chat")
    world.preference(7, "test")

Everything is a pure function of seed and split. Test samples are by voices, and of sounds with
frequencies, that no training sample has; where the question is whose voice it is, new is what is
said. Speech needs espeak-ng (extra: `demo`).
"""

import dataclasses
import pathlib
from functools import partial
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from qwen2audio_jax import prompt
from qwen2audio_jax.audio import SAMPLE_RATE
from qwen2audio_jax.data import dialogue, lexicon, scenes, skills, sounds
from qwen2audio_jax.data.skills import Skill, generator
from qwen2audio_jax.data.sources import Made

NAMES, MODES = ("small", "full"), ("analysis", "chat")
# Their places are those of the presets' token ids.
SPECIAL = (
    *(prompt.PAD, prompt.IM_START, prompt.IM_END),
    *(prompt.AUDIO, prompt.AUDIO_BOS, prompt.AUDIO_EOS),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Tasks, conversations and preferences in one vocabulary."""

    name: str
    words: dict[str, tuple[str, ...]]  # that are said, by language
    tasks: tuple[Skill, ...]
    chats: tuple[dialogue.Chat, ...]

    @classmethod
    def named(cls, name: str) -> "World":
        """The "small" world, for minutes on a laptop, or the "full" one."""
        if name not in NAMES:
            raise ValueError(f"wanted a world of {', '.join(NAMES)}, got {name!r}")
        if name == "small":
            words, chats = {"en": lexicon.SMALL}, dialogue.SMALL_CHATS
            tasks = skills.small(words["en"], chats)
        else:
            words = {language: lexicon.words(language) for language in lexicon.LANGUAGES}
            chats = dialogue.FULL_CHATS
            tasks = skills.full(words["en"], chats)
        return cls(name=name, words=words, tasks=tasks, chats=chats)

    def __getitem__(self, task: str) -> Skill:
        found = [skill for skill in self.tasks if skill.name == task]
        if not found:
            names = ", ".join(skill.name for skill in self.tasks)
            raise ValueError(f"wanted a task of {names}, got {task!r}")
        return found[0]

    def messages(self, seed: int, split: str, *, mode: str) -> dict[str, Any]:
        """The `seed`th conversation for SFT, {"messages": [...], "task": ...}.

        Args:
          mode: audio analysis, with a written question, or voice chat, with a spoken one.
        """
        if mode not in MODES:
            raise ValueError(f"wanted a mode of {', '.join(MODES)}, got {mode!r}")
        rng, held_out = generator(f"messages {mode}", seed, split)
        if mode == "analysis":
            return dialogue.analysis(self.tasks, rng, held_out=held_out)
        return dialogue.chat(self.tasks, self.chats, rng, held_out=held_out)

    def preference(self, seed: int, split: str) -> dict[str, Any]:
        """The `seed`th pair of answers for DPO, {"messages", "chosen", "rejected", "task"}."""
        rng, held_out = generator("preference", seed, split)
        silent = lambda rng: (scenes.unspoken(rng, held_out), SAMPLE_RATE)
        recognition = self["recognise en"]
        return dialogue.preference(recognition, self.tasks, silent, rng, held_out=held_out)

    def source(self, kind: str, split: str, count: int) -> Made:
        """`count` samples of a task, of a mode's conversations, or of "preference"."""
        if kind == "preference":
            return Made(partial(self.preference, split=split), count)
        if kind in MODES:
            return Made(partial(self.messages, split=split, mode=kind), count)
        return Made(partial(self[kind].sample, split=split), count)

    def closed_words(self) -> list[str]:
        """The words that answers are made of: each should be one token, also behind a space."""
        answers = [word for words in self.words.values() for word in words]
        answers += [text for skill in self.tasks for text in skill.closed_set]
        answers += [*sounds.EVENTS, *map(scenes.plural, sounds.EVENTS)]
        return sorted({word for text in answers for word in text.split()})

    def texts(self) -> list[str]:
        """All that is asked and answered, to make a vocabulary from; sentences once each."""
        rng = np.random.default_rng(0)
        chats = [text for chat in self.chats for _ in range(300) for text in chat(rng)]
        asked = [
            text.replace("[TEXT:question]", "")
            for skill in self.tasks
            for text in (*skill.prompts, *skill.paraphrases, *skill.asked)
        ]
        replies = [skill.reply.replace("{text}", "") for skill in self.tasks]
        own = [*scenes.CAPTIONS, *scenes.QUESTIONS] if self.name == "full" else []
        written = [*chats, *asked, *replies, *own, dialogue.NO_SPEECH]
        spoken = map(lexicon.spoken, (*chats, *asked))
        return sorted({*self.closed_words(), *written, *spoken})

    def special(self) -> list[str]:
        """Tokens besides text: of the model, languages, tags that say a task, and time."""
        tags = [tag for skill in self.tasks for tag in prompt.TAG.findall(skill.tags)]
        times = []
        if any(skill.metric == "times" for skill in self.tasks):
            longest = max(skill.seconds for skill in self.tasks)
            times = [f"<|{n / 10:.2f}|>" for n in range(round(10 * longest) + 1)]
        return list(
            dict.fromkeys([*SPECIAL, *(f"<|{each}|>" for each in self.words), *tags, *times])
        )

    def write_tokenizer(self, folder: pathlib.Path, *, vocabulary: int) -> None:
        """Trains a byte-level BPE, of Qwen2's kind, and writes it as the folder's tokenizer.json.

        Raises:
          ValueError: `vocabulary` is too small for every word of answers to be one token.
        """
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=self.special(),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        words = self.closed_words()
        scaffold = prompt.ChatTemplate().render([{"role": "user", "content": [prompt.CLIP]}])
        said = [*words, *(f" {word}" for word in words)]
        core.train_from_iterator([*said * 100, *self.texts(), *[scaffold] * 10], trainer)
        if split := [word for word in said if len(core.encode(word).ids) > 1]:
            raise ValueError(
                f"a vocabulary of {vocabulary} splits {len(split)} of {len(said)} words,"
                f" {split[0]!r} among them"
            )
        folder.mkdir(parents=True, exist_ok=True)
        core.save(str(folder / "tokenizer.json"))
