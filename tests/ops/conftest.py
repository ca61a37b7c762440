"""Which kernels a test runs: those of every instruction set in turn, where it asks for `isa`."""

import pytest

from ops import library


@pytest.fixture(params=library.ISAS)
def isa(request):
    """The instruction set whose kernels run."""
    try:
        library.choose_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    library.choose_cpu_isa()
