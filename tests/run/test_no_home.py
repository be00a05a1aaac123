# SPDX-License-Identifier: Apache-2.0
"""Without a place for compiled programs a run trains all the same, and says so once."""

import jax
import pytest

from jaxllm.run.compilation_cache import use_compilation_cache


@pytest.fixture
def unset(monkeypatch):
    """JAX without a cache; what is set here is forgotten after the test."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_user_without_a_home_has_no_cache(unset, monkeypatch, caplog):
    monkeypatch.delenv("HOME", raising=False)
    # A bare user id, as containers have: no entry in /etc/passwd.
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    (said,) = caplog.messages
    assert "no home directory; JAX_COMPILATION_CACHE_DIR can name" in said


def test_a_home_that_is_no_folder_has_no_cache(unset, monkeypatch, caplog, tmp_path):
    (tmp_path / "home").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    (said,) = caplog.messages
    assert f"{tmp_path}/home/.cache/jaxllm: " in said


def test_a_home_that_can_be_written_has_a_cache(unset, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == f"{tmp_path}/.cache/jaxllm"
    assert caplog.messages == []
