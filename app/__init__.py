"""Bawabah AI: a self-hosted server for speech models."""

__version__ = "0.1.0"
