"""Which kernels a test runs."""

import pytest
import torch

from ops import library
from tests.ops import cases

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CUDA = pytest.param("cuda", marks=GPU)


def use(isa: str) -> None:
    try:
        library.choose_cpu_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(params=library.ISAS)
def isa(request):
    """The instruction set of the CPU whose kernels run."""
    use(request.param)
    yield request.param
    library.choose_cpu_isa()


@pytest.fixture(params=["cpu", CUDA])
def device(request, monkeypatch):
    """Where the operators of a Case run."""
    monkeypatch.setattr(cases, "device", request.param)
    return request.param


@pytest.fixture(params=[*library.ISAS, CUDA])
def kernels(request, monkeypatch):
    """Those of an instruction set of the CPU, or of a GPU."""
    if request.param == "cuda":
        monkeypatch.setattr(cases, "device", "cuda")
    else:
        use(request.param)
    yield request.param
    library.choose_cpu_isa()
