"""Score samples of any generative model with the field's numbers; imports nothing of guided_diffusion."""
