"""Profiles: the curves go through measured points, and bad points are named. Chapter 10."""

import json

import pytest

from minprfaas.errors import UserError
from minprfaas.scheduling.paper_case import h20_profile, h200_profile
from minprfaas.scheduling.profiles import Profile, ProfilePoint


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
    ({"t_decode_s": 0}, "t_decode_s is 0"),
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
