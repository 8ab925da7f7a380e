"""What the command line's commands do."""

PROGRAM = "qwen2audio"
