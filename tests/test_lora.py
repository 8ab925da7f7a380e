"""LoRA computes what PEFT computes, reads and writes PEFT's files, and leaves the base alone."""

import dataclasses
import json
import re

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft as theirs_peft
import pytest
import reference
import small
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

from qwen2audio_jax import Qwen2Audio, sharding, weights
from qwen2audio_jax.training import lora, loss, peft, whole
from qwen2audio_jax.training.lora import LoraConfig
from qwen2audio_jax.weights import table

INPUTS = small.inputs([30, 13], total=3000)
SHORT = small.inputs([30, 13], total=40)
TARGETS = {
    "decoder": (lora.DECODER, 2 * 7),
    "all": ("all-linear", 2 * 7 + 2 * 6 + 1),
    "ends": (("q_proj", "fc2", "o_proj"), 2 * 2 + 2 * 2),
    "one_layer": (r".*language_model.*layers\.1\..*_proj", 7),
}
# what is there whole, beside these targets
WHOLES = {
    "decoder": ["lm_head", "embed_tokens"],
    "ends": ["multi_modal_projector"],
    "one_layer": ["multi_modal_projector", "language_model.norm"],
}
# every target, and both forms of a model
CASES = [("decoder", False), ("all", True), ("ends", False), ("one_layer", True)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random base model that transformers wrote."""
    return reference.save(reference.build(small.CONFIG), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def models(base):
    """The base model with its blocks in a list, and in a stack."""
    return [weights.load(base, scan_layers=scan_layers) for scan_layers in (False, True)]


@pytest.fixture(params=["listed", "stacked"])
def model(request, models):
    return models[request.param == "stacked"]


def shaken(adapters, seed=0):
    """Adapters that add something, in every layer that has one: the second matrix was zero.
    Modules that are there whole are others, too."""
    rng = np.random.default_rng(seed)

    def shake(path, pair):
        if "lora_A" not in pair:
            return {name: x + rng.standard_normal(x.shape, np.float32) for name, x in pair.items()}
        a, b = pair["lora_A"], pair["lora_B"]
        noise = 0.3 * rng.standard_normal(b.shape).astype(np.float32)
        if "blocks" in path and not any(word.isdigit() for word in path.split(".")):
            noise *= np.array([x.any() for x in a]).reshape(-1, *[1] * (b.ndim - 1))
        return {"lora_A": a, "lora_B": b + noise}

    return {path: shake(path, pair) for path, pair in adapters.items()}


def torch_logits(theirs):
    tensors = {name: torch.tensor(x) for name, x in INPUTS.items()}
    with torch.no_grad():
        return theirs(**tensors).logits.float().numpy()


def assert_heard_alike(model, theirs):
    """Equal scores wherever there is a word."""
    kept = SHORT["attention_mask"] == 1
    ours = np.asarray(model(**SHORT))
    np.testing.assert_allclose(ours[kept], torch_logits(theirs)[kept], atol=2e-4)


# PEFT's files


@pytest.mark.parametrize("name, stacked", CASES)
def test_an_export_means_what_peft_means(models, base, tmp_path, name, stacked):
    """W + lora_alpha / r * B A, by hand in torch, on every weight that the file names."""
    model = models[stacked]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS[name][0])
    adapters = shaken(lora.init(config, model, key=jax.random.key(1)))
    peft.save(tmp_path, adapters, config, model)
    tensors = load_file(tmp_path / peft.WEIGHTS)
    assert len(tensors) == 2 * TARGETS[name][1]
    theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(base)
    named = dict(theirs.named_parameters())
    for key in [key for key in tensors if ".lora_A." in key]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        # as transformers 5 calls them
        module = module.removeprefix("model.").replace("language_model.model", "language_model")
        added = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        named[f"model.{module}.weight"].data += 3.0 * added
    assert_heard_alike(lora.apply(model, adapters, config), theirs)
    again, read = peft.load(tmp_path, model)
    assert again == dataclasses.replace(config, target_modules=again.target_modules)
    assert sorted(again.target_modules) == sorted(config.target_modules)
    jax.tree.map(np.testing.assert_array_equal, read, adapters)


WHOLE = LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("multi_modal_projector",))


def test_a_module_may_train_whole_beside_adapters(models, tmp_path):
    """Beside the model, in it, and in what PEFT and convert.to_hf make of the file it is the same;
    the base keeps its own."""
    model = models[True]
    before, fresh = np.asarray(model(**SHORT)), lora.init(WHOLE, model, key=jax.random.key(1))
    np.testing.assert_array_equal(lora.apply(model, fresh, WHOLE)(**SHORT), before)
    abstract = nnx.eval_shape(lambda: Qwen2Audio(small.CONFIG, rngs=nnx.Rngs(0)))
    shapes = jax.eval_shape(lambda: lora.init(WHOLE, abstract, key=jax.random.key(1)))
    assert shapes == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), fresh)
    adapters = shaken(fresh)
    assert adapters["projector"].keys() == {"kernel", "bias"}
    merged = lora.merge(model, adapters, WHOLE)
    np.testing.assert_array_equal(merged.projector.bias[...], adapters["projector"]["bias"])
    logits = np.asarray(lora.apply(model, adapters, WHOLE)(**SHORT))
    np.testing.assert_allclose(merged(**SHORT), logits, atol=5e-4)
    np.testing.assert_array_equal(model(**SHORT), before)
    assert abs(logits - before).max() > 0.1

    peft.save(tmp_path, adapters, WHOLE, model)
    tensors = load_file(tmp_path / peft.WEIGHTS)
    named = "base_model.model.model.multi_modal_projector.linear."
    lora.merge(model, {**adapters, "projector": fresh["projector"]}, WHOLE).save_pretrained(
        tmp_path / "rest"
    )
    theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "rest")
    for name in ("weight", "bias"):
        getattr(theirs.model.multi_modal_projector.linear, name).data = tensors[named + name]
    assert_heard_alike(merged, theirs)
    again, read = peft.load(tmp_path, model)
    assert again == WHOLE and json.loads((tmp_path / peft.SETTINGS).read_text())["modules_to_save"]
    jax.tree.map(np.testing.assert_array_equal, read, adapters)
    make = peft.adapted(tmp_path, model)
    assert len(make) == 2 * 2 + 2
    for entry in table.entries(model.config):
        if entry.name in make:
            was, now = (_weight(each, entry) for each in (model, merged))
            np.testing.assert_allclose(make[entry.name](was), now, atol=1e-5, err_msg=entry.name)


def _weight(model, entry):
    """As Hugging Face's files have it."""
    array = nnx.state(model)
    for word in entry.path.split("."):
        array = array[word]
    array = array.get_value()
    return entry.to_theirs(np.asarray(array if entry.layer is None else array[entry.layer]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, stacked", CASES)
def test_peft_itself_agrees(models, base, tmp_path, name, stacked):
    """What PEFT saves is heard alike by us, and what we save by PEFT, bit for bit the same."""
    model = models[stacked]
    target = TARGETS[name][0]
    target = target if isinstance(target, str) else list(target)
    torch.manual_seed(0)
    modules = WHOLES.get(name, [])
    how = {"target_modules": target, "modules_to_save": modules or None, "lora_dropout": 0.5}
    theirs = theirs_peft.get_peft_model(
        transformers.Qwen2AudioForConditionalGeneration.from_pretrained(base),
        theirs_peft.LoraConfig(r=3, lora_alpha=5, **how),
    ).eval()
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key or "modules_to_save" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    config, adapters = peft.load(tmp_path / "theirs", model)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.5)
    assert config.modules_to_save == tuple(sorted(modules))
    assert_heard_alike(lora.apply(model, adapters, config), theirs)

    peft.save(tmp_path / "ours", adapters, config, model, base=str(base))
    back = theirs_peft.PeftModel.from_pretrained(
        transformers.Qwen2AudioForConditionalGeneration.from_pretrained(base), tmp_path / "ours"
    )
    expected = theirs_peft.get_peft_model_state_dict(theirs)
    got = theirs_peft.get_peft_model_state_dict(back)
    assert expected.keys() == got.keys()
    assert len(got) == 2 * TARGETS[name][1] + len(whole.entries(config.modules_to_save, model))
    assert all(torch.equal(got[key], expected[key]) for key in got)

    lora.merge(model, adapters, config).save_pretrained(tmp_path / "merged")
    merged = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "merged")
    for (key, ours), expected in zip(
        merged.state_dict().items(), theirs.merge_and_unload().state_dict().values(), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-5, err_msg=key)


def test_a_merged_model_is_the_adapted_one(model):
    """Folded into the weights, the adapters add what they add beside them; the base stays."""
    config = LoraConfig(r=4, target_modules="all-linear")
    adapters = shaken(lora.init(config, model, key=jax.random.key(0)))
    before = np.asarray(model(**SHORT))
    adapted = np.asarray(lora.apply(model, adapters, config)(**SHORT))
    merged = np.asarray(lora.merge(model, adapters, config)(**SHORT))
    assert abs(adapted - before).max() > 0.1
    np.testing.assert_allclose(merged, adapted, atol=5e-4)
    np.testing.assert_array_equal(np.asarray(model(**SHORT)), before)


def test_a_bfloat16_base_has_float32_adapters(base):
    """They are computed in float32 and the sum is rounded, as in PEFT; merging rounds once."""
    model = weights.load(base, dtype="bfloat16", scan_layers=True)
    config = LoraConfig(r=2)
    adapters = shaken(lora.init(config, model, key=jax.random.key(0)))
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    adapted = lora.apply(model, adapters, config)
    x = jax.random.normal(jax.random.key(1), (1, 5, 12), jnp.bfloat16)
    layer = jax.tree.map(lambda x: x[1], adapted.decoder.blocks).mlp.up
    a, b = layer.lora_A, layer.lora_B
    expected = layer.base(x) + config.scale * (x.astype(jnp.float32) @ a) @ b
    assert layer(x).dtype == adapted.dtype == jnp.bfloat16
    np.testing.assert_allclose(layer(x), expected.astype(jnp.bfloat16), rtol=0.01)
    kernels = lora.merge(model, adapters, config).decoder.blocks.mlp.up.kernel.get_value()
    exact = layer.base.kernel.get_value().astype(jnp.float32) + config.scale * a @ b
    np.testing.assert_array_equal(kernels[1], exact.astype(jnp.bfloat16))


# Training


def batch():
    ids = SHORT["input_ids"]
    learned = (SHORT["attention_mask"] == 1) & (ids != small.CONFIG.audio_token)
    return SHORT | {"labels": np.where(learned, ids, loss.IGNORED)}


def score(model, batch):
    logp = jax.nn.log_softmax(model(**batch)[:, :-1])
    labels = batch["labels"][:, 1:]
    taken = jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], 2)[..., 0]
    return -jnp.where(labels != loss.IGNORED, taken, 0).sum() / (labels != loss.IGNORED).sum()


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", ["one_layer", "decoder"])
def test_only_adapters_learn(models, name, stacked):
    """Fresh ones change nothing; steps lower the loss; a layer that has none keeps none."""
    model, target = models[stacked], TARGETS[name][0]
    config = LoraConfig(r=2, target_modules=target, lora_dropout=0.1)
    adapters = lora.init(config, model, key=jax.random.key(0))
    np.testing.assert_array_equal(
        np.asarray(lora.apply(model, adapters, config)(**SHORT)), np.asarray(model(**SHORT))
    )
    graph, frozen = nnx.split(model)
    optimizer = optax.adamw(0.01, weight_decay=0.1)

    def of_adapters(adapters, frozen, batch, key):
        return score(lora.apply(nnx.merge(graph, frozen), adapters, config, key=key), batch)

    @jax.jit
    def step(adapters, state, frozen, batch, key):
        grads = jax.grad(of_adapters)(adapters, frozen, batch, key)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    def without_dropout(adapters):
        return float(score(lora.apply(model, adapters, config), batch()))

    state, before = optimizer.init(adapters), without_dropout(adapters)
    for i in range(12):
        adapters, state = step(adapters, state, frozen, batch(), jax.random.key(i))
    assert without_dropout(adapters) < 0.8 * before
    if model.scan_layers and target != lora.DECODER:
        assert all(not x[0].any() and x[1].any() for x in jax.tree.leaves(adapters))
    else:
        assert all(x.any() for x in jax.tree.leaves(adapters))


