"""What every test stands on: few threads, and signals that reach the programs the tests start."""

import os
import signal

# The tests' matrices are tiny, and two cores have other work beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Under nohup or in a script's background these are ignored, and so they would be in every child.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
