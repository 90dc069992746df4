import pytest

from tests.models.conftest import write_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))
