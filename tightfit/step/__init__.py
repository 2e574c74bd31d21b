"""One training step: how it runs, what identifies it, snapshots of what it changes."""
