"""The door losses is the room it opens on."""

import numpy as np
import torch

from guided_diffusion import losses
from guided_diffusion.diffusion import densities


def test_alias():
    assert losses is densities
    namespace: dict = {}
    exec("from guided_diffusion.losses import *", namespace)
    assert {"np", "th", "normal_kl", "approx_standard_normal_cdf", "discretized_gaussian_log_likelihood"} <= set(
        namespace
    )
    assert namespace["np"] is np and namespace["th"] is torch


def test_numbers_are_accepted_beside_tensors():
    mean = torch.tensor([0.0, 1.0])
    assert torch.equal(losses.normal_kl(mean, 0.0, 0.0, 0.0), mean**2 / 2)
