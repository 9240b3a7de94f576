"""The model's objective on a real tiny T5: packed rows, router losses, abstract initialisation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors, methods, patching
from moe_peft.models import encoder_decoder, losses, t5

VOCAB = 19


@functools.cache
def tiny(scan_layers=False):
    return t5.Transformer(
        t5.T5Config(
            vocab_size=VOCAB,
            emb_dim=8,
            num_heads=2,
            head_dim=4,
            mlp_dim=16,
            num_encoder_layers=1,
            num_decoder_layers=2 if scan_layers else 1,
            scan_layers=scan_layers,
        )
    )


def examples(seed=0, lengths=((4, 3), (2, 1), (5, 4), (3, 2))):
    """[(input ids, target ids)]."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(2, VOCAB, s), rng.integers(2, VOCAB, t)) for s, t in lengths]


@functools.cache
def batch_names():
    return tuple(batch_of([]))


def batch_of(pairs, source=6, target=5):
    """One example per row."""
    return packed_batch([[pair] for pair in pairs], source, target, is_packed=False)


def packed_batch(rows, source=10, target=10, is_packed=True):
    """Several examples per row, as T5X's feature converters lay them out."""
    batch = {
        f"{side}_{name}": np.zeros((len(rows), length), np.int32)
        for side, length in (("encoder", source), ("decoder", target))
        for name in ("tokens", "segment_ids", "positions")
    }
    shifted = np.zeros((len(rows), target), np.int32)
    for row, members in enumerate(rows):
        start = {"encoder": 0, "decoder": 0}
        for segment, pair in enumerate(members, 1):
            for side, tokens in zip(("encoder", "decoder"), pair, strict=True):
                where = (row, slice(start[side], start[side] + len(tokens)))
                batch[f"{side}_tokens"][where] = tokens
                batch[f"{side}_segment_ids"][where] = segment
                batch[f"{side}_positions"][where] = np.arange(len(tokens))
                if side == "decoder":
                    shifted[where] = [0, *tokens[:-1]]
                start[side] += len(tokens)
    batch["encoder_input_tokens"] = batch.pop("encoder_tokens")
    batch["decoder_target_tokens"] = batch.pop("decoder_tokens")
    batch["decoder_input_tokens"] = shifted
    batch["decoder_loss_weights"] = (batch["decoder_target_tokens"] > 0).astype(np.float32)
    if is_packed:
        return batch
    return {k: v for k, v in batch.items() if "segment" not in k and "positions" not in k}


