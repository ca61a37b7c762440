import logging

import pytest


@pytest.fixture(autouse=True)
def clean_logger():
    """After every test the logger "tenfold" is what it was before."""
    logger = logging.getLogger("tenfold")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    yield
    for handler in set(logger.handlers) - set(handlers):
        handler.close()
    logger.handlers[:], logger.propagate, logger.level = handlers, propagate, level
