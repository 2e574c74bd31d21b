"""Run the `tightfit` command line as ``python -m tightfit``."""

from tightfit.cli.main import console

if __name__ == "__main__":
    console()
