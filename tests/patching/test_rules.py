"""Rules on small models of our own: what they match, what they refuse, what routers see."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import adapters, errors, patching, routing

D, F = 4, 6
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, D)), jnp.float32)
SHAPE = [jax.ShapeDtypeStruct(X.shape, X.dtype)]


class Block(nn.Module):
    """A feed-forward block, gated or not."""

    activations: tuple = ("gelu", "linear")

    @nn.compact
    def __call__(self, x):
        names = ["wi"] if len(self.activations) == 1 else ["wi_0", "wi_1"]
        hidden = jnp.ones(())
        for name, activation in zip(names, self.activations, strict=True):
            function = (lambda h: h) if activation == "linear" else getattr(nn, activation)
            hidden = jnp.multiply(hidden, function(nn.Dense(F, name=name)(x)))
        return nn.Dense(D, name="wo")(hidden)


class Stack(nn.Module):
    """Blocks, and another method than `__call__`."""

    activations: tuple = ("gelu", "linear")
    num_layers: int = 2

    def setup(self):
        self.layers = [Block(self.activations) for _ in range(self.num_layers)]

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

    def first(self, x):
        return self.layers[0](x)


class Probe(nn.Module):
    """Adapter that shows its router's input."""

    @nn.compact
    def __call__(self, inputs, outputs, site):
        self.sow("intermediates", "seen", (site.router_input, site.router_axis))
        return outputs


def seen(rule, activations=("gelu", "linear")):
    """Returns (router input, block input, parameters) of a block under `rule`."""
    patched = patching.Patched(Block(activations), (rule,))
    variables = patched.init(jax.random.key(0), X)
    _, state = patched.apply({"params": variables["params"]}, X, mutable=["intermediates"])
    (found,) = patching.flatten(state["intermediates"]).values()
    return found[0][0], variables["params"]


def test_router_sees_the_activated_sibling():
    source = patching.Sibling("wi_0", "activated")
    found, params = seen(patching.Rule("wi_1", Probe, router_input=source))
    expected = nn.gelu(X @ params["wi_0"]["kernel"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_router_of_an_ungated_block_sees_its_activation_or_the_block_input():
    rule = functools.partial(patching.Rule, "wo", Probe, side="inputs", beside="wi")
    found, params = seen(rule(router_input=patching.Sibling("wi", "activated")), ("relu",))
    np.testing.assert_allclose(found, nn.relu(X @ params["wi"]["kernel"]), rtol=1e-5, atol=1e-6)
    found, _ = seen(rule(router_input=patching.Sibling("wi", "inputs")), ("relu",))
    np.testing.assert_array_equal(found, X)


def test_side_inputs_scales_what_the_layer_reads():
    patched = patching.Patched(
        Block(("relu",)), (patching.Rule("wo", adapters.IA3, side="inputs"),)
    )
    params = patched.init(jax.random.key(0), X)["params"]
    assert params["wo"]["adapter"]["vectors"].shape == (F,)
    vectors = jnp.arange(1.0, F + 1)
    params["wo"]["adapter"]["vectors"] = vectors
    hidden = nn.relu(X @ params["wi"]["kernel"]) * vectors[None, None]
    expected = hidden @ params["wo"]["kernel"]
    result = patched.apply({"params": params}, X)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_callable_activations_and_missing_siblings():
    source = patching.Sibling("wi", "activated")
    with pytest.raises(errors.UserError, match="routes on 'wi_2', but its parent called wi_0"):
        seen(patching.Rule("wi_1", Probe, router_input=patching.Sibling("wi_2", "inputs")))

    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D, name="wo")(nn.Dense(F, name="wi")(x))

    rule = patching.Rule("wo", Probe, router_input=source)
    with pytest.raises(errors.UserError, match="Bare does not list that layer"):
        patching.Patched(Bare(), (rule,)).init(jax.random.key(0), X)


def test_matches_lists_layers_per_rule():
    rules = (
        patching.Rule(".*/wi_1", adapters.IA3, site="feed-forward"),
        patching.Rule(".*/wo", adapters.IA3, beside="wi", site="feed-forward"),
    )
    found = patching.matches(Stack(), rules, SHAPE)
    assert found.paths == (("layers_0/wi_1", "layers_1/wi_1"), ())
    assert found.matched == ("layers_0/wi_1", "layers_1/wi_1")
    assert found.unused == ()  # its alternative serves the site
    assert len(found.layers) == 6
    found.check()
    ungated = patching.matches(Stack(("relu",)), rules, SHAPE)
    assert ungated.paths == ((), ("layers_0/wo", "layers_1/wo"))
    # A patched model is looked at without its adapters.
    patched = patching.Patched(Stack(), rules)
    assert patching.matches(patched, rules, SHAPE) == found


def test_a_pattern_matches_whole_paths_only():
    found = patching.matches(Stack(), (patching.Rule("wi_1", adapters.IA3),), SHAPE)
    assert found.paths == ((),)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            (".*/wi_3",),
            r"rule '\.\*/wi_3' matches no layer of the model\. The model has: layers_\*/wi_0,",
        ),
        (("layers_0/wi_2",), "Did you mean 'layers_0/wi_"),
        ((".*/wi_1", ".*_1"), r"2 rules match the layer layers_0/wi_1: '\.\*/wi_1', '\.\*_1'"),
    ],
)
def test_bad_rules_fail_at_init_and_in_check(patterns, message):
    rules = tuple(patching.Rule(pattern, adapters.IA3) for pattern in patterns)
    with pytest.raises(errors.UserError, match=message):
        patching.Patched(Stack(), rules).init(jax.random.key(0), X)
    with pytest.raises(errors.UserError, match=message):
        patching.matches(Stack(), rules, SHAPE).check()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patching.Rule("*wi", adapters.IA3), "not a regular expression"),
        (lambda: patching.Rule("wi", adapters.IA3, side="input"), "side is 'input'"),
        (lambda: patching.Rule("wi", adapters.IA3, router_input="tokens"), "is 'tokens'"),
        (lambda: patching.Rule("wi", functools.partial(adapters.LoRA, rank=0)), "rank is 0"),
    ],
)
def test_bad_settings_fail_when_the_rule_is_made(make, message):
    with pytest.raises(errors.UserError, match=message):
        make()


