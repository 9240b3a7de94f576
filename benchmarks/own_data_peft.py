"""The other side of `own_data.py`: a plain training loop with transformers and PEFT.

python benchmarks/own_data_peft.py --make FOLDER DATA
python benchmarks/own_data_peft.py FOLDER DATA ADAPTER STEPS BATCH_SIZE RANK
"""

import io
import itertools
import json
import pathlib
import sys

import torch
import transformers


def make(folder: str, data: str) -> None:
    """Saves a T5-small with random weights, and a tokenizer made of the rows' texts."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    rows = map(json.loads, pathlib.Path(data).read_text().splitlines())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for row in rows for text in row.values()),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    pieces = proto.ModelProto.FromString(model.getvalue()).pieces
    vocab = [(piece.piece, piece.score) for piece in pieces]
    vocab += [(f"<extra_id_{index}>", 0.0) for index in range(99, -1, -1)]
    transformers.T5TokenizerFast(vocab=vocab).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(decoder_start_token_id=0)  # its defaults are T5-small
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def train(folder: str, data: str, adapter: str, *numbers: str) -> None:
    """Trains LoRA on the rows and saves it."""
    import peft

    steps, batch_size, rank = map(int, numbers)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    sites = ["q", "k", "v", "o", "wi", "wo"]
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=rank, lora_alpha=16, target_modules=sites),
    )
    model.train()
    rows = [json.loads(line) for line in pathlib.Path(data).read_text().splitlines()]
    inputs = tokenizer([row["inputs"] for row in rows], truncation=True, max_length=512)
    targets = tokenizer(text_target=[row["targets"] for row in rows], truncation=True)
    examples = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels}
        for ids, mask, labels in zip(
            inputs["input_ids"], inputs["attention_mask"], targets["input_ids"], strict=True
        )
    ]
    batches = torch.utils.data.DataLoader(
        examples,
        batch_size,
        shuffle=True,
        collate_fn=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    for step, batch in enumerate(itertools.islice(endless, steps), 1):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.3f} tokens {tuple(batch['input_ids'].shape)}")
    model.save_pretrained(adapter)


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make(*sys.argv[2:])
    else:
        train(*sys.argv[1:])
