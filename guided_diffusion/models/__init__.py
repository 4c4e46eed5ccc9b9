"""The networks: U-Net, super-resolution U-Net and classifier, functions of (x, time, y) that know nothing of the noise process."""
