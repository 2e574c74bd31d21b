"""Row 16, "every process on GPU 0", and every one writes: torchrun with the ImageNet example's flags has one writer.

That each process takes the GPU of its local rank is tested in tests/train/launch/test_roles.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.launch.launching import GPT, metrics, run, torchrun


@pytest.mark.usefixtures("own_folder")
def test_torchrun_with_the_examples_flags() -> None:
    flags = ["--dist-url", "env://", "--dist-backend", "gloo", "--world-size", "-1", "--rank", "-1"]
    ended = run(*GPT, *flags, "MODEL.DIST_TRAIN", "True", "--steps", "2", command=torchrun(2))
    assert [path.name for path in Path("runs/python-source").iterdir()] == ["gpt-tiny"]
    assert [line["step"] for line in metrics("gpt-tiny")] == [1, 2]
    assert ended.out.count("model   gpt-tiny") == 1
    assert Path("runs/python-source/gpt-tiny/log.txt").read_text().count("model   gpt-tiny") == 1
    assert "one process only" not in ended.out
