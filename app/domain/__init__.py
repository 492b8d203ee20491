"""Frozen values that every layer may pass around. No I/O, no frameworks."""
