import numpy as np

from moe_peft.data import packing


def test_packer_is_first_fit_and_ends_a_batch_at_what_fits_nowhere():
    packer = packing.Packer(2, (10, 6))
    lengths = [(6, 2), (6, 2), (4, 2), (4, 4), (1, 3), (9, 1)]
    batches = packer.batches(iter(lengths))
    # The fifth needs three target tokens; both rows have fewer left.
    assert next(batches) == [0, 1, 0, 1]
    assert next(packer.batches(iter([(10, 6), (10, 6), (2, 2)]))) == [0, 1]


def test_fill_and_shift():
    rows = packing.fill_rows([np.array([5, 6]), np.array([7]), np.array([8, 9])], [0, 1, 0], (2, 5))
    np.testing.assert_array_equal(rows["tokens"], [[5, 6, 8, 9, 0], [7, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows["segment_ids"], [[1, 1, 2, 2, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows["positions"], [[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    shifted = packing.shift_right(rows["tokens"], rows["segment_ids"])
    np.testing.assert_array_equal(shifted, [[0, 5, 0, 8, 0], [0, 0, 0, 0, 0]])