def random_params(model, seed=1):
    """Parameters in which adapters and routers are not neutral; nothing is compiled for them."""
    shapes = dict.fromkeys(batch_names(), (1, 4))
    abstract = jax.eval_shape(
        functools.partial(model.init, batch_shapes=shapes), jax.random.key(seed)
    )
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        offset = path[-1].key == "scale"  # of norms
        return offset + 0.4 * rng.normal(size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def make_model(method=None, loss_config=None, scan_layers=False):
    module = tiny(scan_layers)
    module = method.patch(module) if method else module
    return encoder_decoder.EncoderDecoder(module, loss_config or losses.LossConfig(), method)


def test_packed_rows_cost_what_their_examples_cost():
    configs = [
        losses.LossConfig(normalization, z_loss=1e-2, label_smoothing=0.1)
        for normalization in losses.NORMALIZATIONS
    ]
    models = [make_model(methods.mov(num_experts=3), config) for config in configs]
    params = random_params(models[0])
    a, b, c, d = examples()
    objectives = jax.jit(lambda params, batch: [model.loss(params, batch)[0] for model in models])
    one_by_one = objectives(params, batch_of([a, b, c, d]))
    packed = objectives(params, packed_batch([[a, c], [b, d]]))
    np.testing.assert_allclose(packed, one_by_one, rtol=1e-5)
    assert not np.any(np.isclose(one_by_one, objectives(params, batch_of([a, b, a, b])), rtol=1e-3))
    assert len({float(value) for value in one_by_one}) == 3


@pytest.mark.parametrize(
    "scan_layers",
    [
        pytest.param(False, id="unscanned", marks=pytest.mark.slow),
        pytest.param(True, id="scanned"),
    ],
)
def test_router_losses_reach_the_objective_and_the_routers(scan_layers):
    method = methods.mov(num_experts=3, load_balancing_weight=0.5, z_weight=0.25)
    model = make_model(method, scan_layers=scan_layers)
    params, batch = random_params(model), batch_of(examples())

    def added(params):
        objective, means = model.loss(params, batch)
        return objective - means["nll"], means

    (value, means), grads = jax.jit(jax.value_and_grad(added, has_aux=True))(params)
    want = 0.5 * means["router/load_balancing"] + 0.25 * means["router/z"]
    assert 1 < means["router/load_balancing"] < 3  # between balanced and one of three experts
    assert means["router/z"] > 0
    np.testing.assert_allclose(value, want, rtol=1e-5)
    routers = [k for k in patching.flatten(grads) if "/router/" in k]
    # Keys and values of three attentions, hidden units of two feed-forward blocks.
    assert len(routers) == 8
    assert all(np.any(patching.flatten(grads)[name] != 0) for name in routers)


def test_micro_batches_weigh_router_losses_by_their_normalizers():
    model = make_model(methods.mov(num_experts=3, z_weight=0.25))
    params, pairs = random_params(model), examples()
    loss_sums = jax.jit(model.loss_sums)
    parts = [loss_sums(params, batch_of(pairs[i : i + 2])) for i in (0, 2)]
    means = [losses.summarize(sums, n) for _, n, sums in parts]
    total = sum(n for _, n, _ in parts)
    nll = sum(m["nll"] * n for m, (_, n, _) in zip(means, parts, strict=True)) / total
    z = sum(m["router/z"] * n for m, (_, n, _) in zip(means, parts, strict=True)) / total
    np.testing.assert_allclose(sum(p[0] for p in parts) / total, nll + 0.25 * z, rtol=1e-6)
    both = losses.summarize(jax.tree.map(jnp.add, parts[0][2], parts[1][2]), total)
    np.testing.assert_allclose(both["router/z"], z, rtol=1e-6)


def test_a_weighed_router_loss_that_nobody_reports_is_an_error():
    method = dataclasses.replace(methods.ia3(), z_weight=0.1)
    model = make_model(method)
    with pytest.raises(errors.UserError, match="'z' by 0.1, but no router reports it"):
        jax.eval_shape(model.loss_sums, random_params(model), batch_of(examples()))


def test_dropout_happens_exactly_when_a_key_is_given():
    model = make_model(methods.ia3())
    params, batch = random_params(model), batch_of(examples())
    loss = jax.jit(lambda params, batch, key: model.loss(params, batch, key)[0])
    first, again, other = (loss(params, batch, jax.random.key(seed)) for seed in (0, 0, 1))
    both = jax.jit(
        lambda params, batch: (model.loss(params, batch)[0], model.logits(params, batch))
    )
    without, logits = both(params, batch)
    assert first == again
    assert len({float(without), float(first), float(other)}) == 3
    nll, _ = losses.token_log_probs(logits, batch["decoder_target_tokens"])
    weights = batch["decoder_loss_weights"]
    np.testing.assert_allclose(without, -np.sum(nll * weights) / np.sum(weights), rtol=1e-6)


def test_initialisation_can_be_abstract_and_gives_axes():
    model = make_model(methods.mov(num_experts=3))
    shapes = dict.fromkeys(batch_of([]), (2, 4)) | {"sentence_embeddings": (2, 6)}
    abstract = jax.eval_shape(
        functools.partial(model.init_variables, batch_shapes=shapes), jax.random.key(0)
    )
    params = random_params(model)
    same = jax.tree.map(
        lambda a, b: a.shape == b.shape and a.dtype == b.dtype, abstract["params"], params
    )
    assert jax.tree.all(same)
    assert "params_axes" in abstract


def test_a_batch_without_targets_says_what_it_has():
    batch = batch_of(examples())
    del batch["decoder_target_tokens"]
    with pytest.raises(errors.UserError, match="lacks decoder_target_tokens; it has decoder_input"):
        make_model().logits({}, batch)
