"""Chapter 09's exercises, solved; and wrong answers that look right."""


def digest_of(data, row_bytes):
    total = 0
    for row, begin in enumerate(range(0, len(data), row_bytes)):
        words = (int.from_bytes(data[at:at + 8], "little") for at in range(begin, begin + row_bytes, 8))
        total += (2 * row + 1) * sum(words)
    return total % 2**64


def batches_of(sizes, batch_bytes, align):
    counts, end = [0], 0
    for size in sizes:
        if end + size > batch_bytes:
            counts.append(0)
            end = 0
        counts[-1] += 1
        end += -(-size // align) * align
    return counts


def plain_sum(data, row_bytes):
    return sum(int.from_bytes(data[at:at + 8], "little") for at in range(0, len(data), 8)) % 2**64


def without_align(sizes, batch_bytes, align):
    return batches_of(sizes, batch_bytes, 1)


WRONG = {"digest_of": plain_sum, "batches_of": without_align}
