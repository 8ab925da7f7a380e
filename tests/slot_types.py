"""Types of slots as a user adds them: workers import this module to fill them."""

from qwen2audio_jax.data.slots import Filled, slot_type


def rate(text: str) -> int:
    """Frames a second."""
    if (number := int(text)) < 1:
        raise ValueError(f"wanted a rate of at least 1, got {number}")
    return number


@slot_type("CODES", parsers={"rate": rate})
def fill_codes(value, slot, sample):
    """Codec tokens, of which a slot has at most a second."""
    return Filled(" ".join(str(code) for code in value[: slot.attributes.get("rate", 50)]))


@slot_type("BROKEN")
def fill_broken(value, slot, sample):
    return _of_a_typing_mistake(value)


def _of_a_typing_mistake(value):
    return value.sead
