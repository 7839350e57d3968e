"""Profiles: the curves go through measured points, and bad points are named. Chapter 10."""

import json

import pytest

from minprfaas.errors import UserError
from minprfaas.scheduling.paper_case import h20_profile, h200_profile
from minprfaas.scheduling.profiles import Profile, ProfilePoint, Scale


def profile_of(prefill_s, tokens=(1024, 2048, 4096, 8192), kv_bytes=(100, 200, 400, 800)) -> Profile:
    points = tuple(ProfilePoint(*point) for point in zip(tokens, kv_bytes, prefill_s))
    return Profile("test", points, t_decode_s=0.025, bs_max=20)


def test_a_quadratic_prefill_is_recovered_exactly():
    def prefill_s(tokens):
        return 0.2 + 3e-5 * tokens + 4e-9 * tokens**2

    profile = profile_of([prefill_s(tokens) for tokens in (1024, 2048, 4096, 8192)])
    for tokens in (1, 3000, 100_000):
        assert profile.prefill_s(tokens) == pytest.approx(prefill_s(tokens), rel=1e-9)
    assert profile.fit_error < 1e-9


def test_the_curve_through_table_5_stays_within_two_percent_of_its_points():
    profile = h200_profile()
    assert profile.fit_error == max(abs(profile.prefill_s(p.tokens) / p.prefill_s - 1) for p in profile.points) < 0.02


def test_prefill_rises_and_stays_positive_where_a_free_quadratic_would_fall_or_go_below_zero():
    flattening = profile_of([1.0, 1.9, 2.5, 2.9])  # a free fit bends down and turns around at about 7K tokens
    steep = profile_of([0.01, 0.05, 0.4, 3.0])  # a free fit is negative between 0 and 1K tokens
    for profile in (flattening, steep):
        seconds = [profile.prefill_s(tokens) for tokens in range(0, 200_000, 500)]
        assert seconds[0] >= 0 and seconds == sorted(seconds) and len(set(seconds)) == len(seconds)


def test_two_points_give_a_line_and_long_contexts_stay_well_conditioned():
    line = profile_of([1.0, 3.0], tokens=(1000, 2000))
    assert line.prefill_s(1500) == pytest.approx(line.prefill_s(1000) / 2 + line.prefill_s(2000) / 2, rel=0.1)
    long = profile_of([1.0, 2.0, 4.0, 8.0], tokens=(2**20, 2**21, 2**22, 2**23))
    assert long.prefill_s(3 * 2**20) == pytest.approx(3.0, rel=1e-6)


def test_kv_bytes_are_linear_between_points_and_continue_beyond_them():
    profile = profile_of([1, 2, 3, 4], kv_bytes=(100, 300, 350, 950))
    assert [profile.kv_bytes(tokens) for tokens in (1024, 1536, 2048, 3072, 8192)] == [100, 200, 300, 325, 950]
    assert profile.kv_bytes(8192 + 4096) == 950 + 600
    assert profile.kv_bytes(768) == 50 and profile.kv_bytes(0) == 0


def test_what_any_request_costs_beside_its_tokens_is_given_in_tokens():
    line = profile_of([0.3 + 1e-4 * tokens for tokens in (1024, 2048, 4096, 8192)])
    assert line.overhead_tokens == 3000 and profile_of([1.024, 2.048, 4.096, 8.192]).overhead_tokens == 0
    curve = profile_of([0.3 + 1e-4 * tokens + 1e-8 * tokens**2 for tokens in (1024, 2048, 4096, 8192)])
    assert curve.overhead_tokens == round(0.3 / (1e-4 + 1e-8 * (1024 + 8192))), "of its tokens from end to end"


def test_a_full_batch_takes_the_profiles_step_and_a_lone_request_half_of_it_and_its_share():
    profile = profile_of([1, 2, 3, 4])
    assert [profile.decode_step_s(requests) for requests in (20, 10, 0)] == pytest.approx([0.025, 0.01875, 0.0125])


