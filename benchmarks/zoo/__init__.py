"""Models that nobody here wrote: plain, with every block checkpointed, and planned."""
