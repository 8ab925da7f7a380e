"""Programs that measure speed and memory; run from a checkout."""
