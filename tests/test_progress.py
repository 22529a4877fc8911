"""What other libraries write while they work, and what of it comes through."""

import logging
import sys
import warnings

from crosstill.progress import quiet


def test_others_are_quiet_and_our_own_lines_come_through(caplog):
    other, loud = logging.getLogger("other.part"), logging.getLogger("loud")
    loud.setLevel(logging.DEBUG)
    with caplog.at_level(logging.INFO, logger="crosstill"), warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet():
            other.warning("a note")
            loud.info("another")
            warnings.warn("advice", stacklevel=1)
            other.error("a fault")
            logging.getLogger("crosstill.part").info("ours")
        other.warning("afterwards")
    assert [record.message for record in caplog.records] == ["a fault", "ours", "afterwards"]
    assert loud.level == logging.DEBUG and logging.getLogger("crosstill").level == logging.NOTSET


def test_bars_of_transformers_come_back():
    from transformers.utils import logging as bars

    before = bars.is_progress_bar_enabled()
    try:
        bars.enable_progress_bar()
        with quiet():
            assert not bars.is_progress_bar_enabled()
        assert bars.is_progress_bar_enabled() and "transformers.utils.logging" in sys.modules
    finally:
        (bars.enable_progress_bar if before else bars.disable_progress_bar)()
