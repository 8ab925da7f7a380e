"""Data sets that tensorflow-datasets really wrote, in place of a download."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

AUDIO = "tensorflow_datasets.core.features.audio_feature.Audio"


def write(
    folder: pathlib.Path,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    features: Callable[[Any], Mapping[str, Any]],
    *,
    audio: str,
    **told: Any,
) -> Any:
    """Writes `made_speech/en`, in version 1.2.0.

    Args:
      features: given the library, what the fields of a row are.
      audio: the field that is declared to be sound: tfds cannot declare it without TensorFlow, but
        stores it as it stores this field.
      told: what the declaration says of it, as sampleRate or lazyDecode.

    Returns:
      The builder, which still reads the field as it was stored.
    """
    import tensorflow_datasets as tfds

    class MadeSpeech(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en")]  # noqa: RUF012

        def _info(self):
            declared = tfds.features.FeaturesDict(features(tfds))
            return tfds.core.DatasetInfo(builder=self, features=declared)

        def _split_generators(self, _):
            return {name: self._generate_examples(rows) for name, rows in splits.items()}

        def _generate_examples(self, rows):
            yield from enumerate(rows)

    builder = MadeSpeech(config="en", data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    path = next(folder.rglob("features.json"))
    declared = json.loads(path.read_text())
    fields = declared["featuresDict"]["features"]
    fields[audio] = {"pythonClassName": AUDIO, "audio": {**fields[audio]["tensor"], **told}}
    path.write_text(json.dumps(declared))
    return builder