def test_dropout_leaves_out_parts_of_the_input(models):
    """Kept parts are scaled up; every layer and every step leaves out others; no key, nothing."""
    model = models[True]
    config = LoraConfig(r=12, lora_alpha=12, lora_dropout=0.25)
    adapters = lora.init(config, model, key=jax.random.key(0))
    path = "decoder.blocks.mlp.up"
    one = {"lora_A": jnp.stack([jnp.eye(12)] * 2), "lora_B": jnp.ones((2, 12, 20))}
    x = jnp.full((1, 500, 12), 2.0)

    def added(key):
        """What each of the two layers is given, out of `x`: one number a token."""
        adapted = lora.apply(model, adapters | {path: one}, config, key=key)
        blocks = adapted.decoder.blocks
        return jax.lax.map(lambda block: block.mlp.up(x) - block.mlp.up.base(x), blocks)[..., 0]

    kept = added(jax.random.key(1)) / 2 * 0.75  # parts of 12 that are kept
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    np.testing.assert_allclose(kept.mean(), 9, atol=0.3)
    assert (kept[0] != kept[1]).any()
    np.testing.assert_array_equal(added(jax.random.key(1)), added(jax.random.key(1)))
    assert (added(jax.random.key(1)) != added(jax.random.key(2))).any()
    np.testing.assert_allclose(added(None), 24, rtol=1e-5)