def test_other_methods_run_with_adapters_and_bypasses_are_refused():
    patched = patching.Patched(Stack(), (patching.Rule(".*/wo", adapters.IA3),))
    params = patched.init(jax.random.key(0), X)["params"]
    plain = patched.apply({"params": params}, X, method=patched.first)
    params["layers_0"]["wo"]["adapter"]["vectors"] = 2 * jnp.ones(D)
    for method in (patched.first, "first", Stack.first):
        doubled = patched.apply({"params": params}, X, method=method)
        np.testing.assert_allclose(doubled, 2 * plain, rtol=1e-6)
    assert patched.num_layers == 2
    again = patched.clone(name="again").apply({"params": params}, X, method=Stack.first)
    np.testing.assert_allclose(again, 2 * plain, rtol=1e-6)
    for name in ("bind", "copy", "tabulate"):
        with pytest.raises(AttributeError, match="would leave out its adapters"):
            getattr(patched, name)


def test_missing_adapters_are_an_error_and_nothing_outlives_a_call():
    patched = patching.Patched(Stack(), (patching.Rule(".*/wo", adapters.IA3),))
    base = Stack().init(jax.random.key(0), X)
    with pytest.raises(Exception, match="vectors"):
        patched.apply(base, X)
    Stack().apply(base, X)  # the interceptor is gone, even after an error


def test_layers_with_several_arguments_are_refused_only_where_adapted():
    class Odd(nn.Dense):
        @nn.compact
        def __call__(self, x, shift):
            return nn.Dense(self.features, name="inner")(x) + shift

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Odd(D, name="odd")(x, 1.0)

    inner = patching.Patched(Model(), (patching.Rule("odd/inner", adapters.IA3),))
    inner.init(jax.random.key(0), X)
    outer = patching.Patched(Model(), (patching.Rule("odd", adapters.IA3),))
    with pytest.raises(errors.UserError, match="odd is called with 2 arguments"):
        outer.init(jax.random.key(0), X)


def test_rng_that_a_scan_does_not_split_is_an_error():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            class Body(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return nn.Dense(D, name="dense")(x), None

            scan = nn.scan(Body, {"params": 0}, split_rngs={"params": True}, length=2)
            return scan(name="body")(x, None)[0]

    jittery = functools.partial(routing.TokenRouter, jitter=0.1)
    factory = functools.partial(adapters.MoV, num_experts=2, router_factory=jittery)
    patched = patching.Patched(Scanned(), (patching.Rule("body/dense", factory),))
    variables = patched.init(jax.random.key(0), X)
    assert variables["params"]["body"]["dense"]["adapter"]["vectors"].shape == (2, 2, D)
    patched.apply({"params": variables["params"]}, X)
    with pytest.raises(errors.UserError, match="split_rngs"):
        patched.apply({"params": variables["params"]}, X, rngs={"routing": jax.random.key(0)})
    with pytest.raises(errors.UserError, match="has to lift them"):
        patched.apply({"params": variables["params"]}, X, mutable=["router_losses"])


def test_split_and_merge():
    params = {"a": {"kernel": 1, "adapter": {"x": 2}}, "b": {"kernel": 3}}
    frozen, trainable = patching.split(params, lambda path: "/adapter/" in path)
    assert frozen == {"a": {"kernel": 1}, "b": {"kernel": 3}}
    assert trainable == {"a": {"adapter": {"x": 2}}}
    assert patching.merge(frozen, trainable) == params
    assert patching.merge({}, params) == params
    with pytest.raises(ValueError, match="1 leaves are frozen and trainable at once, first b/ker"):
        patching.merge(frozen, {"b": {"kernel": 4}})
