"""Presets: STAGE_NAME.py is `python -m train.STAGE NAME`; each says what comes out."""