def test_no_copy_of_the_weights_is_made():
    """A step's own memory is a small part of the frozen weights'."""
    decoder = dataclasses.replace(
        small.DECODER, layers=4, width=512, heads=8, kv_heads=8, head_width=64, hidden=1536
    )
    config = dataclasses.replace(small.CONFIG, decoder=decoder)
    abstract = nnx.eval_shape(lambda: Qwen2Audio(config, rngs=nnx.Rngs(0)))
    graph, frozen = nnx.split(abstract)
    how = LoraConfig()
    adapters = jax.eval_shape(lambda: lora.init(how, abstract, key=jax.random.key(0)))

    def of_adapters(adapters, frozen, ids):
        model = lora.apply(nnx.merge(graph, frozen), adapters, how)
        return model.hidden(ids, jnp.ones_like(ids), remat="full")[0].sum()

    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    step = jax.jit(jax.grad(of_adapters)).lower(adapters, frozen, ids).compile()
    held = sum(x.size * 4 for x in jax.tree.leaves(frozen))
    assert step.memory_analysis().temp_size_in_bytes < 0.6 * held


@pytest.mark.slow
def test_a_mesh_changes_nothing(base):
    """Adapters are split as their layers are, and add the same."""
    mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
    config = LoraConfig(r=3, target_modules="all-linear")
    for scan_layers in (True, False):
        one = weights.load(base, scan_layers=scan_layers)
        many = weights.load(base, scan_layers=scan_layers, mesh=mesh)
        adapters = shaken(lora.init(config, one, key=jax.random.key(0)))
        places = lora.shardings(adapters, mesh)
        adapted = lora.apply(many, jax.device_put(adapters, places), config)
        expected = lora.apply(one, adapters, config)
        np.testing.assert_allclose(adapted(**SHORT), expected(**SHORT), atol=1e-4)
        merged = lora.merge(many, jax.device_put(adapters, places), config)
        for before, after in zip(jax.tree.leaves(many), jax.tree.leaves(merged), strict=True):
            assert after.sharding.is_equivalent_to(before.sharding, before.ndim)
        if scan_layers:
            place = places["decoder.blocks.attention.out"]
            assert place["lora_A"].spec == jax.P(None, "tensor", None, None)
            assert place["lora_B"].spec == jax.P(None, None, "fsdp")
        else:
            place = places["decoder.blocks.0.attention.query"]
            assert place["lora_A"].spec == jax.P("fsdp", None)
            assert place["lora_B"].spec == jax.P(None, "tensor", None)


