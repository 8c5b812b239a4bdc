import sys
from pathlib import Path

import pytest

from jax_fused_lora import implementations

sys.path.insert(0, str(Path(__file__).parent))  # oracle.py, for every test file


@pytest.fixture(params=[name for name, each in implementations().items() if each.available])
def implementation(request):
    """Each available implementation in turn."""
    return request.param
