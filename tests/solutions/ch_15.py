"""Chapter 15's exercises, solved; and wrong answers that look right."""


def int8_and_back(row, group):
    arrived = []
    for start in range(0, len(row), group):
        part = row[start:start + group]
        scale = max(abs(number) for number in part) / 127 or 1.0
        arrived += [round(number / scale) * scale for number in part]
    return arrived


def row_bytes(width, group, bits, numbers_a_group):
    return width // group * (-(-group * bits // 8) + 2 * numbers_a_group)


def relayed_tokens(transfer_s, prefill_s, step_s, answer_tokens):
    return min(int(max(transfer_s - prefill_s, 0) / step_s), answer_tokens)


def _one_scale_for_all(row, group):
    scale = max(abs(number) for number in row) / 127 or 1.0
    return [round(number / scale) * scale for number in row]


WRONG = {
    "int8_and_back": _one_scale_for_all,
    "row_bytes": lambda width, group, bits, numbers: width * bits // 8 + 2 * numbers,  # one scale for the row
    "relayed_tokens": lambda transfer_s, prefill_s, step_s, tokens: min(int(transfer_s / step_s), tokens),  # overlap!
}
