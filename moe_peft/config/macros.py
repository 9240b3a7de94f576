"""The macros that the packaged gin files agree on, with their meanings.

A file may set one that a command does not read, so that models, methods and data can be combined
freely; any other name that nothing reads is a mistake.
"""

MACROS = {
    "MODEL": "the network without adapters, `@models.Transformer()`",
    "NOMINAL_SIZE": "the size in the model's name, which papers divide by",
    "METHOD": "what is adapted and what trains, such as `@methods.mov()`",
    "VARIANT": "how it is transferred: `keep`, `new_logits`, `z`, `mu` or `soup`",
    "NUM_TASKS": "task ids of the mixture that task routers tell apart",
    "BACKBONE": "the network's own weights: `embedded:cldr_tiny`, `hf:/folder/of/transformers`, "
    "`t5x:/checkpoint`, `file:weights.safetensors`, `run:/a/run/of/full`, `random:0`",
    "DATA": "the user's own file, files, folder, or {split: file}, to train on",
    "EVAL_DATA": "the user's own files to evaluate on; None: a part of DATA is kept apart",
    "EVAL_FRACTION": "which part of DATA is kept apart",
    "INPUTS_COLUMN": "of DATA: the question",
    "TARGETS_COLUMN": "of DATA: the answer, or a list of accepted ones",
    "TASK_COLUMN": "of DATA: which task a row is of, if it is there",
    "CHOICES_COLUMN": "of DATA: answers to choose from, if it is there",
    "INPUTS_TEMPLATE": "text with {column} names that makes the question",
    "TASKS": "names of the tasks in TASK_COLUMN, in the order of their ids",
    "MIXTURE": "name of the SeqIO mixture or task to train on",
    "EVAL_MIXTURES": "names of those to evaluate on, a tuple",
    "TARGET_MIXTURE": "name of the mixture of new tasks, where one file trains and adapts",
    "TARGET_METHOD": "the method on new tasks, where one file trains and adapts",
    "TARGET_OPTIMIZER": "the optimizer of a run on a new task",
    "TARGET_STEPS": "updates of a run on a new task",
    "TARGET_BATCH_SIZE": "shots of a batch on a new task",
    "DATA_DIR": "folder of the benchmarks' files, or `embedded:samples`; None: $MOE_PEFT_DATA",
    "BAD_ROWS": "`stop` at the first bad row of a benchmark, or `skip` and count it",
    "VOCABULARY": "path of T5's SentencePiece model or of a folder with a tokenizer, or `bytes`",
    "INPUT_TOKENS": "longest input that prompts are made for, end mark included",
    "TASK_GROUP": "regular expression: what in a task's name it is reported under",
    "FEATURE_LENGTHS": "tokens kept of `inputs` and `targets`, a dictionary",
    "MODEL_DIR": "folder of the run",
    "SOURCE": "folder of the multi-task run that `adapt` starts from; None for fresh adapters",
    "SOURCE_MIXTURE": "what that run was trained on, where tasks are compared with new ones",
    "SHOTS": "training examples of each new task, a number or numbers by task name",
    "VALIDATION_SHOTS": "examples besides the shots that select and stop, a number or numbers by "
    "task name",
    "SEEDS": "of the shots and runs of `adapt`, a tuple",
    "WORDINGS": "consecutive rows of a task that are one example in other words",
    "INPUTS": "text file that `infer` reads, one question a line",
    "OUTPUTS": "file that `infer`, `export` or `merge` writes",
    "TASK": "id of the task that `merge` folds the adapters of",
    "TRAIN_STEPS": "updates in all",
    "BATCH_SIZE": "rows of a batch, over all devices",
    "EVAL_BATCH_SIZE": "rows of a batch in evaluation, over all devices",
    "OPTIMIZER": "such as `@optimizers.adafactor()`",
    "LEARNING_RATE": "the peak of an experiment's schedule",
    "SEED": "of fresh adapters, dropout and the order of the data",
    "DTYPE": "of activations, `float32` or `bfloat16`",
    "FROZEN_DTYPE": "of the frozen weights in memory, `float32` or `bfloat16`",
    "DROPOUT_RATE": "of the network while training, in [0, 1)",
    "LOG_TO": "boards that show metrics, of `tensorboard`, `wandb` and `mlflow`, a tuple",
}

# Flags of the command line that set a macro: `--steps 100` is `--gin.TRAIN_STEPS=100`.
FLAGS = {
    "BACKBONE": "backbone",
    "MODEL": "model",
    "METHOD": "method",
    "MIXTURE": "data",  # what is left out is said of what the command reads
    "DATA": "data",
    "EVAL_MIXTURES": "data",
    "EVAL_DATA": "eval_data",
    "VOCABULARY": "vocabulary",
    "INPUTS_COLUMN": "inputs_column",
    "TARGETS_COLUMN": "targets_column",
    "TASK_COLUMN": "task_column",
    "CHOICES_COLUMN": "choices_column",
    "INPUTS_TEMPLATE": "inputs_template",
    "EVAL_FRACTION": "eval_fraction",
    "BAD_ROWS": "bad_rows",
    "MODEL_DIR": "out",
    "TRAIN_STEPS": "steps",
    "BATCH_SIZE": "batch_size",
    "EVAL_BATCH_SIZE": "batch_size",
    "LEARNING_RATE": "learning_rate",
    "OPTIMIZER": "learning_rate",
    "SEED": "seed",
    "LOG_TO": "log_to",
    "DTYPE": "dtype",
    "FROZEN_DTYPE": "frozen_dtype",
    "SOURCE": "source",
    "SHOTS": "shots",
    "INPUTS": "inputs",
    "OUTPUTS": "outputs",
    "TASK": "task",
}

# Macros that another one tells on the command line; where both are missing, only that is asked for.
TOLD_BY = {
    **dict.fromkeys(("MODEL", "VOCABULARY"), "BACKBONE"),
    **dict.fromkeys(("FEATURE_LENGTHS", "TRAIN_STEPS", "BATCH_SIZE", "TASK_GROUP"), "MIXTURE"),
    **dict.fromkeys(("OPTIMIZER", "LEARNING_RATE"), "METHOD"),
}