# Mistakes


def test_adapters_come_from_the_hub_as_models_do(base, tmp_path, monkeypatch):
    """Of their repository, no more than they are; its absence is one line."""
    model, asked = weights.load(base), []
    config = LoraConfig(r=2, target_modules=("q_proj",))
    peft.save(tmp_path, lora.init(config, model, key=jax.random.key(0)), config, model)

    def fetch(name, *, allow_patterns):
        asked.append((name, set(allow_patterns)))
        if name == "owner/absent":
            raise FileNotFoundError("Name not known\nCheck your connection.")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert peft.load("owner/adapter", model)[0] == config == peft.read_config("owner/adapter")
    assert asked[0] == ("owner/adapter", {peft.SETTINGS, peft.WEIGHTS})
    with pytest.raises(ValueError, match=r"'owner/absent' is neither .*: Name not known$"):
        peft.load("owner/absent", model)


@pytest.mark.parametrize(
    "target, message",
    [
        (("q_proj", "w_pack"), r"'w_pack' matches no module; there are down_proj, fc1"),
        ("q_proj", r"'q_proj', a regex for whole names, matches no module; there are down_proj"),
        (("lm_head",), r"'lm_head' matches language_model.lm_head: only linear layers"),
        (r".*conv.*", r"matches audio_tower.conv1, audio_tower.conv2: only linear layers"),
        ("(q_proj", r"'\(q_proj' is no regex: missing \)"),
    ],
)
def test_a_target_that_is_none_is_refused(model, target, message):
    with pytest.raises(ValueError, match=message):
        lora.init(LoraConfig(target_modules=target), model, key=jax.random.key(0))


