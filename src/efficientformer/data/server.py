"""Imported by the server that worker processes are forked from, and only there: SIGTERM, sent to all, leaves it alone.

It ends with the training process. Whatever is forked from it takes SIGTERM as usual.
"""

from __future__ import annotations

import os
import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
