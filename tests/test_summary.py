"""What a run says of itself at its end."""

import json

from qwen2audio_jax.training import summary


def test_answers_may_hold_what_others_take_for_the_end_of_a_line(tmp_path):
    """JSON does not escape it, and a table has one row of it."""
    path = tmp_path / "answers.jsonl"
    rows = [{"wanted": f"a{end}b|", "got": "c"} for end in ("\u2028", "\u2029", "\x85", "\x0b")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join([*lines, ""]), "utf-8")
    assert summary._answers(path)[2:-1] == ["| a b\\| | c |"] * 4
