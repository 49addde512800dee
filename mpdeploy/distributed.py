"""Under torchrun: which rank this process is."""

from __future__ import annotations

import os
import sys


def leave_unless_rank_0() -> None:
    """End every process but rank 0's with 0: a failed gate of rank 0 must not make the launcher train again."""
    if int(os.environ.get("RANK", "0")) != 0:
        sys.exit(0)
