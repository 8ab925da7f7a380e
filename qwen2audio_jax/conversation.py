"""A conversation's turns -> answers, each reading only what is new."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen2audio_jax import cache as caches
from qwen2audio_jax.cache import Cache
from qwen2audio_jax.generate import (
    GREEDY,
    SHORTEST_CACHE,
    SHORTEST_PROMPT,
    bucket,
    decode,
    extend,
    listen,
    room,
)
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.prompt import Prompt
from qwen2audio_jax.sampling import Sampling, rules_for
from qwen2audio_jax.stop import StopStrings
from qwen2audio_jax.stream import Pieces, read


class Conversation:
    """Keeps what the model has read and said, for the turns to come.

    Answers are those of `stream` on the whole conversation. What a turn shares with the one
    before, clips above all, is neither heard nor read again; what was changed since is.
    """

    def __init__(self, model: Qwen2Audio, processor: Processor):
        self.model = model
        self.processor = processor
        self.forget()

    def forget(self) -> None:
        """Lets go of the past and its memory."""
        self.cache: Cache | None = None
        self.tokens: list[int] = []  # what the cache holds
        self.waves: list[np.ndarray] = []  # and the clips in it

    def stream(
        self,
        messages: Sequence[Mapping],
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        sampling: Sampling = GREEDY,
        end_tokens: Sequence[int] | None = None,
        stop: Sequence[str] = (),
    ) -> Pieces:
        """Answers the last of all `messages` so far, piece by piece.

        Args and Raises: as in `stream`. If an answer is not taken to its end, the next turn
        reads everything anew.
        """
        prompt, waves = self.processor.conversation(messages)
        tokens = [token for segment in prompt for token in segment.ids]
        rows = [np.array(tokens, np.int32)]
        limit = room(self.model, rows, max_new_tokens)
        rules = rules_for(
            self.model.config, sampling, min_new_tokens=min_new_tokens, end_tokens=end_tokens
        )
        stops = StopStrings(stop, self.processor, 1) if stop else None

        def answer(spoken: list[int]) -> Iterator[str]:
            logits, cache = self._read(prompt, tokens, waves, limit)
            made = decode(self.model, rows, logits, cache, rules, limit, stops=stops, paced=True)
            self.cache = yield from read(self.processor, made, stop, spoken)
            self.tokens = (tokens + spoken)[: int(self.cache.length)]
            self.waves = waves

        ends = self.model.config.end_tokens if end_tokens is None else end_tokens
        return Pieces(answer, ends, limit)

    def _read(self, prompt: Prompt, tokens: list[int], waves: list, limit: int) -> tuple:
        """Brings the cache to the end of the prompt: the scores of what follows, and the cache."""
        known, clips = self._known(prompt, waves)
        new = len(tokens) - known
        length = bucket(new, SHORTEST_PROMPT, per_octave=4)
        slots = bucket(max(known + length, len(tokens) + limit), SHORTEST_CACHE, per_octave=2)
        ids = np.full((1, length), self.model.config.pad_token, np.int32)
        ids[0, :new] = tokens[known:]
        mask = (np.arange(length) < new).astype(np.int32)[None]
        inputs: dict[str, Any] = {"input_ids": ids}
        if waves[clips:]:
            inputs |= self.processor.features(waves[clips:])
        heard = listen(self.model, inputs)
        cache = self.cache
        self.forget()  # what is given away must not be used again, should this be interrupted
        if cache is not None:
            if slots > cache.slots:
                cache = caches.grow(cache, slots)
            cache = caches.rewind(cache, jnp.int32(known))
        return extend(self.model, ids, mask, heard, cache=cache, slots=slots, used=new)

    def _known(self, prompt: Prompt, waves: list) -> tuple[int, int]:
        """How many tokens, and clips among them, the prompt begins with as the cache does."""
        known = clips = 0
        for segment in prompt:
            there = self.tokens[known : known + len(segment.ids)]
            pairs = zip(there, segment.ids, strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(there))
            if segment.clip is not None:
                # a clip is known as a whole or not at all
                heard = self.waves[segment.clip : segment.clip + 1]
                same *= bool(heard) and np.array_equal(heard[0], waves[segment.clip])
                if same < len(segment.ids):
                    break
                clips += 1
            known += same
            if same < len(segment.ids):
                break
        # the last token is always read, for what it says comes next
        return min(known, sum(len(segment.ids) for segment in prompt) - 1), clips
