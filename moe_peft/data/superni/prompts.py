"""How a SuperNI instance becomes the text a model reads, by named settings.

Tk-Instruct (Wang et al. 2022, `src/ni_collator.py`) writes the definition, demonstrations and the
question; MHR's released code writes the definition and the question in slightly other bytes. The
two must not be mixed between training and evaluation.
"""

from collections.abc import Callable
import dataclasses
import string

from moe_peft import errors
from moe_peft.data.superni import files

MHR_ENDING = "\nOutput:"


@dataclasses.dataclass(frozen=True)
class TkInstruct:
    """What a Tk-Instruct prompt shows, in this order."""

    with_name: bool = False  # of the task
    with_definition: bool = True
    num_positive: int = 0  # examples of right answers, at most
    num_negative: int = 0  # examples of wrong answers, at most
    with_explanation: bool = False  # why an example's answer is right or wrong


MHR = "mhr"
POLY_S = "poly_s"
TK_INSTRUCT = {
    "definition": TkInstruct(),
    "definition_pos2": TkInstruct(num_positive=2),
    "definition_pos2_neg2": TkInstruct(num_positive=2, num_negative=2),
    "definition_pos2_explanation": TkInstruct(num_positive=2, with_explanation=True),
    "pos2": TkInstruct(with_definition=False, num_positive=2),
    POLY_S: TkInstruct(with_name=True),
}
NAMES = (MHR, *TK_INSTRUCT)


def check_name(name: str) -> None:
    """Refuses a name that is not a setting."""
    errors.check_one_of("The SuperNI prompt", name, NAMES)


def write_prompt(
    name: str,
    task: files.TaskFile,
    instance: files.Instance,
    num_tokens: Callable[[str], int],
    max_inputs: int,
) -> tuple[str, str]:
    """(inputs, ending): the prompt, and its tail that must survive when it is cut ("" if none).

    Demonstrations are shown as long as all fits in `max_inputs` tokens, end mark included;
    `num_tokens` counts those of a text.
    """
    check_name(name)
    question = "Now complete the following example -\n" + _stop(f"Input: {instance.input.strip()}")
    if name == MHR:
        definition = _stop(f"Task definition: {task.definition.strip()}")
        return f"{definition}\n{question}{MHR_ENDING}", MHR_ENDING
    setting = TK_INSTRUCT[name]
    start = f"{task.name}. " if setting.with_name else ""
    definition = _stop(f"Definition: {task.definition.strip()}") + "\n\n"
    definition = definition if setting.with_definition else ""
    question += "\nOutput: "
    shown: list[str] = []
    for kind, examples in (
        ("Positive", task.positive[: setting.num_positive]),
        ("Negative", task.negative[: setting.num_negative]),
    ):
        for number, example in enumerate(examples, start=1):
            text = _demonstration(kind, number, example, setting.with_explanation)
            if num_tokens(definition + " ".join(shown) + text + question) > max_inputs - 1:
                break
            shown.append(text)
    return start + definition + "".join(shown) + question, ""


def _demonstration(
    kind: str, number: int, example: files.Demonstration, with_explanation: bool
) -> str:
    text = f" {kind} Example {number} -\nInput: {example.input.strip()}"
    text = _stop(text) + f"\n Output: {example.output.strip()}"
    text = _stop(text) + "\n"
    if with_explanation:
        text = _stop(f"{text} Explanation: {example.explanation.strip()}") + "\n"
    return text + "\n"


def _stop(text: str) -> str:
    """The text with a full stop, unless it ends in ASCII punctuation."""
    return text if text[-1] in string.punctuation else text + "."
