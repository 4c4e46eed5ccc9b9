"""The network gives the numbers of the TensorFlow graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inception_files import FOLDER, GOLDEN, images_of

from evaluations.features import extract
from evaluations.inception import Conv, InceptionV3
from evaluations.resize import tf1_bilinear, to_inception_range

SIZES = ("32x32", "64x64", "256x256", "299x299", "512x512", "50x80")


def first_images(*sizes: str) -> torch.Tensor:
    images = (torch.from_numpy(images_of(GOLDEN["end_to_end"][size])[:1]) for size in sizes)
    return torch.cat([to_inception_range(tf1_bilinear(image)) for image in images])


def relative(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("kind", "sizes"), [("net", SIZES), ("plain_net", SIZES[:2])])
def test_activations_equal_tensorflow(kind, sizes, request):
    """From the .pb, folded, and from the .pth, as published: within 5e-6 of the largest, all 4071 numbers."""
    net, expected = request.getfixturevalue(kind), np.load(FOLDER / "activations.npz")
    outputs = net(first_images(*sizes))
    assert outputs.pool.shape == (len(sizes), 2048) and outputs.spatial.shape == (len(sizes), 2023)
    for size, pool, spatial in zip(sizes, *outputs):
        assert relative(pool[None], expected[f"{size}_pool"]) < 5e-6
        assert relative(spatial[None], expected[f"{size}_spatial"]) < 5e-6
        facts = GOLDEN["end_to_end"][size]
        assert pool.double().sum() == pytest.approx(facts["pool_sum"][0], rel=2e-6)
        assert spatial.double().sum() == pytest.approx(facts["spatial_sum"][0], rel=2e-6)
        softmax = (net.fc.weight.double() @ pool.double()).softmax(0)[:4].numpy()  # without the bias
        assert softmax == pytest.approx(np.array(facts["softmax_head"]), rel=5e-5)


def test_extract_equals_tensorflow_for_every_image(net):
    facts = GOLDEN["end_to_end"]["64x64"]
    features = extract(images_of(facts), net)
    assert features is not None
    assert features.pool.astype(np.float64).sum(1) == pytest.approx(np.array(facts["pool_sum"]), rel=2e-6)
    assert features.spatial.astype(np.float64).sum(1) == pytest.approx(np.array(facts["spatial_sum"]), rel=2e-6)
    assert features.spatial[0, :9] == pytest.approx(np.array(facts["spatial_head"]), abs=2e-5)


def test_state_dict_has_the_published_layout():
    state = InceptionV3().state_dict()
    assert len(state) == 472
    assert sum(value.numel() for value in state.values()) == 23_885_392
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["Mixed_6d.branch7x7dbl_5.bn.running_var"].shape == (192,)
    assert state["fc.weight"].shape == (1008, 2048)


def test_spatial_is_row_column_channel_of_the_first_seven(net):
    seen = []
    hook = net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    outputs = net(first_images("32x32"))
    hook.remove()
    grid = outputs.spatial.view(17, 17, 7)
    assert seen[0].shape == (1, 192, 17, 17)
    for row, column, channel in ((0, 0, 0), (3, 11, 6), (16, 16, 2)):
        assert grid[row, column, channel] == seen[0][0, channel, row, column]


@torch.no_grad()
def test_folding_is_exact_in_float64_and_happens_once():
    conv = Conv(3, 4, 3).double()
    generator = torch.Generator().manual_seed(0)
    for value in conv.bn.buffers():
        value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    before = conv(x)
    conv.fold()
    weight = conv.conv.weight
    conv.fold()
    assert conv.conv.weight is weight
    torch.testing.assert_close(conv(x), before, rtol=1e-12, atol=1e-12)


def test_other_shapes_are_refused(net):
    with pytest.raises(ValueError, match=r"tf1_bilinear"):
        net(torch.zeros(1, 3, 256, 256))
    with pytest.raises(ValueError, match=r"299"):
        net(torch.zeros(3, 299, 299))
