"""JAX's persistent cache, which knows a program by its text.

How a program is partitioned is a Python function, which the text holds as an address alone.
"""

import jax
import numpy as np
import oracle
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fused_lora import implementations, lora_linear

M, K, N, R = 16, 32, 48, 4
IMPLEMENTATION = "cuda" if implementations()["cuda"].available else "cpu"
SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # As if every function came to lie where the one before did, which happens; so that processes
    # with functions in places of their own share what they compile.
    "jax_remove_custom_partitioning_ptr_from_cache_key": True,
}


@pytest.fixture
def hits(tmp_path):
    """How many programs were found in a new cache, so far."""
    before = {name: getattr(jax.config, name) for name in (*SETTINGS, "jax_compilation_cache_dir")}
    found = []

    def listen(event, **kwargs):
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    jax.monitoring.register_event_listener(listen)
    compilation_cache.reset_cache()
    compilation_cache.set_cache_dir(str(tmp_path))
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    yield found
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.monitoring.unregister_event_listener(listen)


@pytest.mark.parametrize("devices", [1, 8])
def test_programs_that_differ_in_the_scaling(hits, devices):
    if len(jax.devices()) < devices:
        pytest.skip("needs eight devices")
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    given = oracle.operands((M,), K, N, R, "float32")
    operands = {
        name: jax.device_put(operand, NamedSharding(mesh, P("data") if name == "x" else P()))
        for name, operand in given.items()
    }

    def check(scaling):
        layer = lambda o: lora_linear(  # noqa: E731
            **o, scaling=scaling, implementation=IMPLEMENTATION
        )
        truth = oracle.truth(given, np.ones((M, N)), scaling)
        oracle.check("y", jax.jit(layer)(operands), truth["y"], "float32")

    check(0.5)
    check(2.0)
    assert not hits
    check(0.5)
    assert len(hits) == 1