@pytest.mark.parametrize(
    "names, message",
    [
        (
            "q_proj",
            r"modules_to_save: 'q_proj' matches .*layers.0.self_attn.q_proj: wanted modules",
        ),
        ("norm", r"modules_to_save: 'norm' matches .*layers.0.*norm: wanted modules outside"),
        ("adapter", r"modules_to_save: 'adapter' matches no module"),
        ("linear", r"both name multi_modal_projector.linear.weight: wanted one"),
        ("embed_tokens", r"'embed_tokens' is the output head, too"),
    ],
)
def test_a_module_that_cannot_train_whole_is_refused(names, message):
    decoder = dataclasses.replace(small.DECODER, tied=True)
    config = dataclasses.replace(small.CONFIG, decoder=decoder)
    model = nnx.eval_shape(lambda: Qwen2Audio(config, rngs=nnx.Rngs(0)))
    how = LoraConfig(target_modules="all-linear", modules_to_save=(names,))
    with pytest.raises(ValueError, match=message):
        lora.saved(how, model)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"wanted r of at least 1, got 0"):
        LoraConfig(r=0)
    with pytest.raises(ValueError, match=r"wanted lora_dropout from 0 to below 1, got 1"):
        LoraConfig(lora_dropout=1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, r"asks for what is not supported: use_dora=True"),
        ({"init_lora_weights": "pissa"}, r"not supported: init_lora_weights='pissa'"),
        ({"modules_to_save": ["lm_head"]}, r"language_model.lm_head.weight is missing"),
        ({"peft_type": "IA3"}, r"wanted peft_type LORA, got IA3"),
        ({"r": 4}, r"q_proj.lora_A.weight has shape \(8, 12\), wanted \(4, 12\)"),
        ({"target_modules": ["q_proj", "fc1"]}, r"fc1.lora_A.weight is missing.*is unknown"),
    ],
)
def test_files_of_something_else_are_refused(base, tmp_path, change, message):
    model = weights.load(base)
    config = LoraConfig()
    peft.save(tmp_path, lora.init(config, model, key=jax.random.key(0)), config, model)
    settings = json.loads((tmp_path / peft.SETTINGS).read_text())
    (tmp_path / peft.SETTINGS).write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message) as caught:
        peft.load(tmp_path, model)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_refused(base, tmp_path):
    model = weights.load(base)
    config = LoraConfig()
    with pytest.raises(ValueError, match=r"wanted an adapter in .* without adapter_config.json"):
        peft.load(tmp_path, model)
    (tmp_path / peft.SETTINGS).write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config.json holds no LoRA settings"):
        peft.load(tmp_path, model)
    peft.save(tmp_path, lora.init(config, model, key=jax.random.key(0)), config, model)
    file = tmp_path / peft.WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=re.escape(f"{file} is damaged at")):
        peft.load(tmp_path, model)
    file.unlink()
    with pytest.raises(ValueError, match=r"wanted adapter_model.safetensors in .*, got none"):
        peft.load(tmp_path, model)
    tensors = {"base_model.model.language_model.lm_head.weight": torch.ones(2)}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"is missing; .*lm_head.weight is unknown"):
        peft.load(tmp_path, model)
