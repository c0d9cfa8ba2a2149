"""A short run of the fuzzer with a fixed seed, and proof that it notices and shrinks what is wrong."""

import fuzz
import pytest
from hypothesis import given, seed


@seed(20)
@fuzz.options(25)
@given(fuzz.cases())
def test_random_calls_of_random_models(case):
    fuzz.check(case)


def test_what_is_wrong_is_found_and_made_small(monkeypatch):
    """A window that is one token too wide: few models and prompts show it."""
    from hf_paged import attention

    honest = attention.AttentionCall

    def wide(scale, softcap, window, sinks):
        return honest(scale, softcap, None if window is None else window + 1, sinks)

    monkeypatch.setattr(attention, "AttentionCall", wide)
    monkeypatch.setattr("hf_paged.probe.tolerance_of", lambda dtype: 1e9)  # the trial would notice, too
    monkeypatch.setattr("hf_paged.runtime.fast_path_obstacle", lambda *args: None)
    failing = fuzz._batch(1, end=float("inf"), examples=20, names=("mistral_sliding", "gemma3"))
    assert failing is not None
    assert len(failing.asks) == 1
    with pytest.raises(AssertionError):
        exec(failing.source(), {})
