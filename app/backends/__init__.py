"""The only place where model libraries are imported, and only on first use."""
