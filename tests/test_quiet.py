"""What transformers says is kept off the terminal, or told in one line."""

from __future__ import annotations

import pytest
import transformers

from layerscalpel.errors import UserError
from layerscalpel.quiet import quiet_transformers, readable


def test_a_defect_is_not_taken_for_unreadable_input():
    with pytest.raises(ZeroDivisionError), readable("it"):
        _ = 1 / 0
    with (
        pytest.raises(UserError, match="it cannot be read: a b - check the name, the files and the network"),
        readable("it"),
    ):
        raise OSError("a\n  b")


def test_what_other_libraries_print_comes_back():
    level = transformers.utils.logging.get_verbosity()
    with quiet_transformers():
        assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.ERROR
    with pytest.raises(ZeroDivisionError), quiet_transformers():
        _ = 1 / 0
    assert transformers.utils.logging.get_verbosity() == level
