"""The compiled kernels against plain torch on shapes that hypothesis draws."""

import pytest
import torch

from ops import compiled, library, reference
from tests.ops.cases import MODES, make

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
@pytest.mark.parametrize("isa_name", library.ISAS)
def test_any_shape(isa_name, data):
    sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))
    case = make(
        data.draw(st.sampled_from(MODES)),
        B=data.draw(st.integers(0, 3)),
        Q=data.draw(st.integers(0, 20)),
        M=data.draw(st.integers(1, 4)),
        E=data.draw(st.integers(1, 70)),
        P=data.draw(st.integers(1, 6)),
        sizes_hw=data.draw(st.lists(sizes, min_size=1, max_size=5)),
        seed=data.draw(st.integers(0, 99)),
    )
    try:
        library.choose_cpu_isa(isa_name)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for found, expected in zip(case.results(compiled), case.results(reference), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    finally:
        library.choose_cpu_isa()
