"""`python -m minprfaas inspect`: what a KVCache weighs and how it lies in blocks, against sums done by hand.

Chapter 00.
"""

import json

import pytest

from minprfaas.__main__ import main

HYBRID = {
    "model_type": "kimi_linear", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 8, "intermediate_size": 64,
    "first_k_dense_replace": 8, "num_attention_heads": 2, "kv_lora_rank": 24, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "rms_norm_eps": 1e-5, "model_max_length": 4096,
    "linear_attn_config": {"num_heads": 2, "head_dim": 16, "short_conv_kernel_size": 4, "full_attn_layers": [4, 8],
                           "kda_layers": [1, 2, 3, 5, 6, 7]},
}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HYBRID))
    return str(tmp_path)


def test_the_json_holds_groups_blocks_and_the_weight_of_a_request(directory, capsys):
    main(["inspect", directory, "--json", "--block-tokens", "16", "--dtype", "bfloat16"])
    report = json.loads(capsys.readouterr().out)
    assert [group["layers"] for group in report["groups"]] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert report["bytes_per_token"] == 2 * (24 + 8) * 2  # 2 MLA layers, latent and shared key, bf16
    state = 2 * 16 * 16 * 4 + 3 * 2 * 16 * 3 * 2  # float32 memory, bf16 tails of the three convolutions
    assert report["state_bytes"] == 6 * state
    assert report["block_bytes"] == 2048 == 16 * report["bytes_per_token"]
    blocks = -(-2 * state // 2048)
    assert [group["blocks_per_request"] for group in report["groups"]] == [blocks] * 3 + [0]
    assert report["groups"][0]["waste"] == pytest.approx(1 - 2 * state / (blocks * 2048))
    last = report["s_kv"][-1]
    assert (last["tokens"], last["bytes"]) == (128 * 1024, 128 * 1024 * 128 + 6 * state)
    assert last["pool_bytes"] == 2048 * (128 * 1024 // 16 + 3 * blocks)


def test_the_tables_name_every_group_and_length(directory, capsys):
    main(["inspect", directory])
    screen = capsys.readouterr().out
    assert "6 KDA, 2 MLA" in screen and "0, 4" in screen and "3, 7" in screen and "waste" in screen
    assert all(f"{2**doubling}K" in screen for doubling in range(8))


@pytest.mark.parametrize("name, mixers, bytes_per_token, window_bytes, state_bytes", [
    ("kimi-linear-48b", {"KDA": 20, "MLA": 7}, 7 * 576 * 2, 0, 20 * (32 * 128 * 128 * 4 + 3 * 32 * 128 * 3 * 2)),
    ("mimo-v2-flash", {"GQA": 9, "SWA": 39}, 9 * 4 * 320 * 2, 39 * 128 * 8 * 320 * 2, 0),
    ("qwen3.5-397b", {"GDN": 45, "GQA": 15}, 15 * 2 * 512 * 2, 0,
     45 * (64 * 128 * 128 * 4 + (2 * 16 + 64) * 128 * 3 * 2)),
    ("ring-2.5-1t", {"Lightning": 70, "MLA": 10}, 10 * 576 * 2, 0, 70 * 64 * 128 * 128 * 4),
    ("minimax-m2.5", {"GQA": 62}, 62 * 8 * 256 * 2, 0, 0),
    ("qwen3-235b", {"GQA": 94}, 94 * 4 * 256 * 2, 0, 0)])
def test_a_published_model_weighs_what_its_layers_make_of_it(name, mixers, bytes_per_token, window_bytes, state_bytes,
                                                             capsys):
    main(["inspect", "--config", name, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["mixers"] == mixers and report["bytes_per_token"] == bytes_per_token
    assert (report["window_bytes"], report["state_bytes"]) == (window_bytes, state_bytes)
    for row in report["kv_throughput"]:  # equation 1, with the paper's own Phi_kv
        assert row["bytes"] * 8e-9 / row["implied_prefill_s"] == pytest.approx(row["paper_gbps"])
        assert row["bytes"] == row["tokens"] * bytes_per_token + window_bytes + state_bytes
        assert 0.3 < row["implied_prefill_s"] < 10, "a prefill on 8 H200 takes about as long"


def test_the_tables_of_a_published_model_say_whose_throughput_it_is(capsys):
    main(["inspect", "--config", "ring-2.5-1t"])
    screen = capsys.readouterr().out
    assert "70 Lightning, 10 MLA" in screen and "Phi_kv Gbps (paper's)" in screen and "T_prefill s (implied)" in screen


@pytest.mark.parametrize("arguments, complaint", [
    (["no-such-directory"], "no-such-directory is not a directory"), (["--block-tokens", "0"], "block_tokens is 0"),
    (["--config", "gpt-5"], "--config gpt-5 are both given"),
    (["--model", "m"], "--model m (see python -m minprfaas inspect --help)")])
def test_a_mistake_gets_one_line_and_status_2(directory, arguments, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *([] if arguments[0] == "no-such-directory" else [directory]), *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and complaint in error and error.count("\n") == 1


def test_a_published_model_that_is_not_shipped_is_refused_with_those_that_are(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--config", "gpt-5"])
    assert "no configuration 'gpt-5' is shipped; there are: kimi-linear-48b, mimo-v2-flash" in capsys.readouterr().err
