"""The benchmarks against transformers run, at small size."""

import json

import pytest

from benchmarks import inference, restart, sides, steps, training


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the benchmark writes of the tiny preset: the figures, and the tables."""
    path = tmp_path_factory.mktemp("results") / "inference.json"
    small = ["--preset", "tiny", "--new-tokens", "6", "--repeats", "2"]
    peaks = ["--peak-tflops", "0.2", "--bandwidth", "0.02"]
    inference.main([*small, *peaks, "--seconds", "1", "--json", str(path)])
    return json.loads(path.read_text("utf-8")), path.with_suffix(".md").read_text("utf-8")


def test_both_sides_give_the_same_tokens(results):
    (clip,) = results[0]["clips"]
    assert clip["sdpa"]["tokens_equal"] == clip["ours"]["tokens_equal"] == 6


def test_the_stages_make_up_the_time_to_the_first_token(results):
    (clip,) = results[0]["clips"]
    for side in (clip["sdpa"], clip["ours"]):
        stages = [side[f"{stage}_s"] for stage in inference.STAGES]
        assert min(stages) > 0
        assert sum(stages) == pytest.approx(side["first_token_s"], rel=0.5)
        assert side["tokens_per_s"] > 0
        assert side["peak_gib"] > 0
        assert side["of_bandwidth"] > 0
        assert side["of_matrix_peak"] > 0


def test_results_say_what_they_were_made_on(results):
    figures, tables = results
    assert {"date", "device", "cpu", "cores", "versions"} <= figures.keys()
    assert figures["date"] in tables
    assert figures["versions"]["transformers"] in tables
    assert "| 1 s clip | transformers, sdpa | ours | ratio |" in tables


def test_the_bounds_count_what_the_model_must_do():
    """Parameters of the full-size model, from which both bounds can be told by hand."""
    c = sides.sizes_of("qwen2-audio-7b")
    # 32 blocks of 4 * 4096^2 + 3 * 4096 * 11008, and the head
    weights = 32 * 202_375_168 + 156_032 * 4096
    assert inference.bytes_of_token(c, 0, 2) == 2 * weights
    more = inference.bytes_of_token(c, 100, 2) - 2 * weights
    assert more == 2 * 100 * 32 * 2 * 4096
    # 780 tokens through the blocks, 30 s through 637 M parameters: two operations each
    rough = 2 * (780 * 32 * 202_375_168 + 1500 * 637e6)
    assert inference.flops_of_prefill(c, 780, 3000) == pytest.approx(rough, rel=0.05)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the benchmark of training writes of the tiny preset and one short clip."""
    path = tmp_path_factory.mktemp("results") / "training.json"
    small = ["--presets", "tiny", "--seconds", "1", "--clips", "1", "--repeats", "1"]
    training.main([*small, "--json", str(path)])
    return json.loads(path.read_text("utf-8")), path.with_suffix(".md").read_text("utf-8")


@pytest.mark.slow
def test_both_sides_train_alike(trained):
    """Every loss, so every update that led to it; and a clip of 1 s is learned by heart a bit."""
    (clip,) = trained[0]["presets"]["tiny"]
    ours, theirs = clip["ours"]["losses"], clip["theirs"]["losses"]
    assert len(ours) == 5  # two to warm up, one for memory, and a turn of two
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[-1] < ours[0]


@pytest.mark.slow
def test_steps_are_timed_in_pairs(trained):
    figures, tables = trained
    (clip,) = figures["presets"]["tiny"]
    theirs, ours = clip["theirs"], clip["ours"]
    assert clip["ratios"] == [theirs["step_s"] / ours["step_s"]]
    for side in (theirs, ours):
        # nothing but parameters and two moments is held between steps
        assert side["peak_gib"] - side["rise_gib"] == pytest.approx(
            (12 * clip["trained_parameters"] + 4 * 1500 * 144) / 2**30  # and the sines
        )
        assert side["gflops_per_s"] == pytest.approx(clip["model_gflops"] / side["step_s"])
    assert "1 clips of 1 s | transformers | ours | ratio |" in tables


# PEFT's own question to transformers
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "lora"])
def test_both_sides_train_alike_as_on_gpus(how, tmp_path):
    """In bfloat16, recomputing, one after the other; with equal adapters too; and a known peak."""
    out = tmp_path / "training.json"
    small = ["--presets", "tiny", "--seconds", "1", "--clips", "1", "--repeats", "1"]
    more = ["--how", how, "--dtype", "bfloat16", "--peak-tflops", "0.1", "--json", str(out)]
    training.main([*small, *more])
    figures = json.loads(out.read_text("utf-8"))
    assert figures["remat_policy"] == {"full": "full", "lora": "minimal"}[how]
    (clip,) = figures["presets"]["tiny"]
    for side in (clip["theirs"], clip["ours"]):
        assert side["mfu"] == pytest.approx(side["gflops_per_s"] / 100)
        assert side["losses"][-1] < side["losses"][0]
    assert clip["ours"]["losses"] == pytest.approx(clip["theirs"]["losses"], rel=3e-2)
    # r of 8 at every side of seven matrices in three layers; or all but the sines
    wide, narrow, hidden = 144, 72, 384
    sizes = 2 * (wide + wide) + 2 * (wide + narrow) + 3 * (wide + hidden)
    assert (clip["trained_parameters"] == 8 * 3 * sizes) == (how == "lora")


def test_what_is_kept_for_the_backward_pass_is_what_memory_has_room_for():
    """Unless the user says it: LoRA's step would else be half as much work again."""
    short = {"dtype": "bfloat16"}
    assert steps.How().remat == steps.How(lora=True).remat == "none"
    assert steps.How(**short).remat == "full"
    assert steps.How(**short, lora=True).remat == "minimal"
    assert steps.How(**short, lora=True, remat_policy="save_qkv_proj").remat == "save_qkv_proj"
    assert training._options(["--remat-policy", "full"]).remat_policy == "full"


@pytest.mark.parametrize("losses", [[6.001, 5.5], [6.0, 5.51], [6.0, float("nan")]])
def test_sides_that_compute_something_else_are_not_reported(losses):
    """The first step is held to 1e-4, later ones to 1e-3; the message gives both losses."""
    training.check({"theirs": [6.0, 5.5], "ours": [6.0005, 5.504]})
    with pytest.raises(SystemExit, match=r"losses differ at step \d: transformers has .*, we have"):
        training.check({"theirs": [6.0, 5.5], "ours": losses})


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    """It finds what the first has kept, at least five times sooner."""
    out = tmp_path / "restart.json"
    restart.main(restart.Restart(model="tiny", devices=2, tokens=1024, out=out))
    figures = json.loads(out.read_text("utf-8"))
    assert figures["times_faster"] >= 5 and figures["second"]["compile_s"] > 0
    assert "| second |" in out.with_suffix(".md").read_text("utf-8")


def test_a_gpu_of_unknown_peak_is_refused(monkeypatch):
    """Before anything is made: its figures would be without MFU."""
    monkeypatch.setattr(training.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(training.torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="wanted --peak-tflops: the peak of cpu in bfloat16"):
        training.main(["--presets", "7b", "--how", "lora"])
