"""The checks, by subject: each file registers its own."""
