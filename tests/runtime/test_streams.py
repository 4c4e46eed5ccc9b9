"""Streams belong to examples: batches, order and neighbours do not matter; addresses do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from guided_diffusion.runtime.streams import DATA, TRAIN, Streams, key_of

SHAPE = (3, 4, 4)


def draws(ids, *address):
    streams = Streams(*address, ids=ids)
    return streams.normal(SHAPE), streams.uniform(), streams.normal((2,))


@given(st.permutations(range(6)), st.integers(1, 5))
def test_any_split_and_order_gives_each_example_its_own_numbers(order, cut):
    whole = draws(range(6), 1, TRAIN, 9)
    parts = [draws(ids, 1, TRAIN, 9) for ids in (order[:cut], order[cut:])]
    for full, *pieces in zip(whole, *parts):
        assert torch.equal(full[order], torch.cat(pieces))


def test_ids_may_be_a_tensor():
    assert torch.equal(draws(torch.tensor([4, 2]), 0)[0], draws([4, 2], 0)[0])


def test_any_change_of_the_address_changes_the_numbers():
    addresses = [(0,), (1,), (0, 0), (0, TRAIN, 5), (0, DATA, 5), (0, TRAIN, 6), (5, TRAIN, 0), (-1,), (2**63,)]
    seen = [draws([0, 1], *address)[1].tolist() for address in addresses]
    flat = [number for pair in seen for number in pair]
    assert len(set(flat)) == len(flat)


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4), st.data())
def test_keys_are_63_bits_and_mix_well(parts, data):
    key = key_of(*parts)
    assert 0 <= key < 2**63 and key == key_of(*parts)
    place = data.draw(st.integers(0, len(parts) - 1))
    bit = data.draw(st.integers(0, 62))
    other = list(parts)
    other[place] ^= 1 << bit
    assert 8 < bin(key ^ key_of(*other)).count("1") < 56  # about half; 6 standard deviations


def test_neighbouring_streams_are_normal_uniform_and_uncorrelated():
    streams = Streams(3, TRAIN, ids=range(400))
    normal, uniform = streams.normal((64,)), streams.uniform()
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    across = torch.corrcoef(normal)[0, 1:]  # 399 correlations of 64 numbers, sd 1/8
    assert across.abs().max() < 0.6 and across.mean().abs() < 0.03
    first = torch.stack([normal[:, 0], uniform.float()])
    assert torch.corrcoef(first)[0, 1].abs() < 0.25  # sd 1/20


def test_shapes_types_and_the_error():
    streams = Streams(0, ids=[1, 2])
    x = torch.zeros(2, 3, dtype=torch.float64)
    assert streams.randn_like(x).dtype == torch.float64 and streams.randn_like(x).shape == x.shape
    assert streams.uniform().dtype == torch.float64 and len(streams) == 2
    assert not torch.equal(streams.randn_like(x), streams.randn_like(x))  # draws advance
    with pytest.raises(ValueError, match="3 asked for noise from 2"):
        streams.randn_like(torch.zeros(3, 1))


def test_addressed_noise_does_not_depend_on_the_memory_layout():
    x = torch.zeros(2, 3, 8, 8)
    assert torch.equal(
        Streams(7, ids=[1, 2]).noise(x.to(memory_format=torch.channels_last), 3), Streams(7, ids=[1, 2]).noise(x, 3)
    )


def test_addressed_noise_depends_on_image_step_and_draw_alone():
    x = torch.zeros(2, 5)
    streams = Streams(7, ids=[1, 2])
    first = streams.noise(x, 3)
    streams.normal((4,))  # what is drawn in between changes nothing
    others = [streams.noise(x, 4), streams.noise(x, 3, 1), Streams(8, ids=[1, 2]).noise(x, 3)]
    assert torch.equal(first, streams.noise(x, 3)) and not any(torch.equal(first, other) for other in others)
    assert torch.equal(first[1:], Streams.of([(7, 2)]).noise(x[1:].double().float(), 3))
    many = torch.stack([Streams(0, ids=range(200)).noise(torch.zeros(200, 20), step) for step in range(3)])
    assert stats.kstest(many.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(torch.corrcoef(many.reshape(3, -1))[0, 1:]).max() < 0.07  # sd 1/63
    with pytest.raises(ValueError, match="3 asked for noise from 2"):
        streams.noise(torch.zeros(3, 1), 0)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draws(range(3), 5)
    assert torch.equal(before, torch.get_rng_state())


@given(st.lists(st.tuples(st.integers(-5, 2**63), st.integers(0, 3), st.integers(0, 2**40)), min_size=1, max_size=5))
def test_streams_of_whole_addresses_are_those_of_batches_of_one_seed(addresses):
    mixed = Streams.of(addresses)
    numbers = mixed.normal(SHAPE), mixed.uniform(), mixed.randn_like(torch.zeros(len(addresses), 2))
    for k, (seed, purpose, number) in enumerate(addresses):
        for found, own in zip(numbers, draws([number - 1, number], seed, purpose)):
            assert torch.equal(found[k], own[1])
    assert len(Streams.of([])) == 0
