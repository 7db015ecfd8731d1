"""Products of a head map: sparse weights give what dense ones give, whatever the blocks."""

import pytest
import torch

from specsmallkv.mixing import COLUMNS, Mixer, column_blocks


def weights_of(per_row, generator):
    weights = torch.zeros(24, 64)
    return weights.scatter(1, torch.rand(24, 64, generator=generator).argsort(1)[:, :per_row], 0.25)


@pytest.mark.parametrize("per_row", [4, 40])
@pytest.mark.parametrize("columns", [7, COLUMNS, 2 * COLUMNS + 5])
def test_a_product_in_blocks_equals_the_plain_one(per_row, columns):
    generator = torch.Generator().manual_seed(0)
    weights, rows = weights_of(per_row, generator), torch.rand(64, 3, columns, generator=generator)
    mixer = Mixer(weights)
    assert (mixer.weights.layout == torch.sparse_csr) == (per_row == 4)
    torch.testing.assert_close(mixer(column_blocks(rows)), weights @ rows.flatten(1))


def test_rows_with_gaps_are_taken_as_they_are():
    buffer = torch.rand(64, 4, 3000)
    rows, weights = buffer[:, :2, :2500], weights_of(4, torch.Generator().manual_seed(1))
    torch.testing.assert_close(Mixer(weights)(column_blocks(rows)), weights @ rows.flatten(1))


@pytest.mark.parametrize("per_row", [4, 40])
def test_a_column_does_not_depend_on_those_behind_it(per_row):
    mixer, rows = Mixer(weights_of(per_row, torch.Generator().manual_seed(2))), torch.rand(64, 1, 3 * COLUMNS)
    whole, part = mixer(column_blocks(rows)), mixer(column_blocks(rows[..., : COLUMNS + 100]))
    torch.testing.assert_close(part, whole[:, : COLUMNS + 100], rtol=1e-6, atol=1e-7)
