"""What the environment variables of fastnn say, read once at import."""

from __future__ import annotations

import logging
import os


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "off", "no")


#: FASTNN_DISABLE: every call goes to torch's own op.
disabled: bool = _flag("FASTNN_DISABLE")
#: FASTNN_LOG: say on standard error which calls go to torch, and why.
log: bool = _flag("FASTNN_LOG")
#: FASTNN_ISA: the instruction-set level to run at, or None for the highest that the machine has.
isa: str | None = os.environ.get("FASTNN_ISA", "").strip().lower() or None

if log:
    logger = logging.getLogger("fastnn")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fastnn: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
