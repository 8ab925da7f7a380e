"""Packaging. The tools' settings are in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

DATA = ["grain>=0.2.18", "array-record", "tensorflow-datasets", "threadpoolctl"]
TRAIN = [*DATA, "matplotlib", "tensorboardX"]
DEMO = [*TRAIN, "espeakng-loader>=0.2.4"]
EVAL = ["jiwer", "sacrebleu", "whisper-normalizer", "zhconv", "httpx"]
NOTEBOOKS = [*DEMO, "nbclient", "nbformat", "ipykernel"]
TEST = [
    *NOTEBOOKS,
    "beartype",
    "hypothesis",
    "peft==0.21.2",  # whose folders are read and written
    "psutil",
    "pytest",
    "pytest-cov",
    "pytest-xdist",
    "ruff==0.17.*",
    "torch==2.13.0",
    "transformers==5.23.0",  # with torch, the reference that parity is measured against
]
# jax before computes a gradient of the mask of cuDNN's attention; Python 3.11 has none newer.
GPU_JAX = "jax>=0.11.2; python_version >= '3.12'"

setup(
    name="qwen2audio_jax",
    version="0.1.0",
    description="Qwen2-Audio in JAX and Flax: hear, answer, train, and carry weights both ways.",
    long_description=pathlib.Path("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["qwen2audio_jax", "qwen2audio_jax.*"]),
    package_data={"qwen2audio_jax": ["assets/tiny/*", "py.typed"]},
    entry_points={"console_scripts": ["qwen2audio = qwen2audio_jax.cli:main"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "numpy",
        "librosa>=0.11",
        "soxr",
        "soundfile",
        "tokenizers",
        "safetensors",
        "huggingface-hub",
        "jinja2",
        "einops",
        "jaxtyping",
        "etils[epath]",
        "tyro",
        "tqdm",
    ],
    extras_require={
        "data": DATA,
        "demo": DEMO,
        "eval": EVAL,
        "train": TRAIN,
        "gcs": ["gcsfs"],
        "s3": ["s3fs"],
        "wandb": ["wandb"],
        "notebooks": NOTEBOOKS,
        "test": TEST,
        "tpu": ["jax[tpu]"],
        "cuda12": ["jax[cuda12]", GPU_JAX],
        "cuda13": ["jax[cuda13]", GPU_JAX],
    },
)
