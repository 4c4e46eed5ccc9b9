"""`python -m tests.pretend_gpu [MODULE ARGUMENTS...]`: see the package."""

import sys

from . import main

sys.exit(main(sys.argv[1:]))
