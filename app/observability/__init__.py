"""Logs (and later metrics and traces) of what the server does."""
