"""`python -m tightfit` is the `tightfit` program."""

from tightfit.cli.main import console

if __name__ == "__main__":
    console()
