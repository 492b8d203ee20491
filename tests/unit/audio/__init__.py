"""Tests of `app.audio`."""
