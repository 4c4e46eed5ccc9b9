"""The mathematics of diffusion: noise process, objectives, samplers and guidance, on tensors; torch and numpy only."""
