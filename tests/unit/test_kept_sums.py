from fednats.services.kept_sums import KEPT_SUMS, KeptSums


def made(count: int, version: int) -> KeptSums:
    kept = KeptSums()
    for number in range(count):
        kept.add(f"s{number}", version)
    return kept


def test_the_newest_few_are_kept() -> None:
    kept = made(KEPT_SUMS + 2, version=3)
    dropped = []
    while (unneeded := kept.oldest_unneeded(version=4)) is not None:
        dropped.append(unneeded)
        kept.drop_oldest()
    assert dropped == ["s0", "s1"]


def test_no_sum_is_dropped_while_no_newer_version_comes() -> None:
    """The link may be down, and the node above have none of them."""
    kept = made(10 * KEPT_SUMS, version=3)
    assert kept.oldest_unneeded(version=3) is None
    assert kept.oldest_unneeded(version=4) == "s0"
