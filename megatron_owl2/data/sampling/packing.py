"""Packing of samples into rows: best-fit decreasing under two limits, positions and images.

Best fit puts every sample, the longest first, into the fullest row that still takes it
(Johnson, 1973). On the lengths of instructions it leaves about one position in a hundred empty.
"""

import numpy as np


def pack(
    lengths: np.ndarray, images: np.ndarray, row_length: int, images_per_row: int
) -> list[list[int]]:
    """Rows of indices of samples, each index once; lengths and images int64 [n].

    The lengths of a row add up to `row_length` at most, its images to `images_per_row` at most.
    The same input gives the same rows. Raises ValueError if a sample alone is beyond a limit.
    """
    longest, most = lengths.max(initial=0), images.max(initial=0)
    if longest > row_length or most > images_per_row:
        raise ValueError(
            f"a sample of {longest} positions or {most} images does not fit into rows of "
            f"{row_length} and {images_per_row}"
        )
    rows: list[list[int]] = []
    # By free images, then by free positions: the open rows. A bit of `free` stands for each
    # number of free positions that some row has, so the best fit is the lowest bit that is set.
    open_rows: list[dict[int, list[int]]] = [{} for _ in range(images_per_row + 1)]
    free = [0] * (images_per_row + 1)
    order = np.lexsort((-images, -lengths))  # stable
    demands = zip(order.tolist(), lengths[order].tolist(), images[order].tolist(), strict=True)
    for index, length, count in demands:
        best, left = row_length + 1, images_per_row
        for level in range(count, images_per_row + 1):
            fitting = free[level] >> length
            if fitting:
                place = (fitting & -fitting).bit_length() - 1
                if place + length < best:
                    best, left = place + length, level
        if best > row_length:
            row, best = len(rows), row_length
            rows.append([])
        else:
            stack = open_rows[left][best]
            row = stack.pop()
            if not stack:
                free[left] &= ~(1 << best)
        rows[row].append(index)
        best, left = best - length, left - count
        open_rows[left].setdefault(best, []).append(row)
        free[left] |= 1 << best
    return rows
