"""Samples in and out: decoding uploads, resampling, writing WAV."""
