"""The parent that a testbed's daemons are forked from."""

import subprocess
import sys
from importlib.util import find_spec

from fednats.testbed.warm import PRELOADED

LEAVES_ONE_RUNNING = """
import time
from fednats.testbed import warm
fork = warm._PARENT.Process(target=time.sleep, args=(600,))
fork.start()
print(fork.pid)
"""


def test_what_the_parent_loads_is_there() -> None:
    """The fork server ignores what it cannot import."""
    assert [name for name in PRELOADED if find_spec(name) is None] == []


def test_a_testbed_that_leaves_a_daemon_running_ends_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES_ONE_RUNNING], capture_output=True, timeout=60, check=True)
    assert int(done.stdout) > 0
