from pathlib import Path

import pytest

from common.config import ClusterConfig, load_config


def _load(tmp_path: Path, text: str) -> ClusterConfig:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return load_config(path)


def test_no_file_means_the_defaults() -> None:
    assert load_config(None) == ClusterConfig()


def test_a_file_changes_what_it_names(tmp_path: Path) -> None:
    config = _load(tmp_path, "[decode]\nnum_ranks = 2\n[monitor]\nheartbeat_s = 0.5\n")
    assert (config.decode.num_ranks, config.monitor.heartbeat_s) == (2, 0.5)
    assert config.decode.max_ranks == ClusterConfig().decode.max_ranks


def test_tokens_may_leave_after_every_round(tmp_path: Path) -> None:
    assert _load(tmp_path, "[decode]\ndelivery_interval_s = 0.0\n").decode.delivery_interval_s == 0.0


def test_a_switch_can_be_turned_off(tmp_path: Path) -> None:
    assert _load(tmp_path, "[planner]\nlog_balancedness = false\n").planner.log_balancedness is False


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[decode]\nnum_rank = 2\n", "num_rank"),
        ("[decoder]\nnum_ranks = 2\n", "decoder"),
        ('[decode]\nnum_ranks = "two"\n', r"decode\.num_ranks"),
        ("[decode]\nnum_ranks = 9\n", "max_ranks"),
        ("[monitor]\ntick_s = 0.0\n", "tick_s"),
        ("[monitor]\ntick_s = nan\n", "tick_s"),
        ("[monitor]\nheartbeat_s = 0.6\n", "heartbeat_s"),
        ("[monitor]\nheartbeat_s = 0.3\nheartbeat_timeout_s = 1.0\n", "heartbeat_s"),
        ("[prefill]\nnum_workers = 0\n", "num_workers"),
        ("[decode]\ndelivery_interval_s = -0.01\n", "delivery_interval_s"),
        ("[decode]\ndelivery_interval_s = 0.6\n", "no_news_s"),
        ("[decode\n", "cluster.toml"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        _load(tmp_path, text)
    assert "cluster.toml" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")
