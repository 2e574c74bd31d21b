"""What is measured rather than tested; each module says how to run it."""
