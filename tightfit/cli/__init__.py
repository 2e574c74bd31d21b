"""The command line: a thin shell over the trainer and the four verbs."""
