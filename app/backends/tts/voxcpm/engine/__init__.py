"""VoxCPM in our own arithmetic: many requests in one batch, on any torch device."""
