"""The plain records that the four verbs exchange, as versioned JSON: `Profile`, `Plan`, `Verdict`. Needs no PyTorch."""

from tightfit.records.profile import *  # noqa: F403
