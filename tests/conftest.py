"""One thread for torch: the tests' matrices are tiny, and two cores have other work beside them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
