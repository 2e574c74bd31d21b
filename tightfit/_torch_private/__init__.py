"""Every private API of PyTorch that tightfit uses, each with the reason.

All were tested with PyTorch 2.11 (CUDA) and 2.13 (CPU).  Beside these modules, `distributed/_ddp_private.py`,
`distributed/_fsdp_private.py` and `operators/_checkpoint_private.py`, nothing else in the package may touch `torch._*`,
or an underscore attribute of an object that PyTorch made.
"""
