"""Text-to-speech backends. Each is named in `app.backends.registry`."""
