"""Data sets that tensorflow-datasets prepared, read without TensorFlow."""

import functools
import json
import os
from typing import Any

import numpy as np
from etils import epath

from qwen2audio_jax.data.example import FATAL, BadSample, on_disk

# As tensorflow-datasets names the types of what it stores.
AUDIO = "tensorflow_datasets.core.features.audio_feature.Audio"
TENSOR = "tensorflow_datasets.core.features.tensor_feature.Tensor"


def open_split(name: str, *, rate: int | None = None) -> "Prepared":
    """Opens `name/config:split`, in its newest version.

    Raises:
      ImportError: tensorflow-datasets is not installed.
      FileNotFoundError: it is not prepared on this disk as ArrayRecord; the message says how.
      ValueError: there is no such split, it holds audio without a sampling rate, or TFDS_DATA_DIR
        is no disk's.
    """
    data_set, _, split = name.partition(":")
    if not split:
        raise ValueError(f"wanted tfds:name/config:split, got tfds:{name}")
    return Prepared(os.fspath(_folder(data_set)), split, rate)


def _folder(data_set: str) -> epath.Path:
    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    on_disk(folder, "TFDS_DATA_DIR on a disk (mount the bucket)")
    root = epath.Path(folder).expanduser()
    infos = (root / data_set).glob("*/dataset_info.json")
    versions = [
        path.parent for path in infos if _info(path.parent).get("fileFormat") == "array_record"
    ]
    if not versions:
        build = f"tfds build {data_set} --file_format=array_record"
        raise FileNotFoundError(
            f"no {data_set} as ArrayRecord in {root} (TFDS_DATA_DIR): run `{build}`, which may"
            " need TensorFlow, on any machine"
        )
    return max(versions, key=lambda path: [int(n) for n in path.name.split(".") if n.isdigit()])


def _info(folder: epath.Path) -> dict[str, Any]:
    return json.loads((folder / "dataset_info.json").read_text())


class Prepared:
    """One split: audio is (samples, rate) or a file's bytes, text is text, a class its name; names
    of several are one text, "dog, rain".

    `tfds.data_source` reads without TensorFlow, except for audio: merely to declare an Audio
    feature it imports TensorFlow. Audio is stored as a plain tensor of samples, or as a sound
    file's bytes, and is declared as that here; all else, slices of splits too, is left to tfds.
    """

    def __init__(self, folder: str, split: str, rate: int | None = None):
        self.folder, self.split, self.rate = folder, split, rate
        for field, told in self._audio.items():
            if not told.get("lazyDecode") and not (rate or told.get("sampleRate")):
                how = "give it: --data.rate, or rate= in Python"
                raise ValueError(f"{folder} states no sampling rate for {field!r}: {how}")
        self._records, self._features  # noqa: B018 what cannot be read is refused here, not later

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = self._features.deserialize_example_np(self._records[index])
            return {name: self._plain(name, value) for name, value in row.items()}
        except FATAL:
            raise
        except Exception as error:  # ArrayRecord's, protobuf's, tfds's own
            message = f"{self.folder}, {self.split}, record {index}: {error}"
            raise BadSample("bad row", message) from None

    def _plain(self, name: str, value: Any) -> Any:
        if name in self._audio:
            return self._sound(value, self._audio[name])
        if hasattr(self._features[name], "int2str"):  # a sequence passes on what its feature has
            called = [self._features[name].int2str(n) for n in np.ravel(value).tolist() if n >= 0]
            return ", ".join(called) if np.ndim(value) else next(iter(called), None)
        return value.decode("utf-8") if isinstance(value, bytes) else value

    def _sound(self, value: Any, told: dict[str, Any]) -> Any:
        if not len(value):  # what tfds stores where there is none
            return None
        if told.get("lazyDecode"):
            return value
        samples = np.asarray(value)
        if samples.dtype.kind == "i":  # stored wide, whatever the recording's own width was
            narrow = np.abs(samples).max(initial=0) <= 1 << 15
            samples = samples.clip(-(1 << 31), (1 << 31) - 1).astype(np.int32)
            samples = (
                samples.clip(-(1 << 15), (1 << 15) - 1).astype(np.int16) if narrow else samples
            )
        return samples, int(told.get("sampleRate") or self.rate)

    @functools.cached_property
    def _declared(self) -> dict[str, Any]:
        return json.loads((epath.Path(self.folder) / "features.json").read_text())

    @functools.cached_property
    def _audio(self) -> dict[str, dict[str, Any]]:
        """What is declared of the features that are audio."""
        features = self._declared["featuresDict"]["features"]
        return {
            name: feature["audio"]
            for name, feature in features.items()
            if feature["pythonClassName"] == AUDIO
        }

    @functools.cached_property
    def _features(self) -> Any:
        from tensorflow_datasets.core import features as tfds_features

        declared = {**self._declared["featuresDict"]["features"]}
        for name, audio in self._audio.items():
            stored = {"dtype": audio["dtype"], "shape": audio.get("shape", {}), "encoding": "none"}
            if audio.get("lazyDecode"):
                stored |= {"dtype": "string", "shape": {}}
            declared[name] = {"pythonClassName": TENSOR, "tensor": stored}
        top = {**self._declared, "featuresDict": {"features": declared}}
        features = tfds_features.FeaturesDict.from_json(top)
        features.load_metadata(self.folder)  # the classes' names
        return features

    @functools.cached_property
    def _records(self) -> Any:
        import grain
        from tensorflow_datasets.core import dataset_info, naming, splits

        told = dataset_info.read_from_json(epath.Path(self.folder) / "dataset_info.json")
        template = naming.ShardedFileTemplate(
            data_dir=epath.Path(self.folder), dataset_name=told.name, filetype_suffix="array_record"
        )
        known = splits.SplitDict.from_proto(told.splits, template)
        name = self.split.partition("[")[0]
        if name not in known:
            raise ValueError(f"{self.folder}: no split {name!r}, wanted one of {', '.join(known)}")
        return grain.sources.ArrayRecordDataSource(known[self.split].file_instructions)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "split": self.split, "rate": self.rate}
