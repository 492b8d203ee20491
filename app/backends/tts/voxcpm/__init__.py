"""VoxCPM: reading its checkpoints, preparing its inputs, and running it."""
