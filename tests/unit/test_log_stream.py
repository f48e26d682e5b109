"""A log that cannot be written."""

import subprocess
import sys
from pathlib import Path

DAEMON = """
import structlog
from fednats.services.daemon.lifecycle import configure_logging

configure_logging("info")
for number in range(1000):
    structlog.get_logger().info("still_here", number=number)
print("alive")
"""


def test_a_full_disk_under_the_log_ends_no_daemon() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.stdout == b"alive\n"
