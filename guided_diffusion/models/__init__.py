"""The networks: own weights, know (x, time, y), know nothing of diffusion."""
