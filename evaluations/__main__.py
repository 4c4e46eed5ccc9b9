"""`python -m evaluations REF.npz SAMPLES.npz`: the same as `evaluator.py`."""

import sys

from .evaluator import main

if __name__ == "__main__":
    sys.exit(main())
