"""Block geometry against its dense definition, exhaustively on small shapes."""

from __future__ import annotations

import itertools

import pytest
import torch

from gcl_kernels.backends.reference import dense_mask
from gcl_kernels.blocks import Samples, most_elements, plan_blocks, plan_rectangle

TABLES = [
    ((True,) * 3,) * 3,
    ((False, True), (True, False)),
    ((True, False, True), (False, False, True), (False, True, False)),
    ((True,),),
    ((True, True, True), (False,) * 3, (False,) * 3),
]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("per_view", [False, True])
@pytest.mark.parametrize("halve", [0, 1, 40])
def test_every_needed_entry_is_visited_once(table, per_view, halve):
    for n, block_rows in itertools.product([1, 2, 5, 16, 17, 33, 50], [16, 32, 64]):
        size = len(table) * n
        served = torch.zeros(size, size, dtype=torch.int)
        plan = plan_blocks(n, table, block_rows, per_view, halve)
        elements = sum(block.shape[0] * block.shape[1] for block in plan)
        assert (
            0 <= most_elements(n, table, block_rows, per_view) - elements <= size * block_rows / 2
        )
        for block in plan:
            assert 0 < block.shape[0] <= block_rows and 0 < block.shape[1] <= block_rows
            tile = torch.ones(block.shape, dtype=torch.int)
            for offset in block.same_sample_offsets:
                tile.diagonal(offset).zero_()
            if block.serves_rows:
                served[block.rows, block.cols] += tile
            if block.serves_cols and not block.diagonal:
                served[block.cols, block.rows] += tile.T
            if per_view:
                assert block.row_start // n == (block.row_stop - 1) // n
                assert block.col_start // n == (block.col_stop - 1) // n
        # The mask rule of the blocks, entry for entry that of the dense definition.
        expected = dense_mask(table, torch.arange(n))
        if not all(map(all, table)) or per_view:
            assert torch.equal(served, expected.int())
        else:
            assert torch.equal(served > 0, expected) and served.max() <= 1


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("per_view", [False, True])
def test_every_needed_entry_of_a_rectangle_is_visited_once(table, per_view):
    meets = torch.tensor(table, dtype=torch.int)
    sides = [(0, 1, 1), (0, 17, 17), (9, 17, 17), (0, 50, 50), (0, 25, 50), (7, 7, 7)]
    for n, k, block_rows in itertools.product(sides, sides, [16, 32, 64]):
        rows, cols = Samples(*n), Samples(*k)
        by_rows, by_cols = torch.zeros(2, len(table) * n[2], len(table) * k[2], dtype=torch.int)
        for block in plan_rectangle(rows, cols, table, block_rows, per_view):
            assert 0 < block.shape[0] <= block_rows and 0 < block.shape[1] <= block_rows
            assert block.serves_rows or block.serves_cols
            assert not block.diagonal and not block.same_sample_offsets
            by_rows[block.rows, block.cols] += block.serves_rows
            by_cols[block.rows, block.cols] += block.serves_cols
            if per_view:
                assert block.row_start // n[2] == (block.row_stop - 1) // n[2]
                assert block.col_start // k[2] == (block.col_stop - 1) // k[2]
        there = torch.zeros(n[2], k[2], dtype=torch.int)
        there[n[0] : n[1], k[0] : k[1]] = 1
        assert torch.equal(by_rows, torch.kron(meets, there))
        assert torch.equal(by_cols, torch.kron(meets.T.contiguous(), there))


def test_only_needed_blocks():
    clip = plan_blocks(64, TABLES[1], 16)
    assert len(clip) == 16
    assert all(b.row_start < 64 <= b.col_start for b in clip)
    assert len(plan_blocks(64, TABLES[0], 16)) == 12 * 13 // 2
    assert len(plan_blocks(5, TABLES[0], 16)) == 1
    assert len(plan_blocks(5, TABLES[4], 16)) == 3


def test_halved_diagonal():
    whole, halved = (plan_blocks(64, TABLES[0], 48, halve_diagonal=halve) for halve in (0, 1))
    assert len(whole) == 4 * 5 // 2 and len(halved) == 4 * 3 + 6
    covered = [sum(b.shape[0] * b.shape[1] for b in plan) for plan in (whole, halved)]
    assert covered == [10 * 48**2, 10 * 48**2 - 4 * (16 * 32)]  # 48 is cut into 32 and 16
    assert plan_blocks(5, TABLES[0], 16, halve_diagonal=True) == plan_blocks(5, TABLES[0], 16)
    # One that is alone, of 48 rows.
    assert [len(plan_blocks(16, TABLES[0], 48, halve_diagonal=least)) for least in (48, 49)] == [
        3,
        1,
    ]


def test_the_plan_is_stable():
    assert plan_blocks(50, TABLES[0], 16) == plan_blocks.__wrapped__(50, TABLES[0], 16)


def test_id_diagonals_are_the_same_sample_offsets():
    for num_samples, table, block_rows in itertools.product(
        (1, 2, 16, 37, 70, 150, 400), TABLES[:2], (48, 160, 8192)
    ):
        for block in plan_blocks(num_samples, table, block_rows):
            offset, period = block.id_diagonals
            rows = torch.arange(block.row_start, block.row_stop)
            cols = torch.arange(block.col_start, block.col_stop)
            same = (rows[:, None] - cols[None, :]) % num_samples == 0
            i, j = torch.arange(len(rows)), torch.arange(len(cols))
            assert torch.equal((i[:, None] + offset) % period == j[None, :] % period, same), block
            assert offset >= 0 < period
