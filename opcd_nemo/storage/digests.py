"""What is in a file, in a text short enough to keep: to notice that it has changed in place."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from opcd_nemo.storage.plain_file import open_plain

WHOLE_BYTES = 1 << 30
"""Files up to this size are read whole; of a larger one every 64th MiB is, and the last. Another
model, or the same one trained further, differs in every block; a few bytes that somebody changes in
such a file by hand may stay unseen."""
_BLOCK, _EVERY = 1 << 20, 64


def file_digest(file: Path) -> str:
    """Size and SHA-256 of a file; no name and no time, so that a copy has the same.

    Raises:
        UserError: it is no plain file, or cannot be read.
    """
    digest = hashlib.sha256()
    with open_plain(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        is_whole = size <= WHOLE_BYTES
        for start in range(0, size, _BLOCK * (1 if is_whole else _EVERY)):
            opened.seek(start)
            digest.update(opened.read(_BLOCK))
        if not is_whole:
            opened.seek(size - _BLOCK)
            digest.update(opened.read(_BLOCK))
    kind = "sha256" if is_whole else "sha256 of blocks"
    return f"{size} bytes, {kind} {digest.hexdigest()}"
