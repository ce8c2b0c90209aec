import pytest

from tests.parallel.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """ranks(count): that many processes, kept for the session."""
    pools: dict[int, Ranks] = {}

    def of(count: int) -> Ranks:
        if count not in pools:
            pools[count] = Ranks(count)
        return pools[count]

    yield of
    for pool in pools.values():
        pool.close()
