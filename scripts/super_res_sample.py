"""Enlarge samples: python scripts/super_res_sample.py --model_path FILE --base_samples samples_100x64x64x3.npz ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also without installation, from any folder

from guided_diffusion.cli.main import script

if __name__ == "__main__":
    sys.exit(script("super_res_sample"))
