"""Sample from a diffusion model: python scripts/image_sample.py --model_path FILE ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also without installation, from any folder

from guided_diffusion.cli.main import script

if __name__ == "__main__":
    sys.exit(script("image_sample"))
