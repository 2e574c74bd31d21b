"""What gzip makes of the text that `python-source` holds out: bits per byte, to set a language model's beside.

    python -m benchmarks.gzip_baseline

All files one after the other, and each by itself, at the highest level.
"""

from __future__ import annotations

import gzip

from tightfit.train.data.split import divided
from tightfit.train.data.text import HELD_OUT_SHARE, python_source_files


def main() -> None:
    root, files = python_source_files()
    _, held_out = divided((file.relative_to(root).as_posix() for file in files), HELD_OUT_SHARE)
    texts = [files[place].read_bytes() for place in held_out]
    count = sum(map(len, texts))
    joined = 8 * len(gzip.compress(b"\n".join(texts), 9)) / count
    alone = 8 * sum(len(gzip.compress(text, 9)) for text in texts) / count
    print(
        f"{len(texts)} of {len(files)} files, {count:,} bytes: gzip -9 {joined:.3f} bits per byte, by file {alone:.3f}"
    )


if __name__ == "__main__":
    main()
