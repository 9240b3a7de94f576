"""The long steps of quickstart.sh in one process, so that libraries are imported once.

    python launch/quickstart.py RESULTS STEPS
"""

import shlex
import sys

from moe_peft.cli import main

# Of each task; all of them take three times as long and move the numbers by a per cent or two.
EVALUATED = "--gin.Evaluator.max_examples_per_task=60"


def moe_peft(*arguments: str) -> None:
    """Runs one command as the shell would, after printing it."""
    print("$ moe-peft", shlex.join(arguments), flush=True)
    code = main.main(arguments)
    if code:
        sys.exit(code)


def quickstart(results: str, steps: str) -> None:
    """Evaluates the frozen backbone, trains and evaluates (IA)3 and MoV, and compares them."""
    print("== the frozen backbone, before anything is trained")
    settings = ["--gin_file", "experiments/cldr/frozen.gin", f"--gin.MODEL_DIR={results}/frozen"]
    moe_peft("eval", *settings, EVALUATED)
    for method in ("ia3", "mov"):
        print(f"== {method}: {steps} steps on the training tasks, then tasks it has never seen")
        settings = ["--gin_file", f"experiments/cldr/{method}.gin"]
        settings += [f"--gin.MODEL_DIR={results}/{method}", f"--gin.TRAIN_STEPS={steps}"]
        moe_peft("train", *settings)
        moe_peft("eval", *settings, EVALUATED)
    print("== results on tasks that no run was trained on")
    folders = [f"{results}/{name}" for name in ("frozen", "ia3", "mov")]
    moe_peft("compare", *folders, "--out", results)


if __name__ == "__main__":
    quickstart(*sys.argv[1:])
