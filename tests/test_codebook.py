"""The code tables against the formulas they come from and against bitsandbytes'."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from nf4lora import codebook

pytestmark = pytest.mark.usefixtures("one_thread")


def test_nf4_is_the_normal_distributions_quantiles():
    # QLoRA: 8 positive and 7 negative quantiles, evenly spaced in probability, zero between them, normalized to 1.
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(codebook.codebook("nf4").double().numpy(), values / values.max(), rtol=0, atol=1e-6)


def test_dynamic_map_is_its_formula():
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        values += [sign * v for v in ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist() for sign in (1, -1)]
    assert torch.equal(codebook.codebook("dynamic"), torch.tensor(sorted(values)))


@pytest.mark.parametrize("quant_type", codebook.QUANT_TYPES)
def test_tables_equal_bitsandbytes(bnb, quant_type):
    # + 0.0: bitsandbytes writes +0 for FP4's code 8.
    assert torch.equal(codebook.codebook(quant_type) + 0.0, bnb.get_4bit_type(quant_type, device="cpu"))


def test_dynamic_map_equals_bitsandbytes(bnb):
    assert torch.equal(codebook.codebook("dynamic"), bnb.create_dynamic_map(signed=True))


def test_fp4_is_sign_and_magnitude():
    book = codebook.codebook("fp4")
    assert torch.equal(book[8:], -book[:8]) and book[8].signbit() and not book[:8].signbit().any()
    assert torch.equal(book[:8] * 12, (torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]).double() / 12).float() * 12)


@pytest.mark.parametrize("quant_type", codebook.QUANT_TYPES)
def test_order_and_boundaries(quant_type):
    book, order, boundaries = (f(quant_type) for f in (codebook.codebook, codebook.code_order, codebook.boundaries))
    ascending = book[order]
    assert sorted(order.tolist()) == list(range(16)) and bool((ascending.diff() >= 0).all())
    assert boundaries.dtype == torch.float32
    low, high = ascending[:-1].numpy(), ascending[1:].numpy()
    assert (boundaries.numpy() == (low + high) * np.float32(0.5)).all()


def test_nf4_boundaries_are_the_ones_bitsandbytes_hard_codes():
    literals = torch.tensor([
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
        -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
        0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ])  # fmt: skip
    assert torch.equal(codebook.boundaries("nf4"), literals)


def test_dynamic_boundaries_split_float32_at_the_true_midpoints():
    book, boundaries = codebook.codebook("dynamic").double(), codebook.dynamic_boundaries()
    middle = (book[:-1] + book[1:]) / 2
    above = torch.nextafter(boundaries, torch.tensor(torch.inf))
    assert bool((boundaries.double() <= middle).all()) and bool((above.double() > middle).all())
