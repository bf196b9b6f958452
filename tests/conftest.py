"""What holds for every test process."""

from __future__ import annotations

import signal

# A shell that starts the tests in the background has them ignore SIGINT, and they would hand that
# on to every process that a test means to interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
