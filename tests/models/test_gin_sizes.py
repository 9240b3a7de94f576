"""Every size file builds the network whose parameter count is known."""

import math
import pathlib
import re

import gin
import jax
import jax.numpy as jnp
import pytest

from moe_peft import models

GIN_MODELS = pathlib.Path(__file__).parents[2] / "gin" / "models"

# T5 1.1: embedding and output layer untied, 32128 rows each. T5 1.0: one tied table; the totals are
# those of the released checkpoints (60.5M, 222.9M, 737.7M, 2.85B, 11.3B). mT5 and ByT5: as 1.1;
# the papers say 300M, 582M (580M), 1.23B, 3.74B, 12.9B.
NUM_PARAMETERS = {
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "t5_1_0_small": 60_506_624,
    "t5_1_0_base": 222_903_552,
    "t5_1_0_large": 737_668_096,
    "t5_1_0_xl": 2_851_598_336,
    "t5_1_0_xxl": 11_307_321_344,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312,
    "mt5_xl": 3_742_619_648,
    "mt5_xxl": 12_921_057_280,
    "byt5_small": 299_637_760,
    "byt5_base": 581_653_248,
    "byt5_large": 1_228_183_552,
    "byt5_xl": 3_737_801_728,
    "byt5_xxl": 12_906_899_328,
}


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


def build(name, *bindings):
    gin.add_config_file_search_path(str(GIN_MODELS.parent))
    gin.parse_config_files_and_bindings([str(GIN_MODELS / f"{name}.gin")], list(bindings))
    return gin.query_parameter("%MODEL").scoped_configurable_fn()


def count_parameters(module):
    tokens = jnp.ones((1, 4), jnp.int32)
    variables = jax.eval_shape(
        lambda rng: module.init(rng, tokens, tokens, tokens, enable_dropout=False),
        jax.random.key(0),
    )
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("name", ["t5_1_1_small", "t5_1_0_small"])
def test_number_of_parameters(name):
    module = build(name)
    assert isinstance(module, models.Transformer)
    assert count_parameters(module) == NUM_PARAMETERS[name]


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_sizes_give_the_number(name):
    """By hand: the tests of networks show that they are built so."""
    cfg = build(name).config
    attention = 4 * cfg.emb_dim * cfg.num_heads * cfg.head_dim
    feed_forward = (len(cfg.mlp_activations) + 1) * cfg.emb_dim * cfg.mlp_dim
    encoder = cfg.num_encoder_layers * (attention + feed_forward + 2 * cfg.emb_dim)
    decoder = cfg.num_decoder_layers * (2 * attention + feed_forward + 3 * cfg.emb_dim)
    tables = (1 if cfg.logits_via_embedding else 2) * cfg.vocab_size * cfg.emb_dim
    norms_and_biases = 2 * (cfg.emb_dim + 32 * cfg.num_heads)
    assert encoder + decoder + tables + norms_and_biases == NUM_PARAMETERS[name]


# Of those between, the numbers are told from their sizes above.
@pytest.mark.parametrize(
    "name",
    [
        name if name.endswith(("small", "xxl")) else pytest.param(name, marks=pytest.mark.slow)
        for name in NUM_PARAMETERS
    ],
)
def test_scanned_has_a_position_bias_in_every_layer(name):
    """And else the same number; one layer stands for a stack, which is faster to count."""
    module = build(name, "T5Config.scan_layers = True")
    cfg = module.config
    num_more = 32 * cfg.num_heads * (cfg.num_encoder_layers + cfg.num_decoder_layers - 2)
    assert count_parameters(module) == NUM_PARAMETERS[name] + num_more


def test_every_file_is_counted_and_sets_no_learning_rate():
    names = {path.stem for path in GIN_MODELS.glob("*t5_*.gin")}
    assert names == set(NUM_PARAMETERS)
    for path in GIN_MODELS.glob("*.gin"):
        assert "learning_rate" not in path.read_text()


def test_nominal_sizes_are_near():
    found = {
        name: re.findall(r"^NOMINAL_SIZE = ([\d_]+)$", path.read_text(), re.MULTILINE)
        for name in NUM_PARAMETERS
        for path in [GIN_MODELS / f"{name}.gin"]
    }
    assert sum(map(len, found.values())) == 20
    for name, sizes in found.items():
        for size in sizes:
            assert 0.9 < NUM_PARAMETERS[name] / int(size) < 1.1


def test_tiny_initialises():
    assert count_parameters(build("tiny")) < 100_000


def test_wrong_values_are_explained():
    with pytest.raises(ValueError, match=r"emb_dim is 0; expected a whole number"):
        build("tiny", "T5Config.emb_dim = 0")
    gin.clear_config()
    with pytest.raises(ValueError, match=r"'gleu'.*Did you mean 'gelu'"):
        build("tiny", "T5Config.mlp_activations = ('gleu', 'linear')")
    gin.clear_config()
    with pytest.raises(ValueError, match=r"dtype is 'float16'.*float32, bfloat16"):
        build("tiny", "T5Config.dtype = 'float16'")
    gin.clear_config()
    with pytest.raises(ValueError, match=r"remat_policy is 'fulll'.*Did you mean 'full'"):
        build("tiny", "T5Config.remat_policy = 'fulll'")
    gin.clear_config()
    with pytest.raises(ValueError, match=r"dropout_rate is 1.0"):
        build("tiny", "T5Config.dropout_rate = 1.0")
