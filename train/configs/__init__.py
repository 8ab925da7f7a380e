"""Presets: STAGE_NAME.py is `python -m train.STAGE NAME`; each says what comes out."""

from qwen2audio_jax.data.pack import Bucket

# For conversations, behind other buckets: several clips of up to 12 s, and a few of up to 30 s.
TALKS = (
    Bucket(rows=1, tokens=1320, clips=6, frames=1200),
    Bucket(rows=1, tokens=2000, clips=4, frames=3000),
)


def laptop(*frames: int) -> tuple[Bucket, ...]:
    """Buckets of some 30 s of sound and 1300 tokens a batch, for clips of up to so many frames.

    A clip of a whole second needs 2 to 4 frames more (`processor.FRAME_BUCKETS`): 104, 1004.
    """
    room = {most: max(220, most // 4 + 100) for most in frames}
    return tuple(
        Bucket(
            rows=1320 // room[most],
            tokens=room[most],
            clips=3000 // (most - most % 10),
            frames=most,
        )
        for most in frames
    )


def pairs(*frames: int) -> tuple[Bucket, ...]:
    """Buckets for preferences, each pair with a row and a clip of up to so many frames."""
    rows = {most: max(2, 5120 // most) for most in frames}
    return tuple(
        Bucket(rows=rows[most], tokens=most // 4 + 100, clips=rows[most], frames=most)
        for most in frames
    )


def pod(*, rows: int, tokens: int, clips: int) -> tuple[Bucket, ...]:
    """Packed rows with as much sound a batch, whether in clips of up to 5, 10 or 30 s.

    Args:
      clips: of 30 s.
    """
    return tuple(
        Bucket(rows=rows, tokens=tokens, clips=clips * 30 // seconds, frames=frames)
        for seconds, frames in ((5, 504), (10, 1004), (30, 3000))
    )
