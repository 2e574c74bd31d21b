"""Other libraries' trainers: each module here belongs to one host, and imports it."""
