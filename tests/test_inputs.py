"""What a porting engineer passes is taken as it is: other libraries' arrays, and whole batches."""

import jax
import numpy as np
import pytest
import small
import torch
from flax import nnx

from qwen2audio_jax import Qwen2Audio, generate


@pytest.fixture(scope="module")
def model():
    return small.shaken(Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def inputs():
    return small.inputs([30, 13])


def wide(x):
    return x.astype(np.float64 if x.dtype.kind == "f" else np.int64)


FORMS = {"wide": wide, "torch": lambda x: torch.from_numpy(wide(x)), "jax": jax.numpy.asarray}


@pytest.mark.parametrize("form", FORMS)
def test_arrays_of_any_library(form, model, inputs):
    """torch's tensors and numpy's widest types give the same scores and answers."""
    given = {key: FORMS[form](value) for key, value in inputs.items()}
    np.testing.assert_array_equal(model(**given), model(**inputs))
    answers = generate(model, inputs, max_new_tokens=4)
    np.testing.assert_array_equal(generate(model, given, max_new_tokens=4), answers)


def test_labels_change_nothing(model, inputs):
    """A training batch can be passed whole."""
    labels = np.full(inputs["input_ids"].shape, -100, np.int32)
    np.testing.assert_array_equal(model(**inputs, labels=labels), model(**inputs))


def test_a_missing_mask_means_no_padding(model):
    """Also beside torch's tensors."""
    ids = torch.arange(6, 12)[None]
    scores = model(ids)
    np.testing.assert_array_equal(scores, model(ids, torch.ones_like(ids)))
