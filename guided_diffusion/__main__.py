"""python -m guided_diffusion"""

import sys

from .cli.main import main

sys.exit(main())
