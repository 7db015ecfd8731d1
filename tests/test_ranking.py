"""The largest scores are the same, whoever selects them."""

import pytest
import torch

from specsmallkv import ranking
from specsmallkv.ranking import largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 17, 499, 500])
def test_numpy_and_torch_select_the_same_in_order_of_position(monkeypatch, dtype, count):
    scores = torch.randperm(6000, generator=torch.Generator().manual_seed(0)).view(3, 4, 500).to(dtype)
    if dtype != torch.int64:
        scores[..., 1], scores[..., -1] = torch.inf, -torch.inf
    chosen = []
    for threads in (0, torch.get_num_threads() + 1):  # from so many on torch selects
        monkeypatch.setattr(ranking, "TORCH_THREADS", threads)
        chosen.append(largest(scores, count))
    expected = scores.argsort(dim=-1, descending=True)[..., :count].sort(dim=-1).values
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[0], expected)


def test_a_row_is_selected_from_alone(monkeypatch):
    monkeypatch.setattr(ranking, "TORCH_THREADS", torch.get_num_threads() + 1)
    scores = torch.rand(5, 2, 300, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # with many ties
    together = largest(scores, 40)
    assert torch.equal(together, torch.cat([largest(row.clone(), 40) for row in scores.split(1)]))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_what_is_no_number_ranks_highest_and_a_tie_beside_it_moves_nobody(monkeypatch, order):
    monkeypatch.setattr(ranking, "TORCH_THREADS", torch.get_num_threads() + 1)
    rows = torch.tensor([[5.0, 4, 4, 1, 0, 0], [1, 2, 3, torch.nan, 0, 0]])[order]
    chosen = largest(rows, 2)
    assert chosen[order.index(1)].tolist() == [2, 3]
    assert 0 in chosen[order.index(0)] and rows[order.index(0), chosen[order.index(0)]].tolist() == [5, 4]
