import os
import signal

import pytest

from crosstill.train import checkpoint


def test_the_first_signal_waits_for_the_step_and_the_second_does_not(monkeypatch):
    left = []
    monkeypatch.setattr(checkpoint.os, "_exit", left.append)
    with checkpoint.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked and not left
        with pytest.raises(KeyboardInterrupt):
            stop.obey()
        os.kill(os.getpid(), signal.SIGINT)
    assert left == [130]


def test_sigterm_ends_with_143():
    with checkpoint.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as left:
            stop.obey()
    assert left.value.code == 143
