"""The run that `kill_test.py` kills: a tiny T5 with MoV on made-up tokens, with dropout."""

import sys

import numpy as np

from moe_peft import methods
from moe_peft.models import encoder_decoder, t5
from moe_peft.training import loop as loop_lib
from moe_peft.training import optimizers, schedules, train
from moe_peft.training import start as start_lib

BATCH_SIZE = 4
CONFIG = t5.T5Config(
    vocab_size=32, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16,
    num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip


def batches(start):
    """Batch number s is made from seed s."""
    while True:
        tokens = np.random.default_rng(start).integers(1, 32, (BATCH_SIZE, 12)).astype(np.int32)
        yield {
            "encoder_input_tokens": tokens[:, :6],
            "decoder_input_tokens": np.pad(tokens[:, 6:11], ((0, 0), (1, 0))),
            "decoder_target_tokens": tokens[:, 6:],
        }
        start += 1


def main():
    """Trains in the folder and for the steps given as arguments."""
    method = methods.mov(num_experts=2, jitter=0.1)
    module, loss = t5.Transformer(CONFIG), encoder_decoder.LossConfig()
    model = encoder_decoder.EncoderDecoder(method.patch(module), loss, method)
    base_model = encoder_decoder.EncoderDecoder(module, loss)
    num_steps = int(sys.argv[2])
    train.fit(
        start=lambda shapes: start_lib.Start(model, base_model, method, shapes),
        backbone="random:0",
        open_batches=batches,
        optimizer=optimizers.adafactor(
            schedules.linear_warmup_linear_decay(0.1, num_steps), groups={"routers": 0.5}
        ),
        model_dir=sys.argv[1],
        described={"model": {}, "data": {}},
        settings=loop_lib.Settings(
            num_steps=num_steps, batch_size=BATCH_SIZE, checkpoint_period=40, log_period=15
        ),
    )


if __name__ == "__main__":
    main()
