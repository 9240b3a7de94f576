"""Operations and communication of programs, against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest

from moe_peft.partitioning import hlo_cost
from moe_peft.partitioning import mesh as mesh_lib

X, W = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 4 * 8 * 8


def looped(x, w, length=3):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=length)[0]


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda x, w: x @ w, ONE),
        (jax.jit(lambda x, w: x @ w), ONE),
        (looped, 3 * ONE),
        (lambda x, w: jax.grad(lambda x: jnp.sum(looped(x, w)))(x), 6 * ONE),
        (jax.vmap(lambda x, w: x @ w, in_axes=(0, None)), ONE),
        (lambda x, w: jax.lax.cond(True, lambda: looped(x, w), lambda: x @ w), 3 * ONE),
        (lambda x, w: x + 1, 0),
    ],
)
def test_operations_count_loops_as_often_as_they_run(function, wanted):
    assert hlo_cost.operations(jax.jit(function).trace(X, W)) == wanted


def test_rematerialisation_counts_again():
    def loss(x, w, keep):
        twice = lambda x: jnp.tanh(jnp.tanh(x @ w) @ w)
        return jnp.sum(twice(x) if keep else jax.checkpoint(twice)(x))

    kept, again = (
        hlo_cost.operations(
            jax.jit(jax.grad(functools.partial(loss, keep=keep), argnums=1)).trace(X, W)
        )
        for keep in (True, False)
    )
    assert again > kept


def test_collectives_in_loops_count_as_often_as_they_run():
    mesh = mesh_lib.make_mesh(1, 1, 2, devices=jax.devices()[:2])
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model", None))
    give = lambda sharding: jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)

    def layers(x, first, second):
        layer = lambda x, _: (jnp.tanh(jnp.tanh(x @ first) @ second), None)
        return jax.lax.scan(layer, x, None, length=5)[0]

    x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=mesh_lib.replicated(mesh))
    whole = mesh_lib.replicated(mesh)
    with jax.set_mesh(mesh):
        jitted = jax.jit(layers, out_shardings=whole)
        compiled = jitted.lower(x, give(columns), give(rows)).compile()
    found = hlo_cost.collectives(compiled.as_text())
    assert found == {"all-reduce": hlo_cost.Collective(5, 5 * 4 * 8 * 4)}
    memory = hlo_cost.memory(compiled)
    assert memory.arguments == 4 * (4 * 8 + 2 * 8 * 8 // 2)
    assert memory.peak >= memory.arguments + memory.temporaries


def test_loops_of_tpu_programs_say_their_length_in_the_condition():
    text = """
%cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(24)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce(%x), channel_id=1, to_apply=%add
  %g = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%y), channel_id=2
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %s = f32[4]{0} reduce-scatter(%z), channel_id=3, to_apply=%add
}
"""
    assert hlo_cost.collectives(text) == {
        "all-gather": hlo_cost.Collective(24, 24 * 4 * 8 * 4),
        "all-reduce": hlo_cost.Collective(24, 24 * 8 * 128 * 2),
        "reduce-scatter": hlo_cost.Collective(1, 16),
    }


def test_what_leaves_a_slice_is_told_apart():
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %sent = (bf16[64,8]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%x, %token), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %done = token[] send-done(%sent), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %local = (bf16[64,8]{1,0}, u32[], token[]) send(%x, %token), is_host_transfer=true
}
"""
    assert hlo_cost.collectives(text) == {
        hlo_cost.BETWEEN_SLICES: hlo_cost.Collective(1, 64 * 8 * 2)
    }
