"""`python -m recollect` is the `recollect` program."""

from recollect.cli.main import console

if __name__ == "__main__":
    console()
