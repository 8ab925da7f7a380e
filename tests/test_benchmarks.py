"""The benchmark runs, at small size."""

import json

import pytest

from benchmarks import inference, sides


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
