"""The implementation of the operators that TENFOLD_OP in the environment chose: the compiled one, or plain torch."""

import os

from ops import compiled, reference

IMPLEMENTATIONS = {"compiled": compiled, "reference": reference}
if (_chosen := os.environ.get("TENFOLD_OP") or "compiled") not in IMPLEMENTATIONS:
    raise ValueError(f"TENFOLD_OP: {_chosen!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
implementation = IMPLEMENTATIONS[_chosen]
