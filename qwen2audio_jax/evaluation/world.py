"""How well a model knows a small made world: one row for each task and each of its behaviours."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from qwen2audio_jax.data.example import Example
from qwen2audio_jax.data.world import MODES, World
from qwen2audio_jax.evaluation import answering, metrics
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.prompt import TAG

TOLERANCE = 0.1  # seconds that a boundary may be off
TIME = re.compile(r"<\|(\d+\.\d\d)\|>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A held-out sample: what is asked, and what is right."""

    task: str
    metric: str  # a name of METRICS
    example: Example  # with its prompt alone
    right: str
    question: str = ""  # of a conversation
    choices: tuple[str, ...] | None = None  # all there is to answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table."""

    task: str
    metric: str
    value: float
    n: int


def score(
    model: Qwen2Audio,
    processor: Processor,
    world: World,
    clips: int = 50,
    *,
    kinds: Sequence[str] | None = None,
    split: str = "test",
    style: str = "prompt",
    paraphrased: bool = False,
    constrained: bool = False,
    batch: int = 32,
) -> list[Row]:
    """Answers greedily, and compares.

    Args:
      clips: samples of each kind.
      kinds: names of tasks, "analysis", "chat" and "preference"; by default all of them.
      style: how tasks are asked: "prompt", "tags" or "none".
      paraphrased: ask for tasks in words that were not trained on.
      constrained: let answers of closed sets be nothing else.

    Returns:
      A row for each task; for conversations one for each mode; for preferences one for clips
      without speech (it is said that there is none), one for clips with it (the words are), and one
      for classes.
    """
    kinds = [*(s.name for s in world.tasks), *MODES, "preference"] if kinds is None else kinds
    asked = [
        each
        for kind in kinds
        for each in ask(
            processor, world, kind, clips, split=split, style=style, paraphrased=paraphrased
        )
    ]
    told = answer(model, processor, asked, constrained=constrained, batch=batch)
    return rows(asked, told)


def ask(
    processor: Processor,
    world: World,
    kind: str,
    clips: int,
    *,
    split: str = "test",
    style: str = "prompt",
    paraphrased: bool = False,
) -> list[Asked]:
    """The first samples of a kind, each with its prompt and the right answer."""
    source = world.source(kind, split, clips)
    if kind not in (*MODES, "preference"):
        skill = world[kind]
        return [
            Asked(
                task=kind,
                metric=skill.metric,
                example=skill.compile(
                    sample, processor, style=style, paraphrased=paraphrased, learn=False
                ),
                right=sample["text"],
                choices=tuple(skill.task().choices(sample) or ()) or None,
            )
            for sample in (source[i] for i in range(clips))
        ]
    asked = []
    for record in (source[i] for i in range(clips)):
        messages = record["messages"]
        right = record["chosen"] if kind == "preference" else messages[1]["content"]
        task = f"preference: {record['task']}" if kind == "preference" else kind
        asked.append(_asked(task, messages[:1], right, processor))
    return asked


def _asked(task: str, messages: Sequence[Mapping], right: str, processor: Processor) -> Asked:
    """What the last of some messages asks."""
    prompt, waves = processor.conversation(messages, long_audio="error")
    written = [part["text"] for part in messages[-1]["content"] if part["type"] == "text"]
    return Asked(
        task=task,
        metric="exact",
        example=Example(prompt, tuple(waves)),
        right=right,
        question=written[0] if written else "(spoken)",
    )


def converse(
    model: Qwen2Audio, processor: Processor, messages: Sequence[Mapping]
) -> list[tuple[Asked, str]]:
    """Asks a conversation's questions in turn, each behind what the model itself has answered."""
    said, turns = [], []
    for user, assistant in zip(messages[::2], messages[1::2], strict=True):
        said.append(user)
        asked = _asked("conversation", said, assistant["content"], processor)
        (told,) = answer(model, processor, [asked])
        said.append({"role": "assistant", "content": TAG.sub("", told)})
        turns.append((asked, told))
    return turns


def answer(
    model: Qwen2Audio,
    processor: Processor,
    asked: Sequence[Asked],
    *,
    constrained: bool = False,
    batch: int = 32,
    max_new_tokens: int = 48,
) -> list[str]:
    """What the model says to each, special tokens included, up to the end."""
    return answering.answer(
        model,
        processor,
        [each.example for each in asked],
        [each.choices if constrained else None for each in asked],
        rows=batch,
        max_new_tokens=max_new_tokens,
    )


def rows(asked: Sequence[Asked], told: Sequence[str]) -> list[Row]:
    """A row for each task, in order of appearance."""
    table = []
    for task in dict.fromkeys(each.task for each in asked):
        pairs = [(a, t) for a, t in zip(asked, told, strict=True) if a.task == task]
        metric = pairs[0][0].metric
        value = METRICS[metric]([a.right for a, _ in pairs], [t for _, t in pairs])
        table.append(Row(task=task, metric=metric, value=value, n=len(pairs)))
    return table


def table(rows: Iterable[Row]) -> str:
    """Rows as text."""
    lines = [f"{'task':24} {'metric':8} {'value':>7} {'n':>5}"]
    lines += [f"{row.task:24} {row.metric:8} {row.value:7.1%} {row.n:5}" for row in rows]
    return "\n".join(lines)


def compare(stages: Mapping[str, Sequence[Row]]) -> str:
    """The same rows at several times, side by side, as text."""
    value = {name: {row.task: row.value for row in rows} for name, rows in stages.items()}
    names = "".join(f" {name:>9}" for name in stages)
    lines = [f"{'task':24} {'metric':6} {'n':>5}{names}"]
    for row in next(iter(stages.values())):
        values = "".join(f" {value[name][row.task]:9.1%}" for name in stages)
        lines.append(f"{row.task:24} {row.metric:6} {row.n:5}{values}")
    return "\n".join(lines)


def exact(right: Sequence[str], told: Sequence[str]) -> float:
    """The part of answers that are right to the letter, tags of languages aside."""
    same = [TAG.sub("", text).strip() == each for each, text in zip(right, told, strict=True)]
    return sum(same) / len(same)


def boundaries(right: Sequence[str], told: Sequence[str]) -> float:
    """The part of words' beginnings and ends that are foreseen to within TOLERANCE.

    Where other words are recognised than are said, in part or in number, none of them counts.
    """
    good = total = 0
    for each, text in zip(right, told, strict=True):
        wanted, got = ([*map(float, TIME.findall(one))] for one in (each, text))
        total += len(wanted)
        words = [TAG.sub(" ", one).split() for one in (each, text)]
        if words[0] == words[1] and len(wanted) == len(got):
            close = (abs(a - b) < TOLERANCE + 0.001 for a, b in zip(wanted, got, strict=True))
            good += sum(close)
    return good / total


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact": exact,
    "wer": metrics.word_error_rate,
    "times": boundaries,
}
