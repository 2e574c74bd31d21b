"""`verify`: the proof that a planned step equals the plain one, and that its peak keeps the budget."""