def test_rows_that_cross_in_fewer_bytes_leave_the_state_of_one_size_as_it_is():
    line = profile_of([1, 2, 3, 4], kv_bytes=(1000 + 1024, 1000 + 2048, 1000 + 4096, 1000 + 8192))
    half = line.encoded(0.5)
    assert [point.kv_bytes for point in half.points] == [1000 + 512, 1000 + 1024, 1000 + 2048, 1000 + 4096]
    assert half.prefill_s(3000) == line.prefill_s(3000) and line.encoded(1.0) == line
    bent = profile_of([1, 2, 3, 4], kv_bytes=(2048, 4096, 5120, 13_312))  # 2, 0.5 and 2 bytes a token
    assert bent.encoded(0.5).points[0].kv_bytes == 2048 - 0.25 * 1024
    below = profile_of([1, 2, 3, 4], kv_bytes=(256, 4096, 8192, 16_384))  # no line through zero has such a slope
    assert below.encoded(0.5).points[0].kv_bytes == 128


def test_a_scale_is_undone_by_its_inverse():
    scale = Scale.parse("8,64,0.001")
    assert (scale.time, scale.length, scale.size) == (8, 64, 0.001)
    assert (scale.seconds(4.0), scale.rate_rps(0.5), scale.tokens(10), scale.gbps(0.0125)) == (0.5, 4.0, 640, 100.0)
    assert scale.run_gbps(scale.gbps(0.03)) == pytest.approx(0.03)
    assert str(scale).startswith("seconds times 8, one token for 64, bytes times 0.001; ")
    small = scale.profile(profile_of([1, 2, 3, 4]))
    assert [(p.tokens, p.kv_bytes, p.prefill_s) for p in small.points] == [
        (16, pytest.approx(0.1), 8), (32, pytest.approx(0.2), 16), (64, pytest.approx(0.4), 24),
        (128, pytest.approx(0.8), 32)]
    assert small.t_decode_s == 0.025 * 64 * 8
    for bad in ("1,2", "1,2,x", "0,1,1", "1,-1,1", "1,1,1e10", "1,2,3,4"):
        with pytest.raises(UserError):
            Scale.parse(bad)


def test_the_calibrated_h20_curve_is_the_h200_curve_mapped_affinely():
    fast, slow = h200_profile(), h20_profile()
    slopes = {round((slow.prefill_s(tokens + 5000) - slow.prefill_s(tokens))
                    / (fast.prefill_s(tokens + 5000) - fast.prefill_s(tokens)), 6) for tokens in (200, 20_000, 90_000)}
    assert len(slopes) == 1 and 2.5 < slopes.pop() < 3.5


def test_a_profile_survives_a_json_file(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(h200_profile().to_json()))
    assert Profile.read(path) == h200_profile()


@pytest.mark.parametrize("change, named", [
    ({"points": []}, "0 point"),
    ({"points": [{"tokens": 1024, "kv_bytes": 10, "prefill_s": 1.0}]}, "1 point"),
    ({"prefill_s": 0.2}, "prefill_s does not increase"),
    ({"kv_bytes": 5}, "kv_bytes does not increase"),
    ({"tokens": 1024}, "tokens does not increase"),
    ({"prefill_s": -1.0}, "prefill_s is -1.0"),
    ({"kv_bytes": float("nan")}, "kv_bytes is nan"),
    ({"tokens": "many"}, "tokens is 'many'"),
    ({"bs_max": 0}, "bs_max is 0"),
    ({"bs_max": 2.5}, "bs_max is 2.5"),
    ({"t_decode_s": 0}, "t_decode_s is 0"), ({"t_decode_s": 1e308}, "t_decode_s is 1e+308"),
    ({"name": ""}, "name ''"),
    ({"gpu": "H200"}, "unknown key 'gpu'"),
    ({"points": 3}, "'points' holds a int"),
    ({"points": [[1024, 10, 1.0]]}, "point 1 is a list"),
    ({"points": [{"tokens": 1024}]}, "point 1: missing key 'kv_bytes'"),
])
def test_a_bad_profile_is_refused_by_name(change, named):
    points = [{"tokens": 1024, "kv_bytes": 10, "prefill_s": 1.0}, {"tokens": 2048, "kv_bytes": 20, "prefill_s": 2.0}]
    raw = {"name": "mine", "points": points, "t_decode_s": 0.025, "bs_max": 20}
    for key, value in change.items():
        if key in points[1]:
            points[1][key] = value
        else:
            raw[key] = value
    with pytest.raises(UserError) as refusal:
        Profile.from_json(raw)
    assert named in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_key_of_a_profile_is_named():
    raw = h200_profile().to_json()
    del raw["t_decode_s"]
    with pytest.raises(UserError, match="missing key 't_decode_s'"):
        Profile.from_json(raw)
