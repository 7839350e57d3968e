"""Chapter 12's exercises, solved; and wrong answers that look right."""


def waits(arrivals_s, services_s):
    done_s, waited = 0.0, []
    for arrived_s, service_s in zip(arrivals_s, services_s):
        begins_s = max(arrived_s, done_s)
        waited.append(begins_s - arrived_s)
        done_s = begins_s + service_s
    return waited


def next_threshold(current, wanted, max_step, deadband):
    if abs(wanted / current - 1) <= deadband:
        return current
    return min(max(wanted, current / max_step), current * max_step)


def last_byte_s(count_bytes, weather):
    left_bits = count_bytes * 8
    ends = [second for second, _ in weather[1:]] + [float("inf")]
    for (second, gbps), end in zip(weather, ends):
        if gbps and second + left_bits / (gbps * 1e9) <= end:
            return second + left_bits / (gbps * 1e9)
        left_bits -= gbps * 1e9 * (end - second) if gbps else 0


def _as_if_the_node_were_never_idle(arrivals_s, services_s):
    done_s, waited = 0.0, []
    for arrived_s, service_s in zip(arrivals_s, services_s):
        waited.append(max(0.0, done_s - arrived_s))
        done_s += service_s
    return waited


def _by_the_mean_rate(count_bytes, weather):
    return count_bytes * 8e-9 / (sum(gbps for _, gbps in weather) / len(weather))


WRONG = {
    "waits": _as_if_the_node_were_never_idle,
    "next_threshold": lambda current, wanted, step, deadband: min(wanted, current * step),  # up only
    "last_byte_s": _by_the_mean_rate,
}
