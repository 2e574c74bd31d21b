"""Several processes: what each of them is, how they find each other, and what they say to each other."""
