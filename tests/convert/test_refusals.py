"""Every reason why an adapter or a file of torch is refused, each with its one line."""

import ast
import importlib.util
import inspect
import json
import pathlib
import re
import traceback

import numpy as np
import pytest

from moe_peft import errors
from moe_peft.convert import foreign, targets, tfew
from moe_peft.convert.peft import adapters, config, places, tensors
from moe_peft.weights import safetensors_files, torch_files, torch_pickles

TESTS = pathlib.Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


by_hand = load(TESTS / "convert" / "peft_by_hand.py")
w = load(TESTS / "weights" / "torch_writing.py")
QV = by_hand.of("q", "v")
Q = "base_model.model.encoder.block.0.layer.0.SelfAttention.q"
MERGE = (
    "merge it with PEFT (merge_and_unload, then save_pretrained) and take that folder as a "
    "backbone, hf:FOLDER"
)
SIZES = "no size with a name: 2 + 1 layers, width 16, 2 heads of 8, feed-forward 24"
T5 = f"hf:somewhere ({SIZES} (gelu, linear), 32 ids, own output layer)"
TIED = f"hf:somewhere ({SIZES} (relu), 32 ids, tied output layer)"
FILE, CONFIG = "AT/a/adapter_model.safetensors", "AT/a/adapter_config.json"


def base(toy, layout="t5_1_1"):
    return adapters.Base("hf:somewhere", toy.network(layout).config, "of the toy")


def options(layout="t5_1_1", **more):
    """Reads a LoRA of q and v with other settings; None leaves one out."""

    def act(toy, at):
        settings = {k: v for k, v in {**by_hand.OLD, **more}.items() if v != "nothing"}
        adapters.read(by_hand.write(at / "a", settings, by_hand.tensors(QV)), base(toy, layout))

    return act


def arrays(change, layout="t5_1_1", **more):
    """The same with other tensors."""

    def act(toy, at):
        found = change(by_hand.tensors(QV))
        settings = more if "peft_type" in more else {**by_hand.OLD, **more}
        folder = by_hand.write(at / "a", settings, found)
        adapters.read(folder, base(toy, layout))

    return act


def without(*keys):
    return lambda found: {k: v for k, v in found.items() if k not in keys}


def plus(key, *shape):
    return lambda found: {**found, key: np.ones(shape, np.float32)}


def renamed(old, new):
    return lambda found: {key.replace(old, new): value for key, value in found.items()}


def of_torch(data):
    """Reads a file of torch with all of its tensors."""

    def act(toy, at):
        (at / "a.bin").write_bytes(data)
        for leaf in torch_files.open_file(at / "a.bin").values():
            leaf.read()

    return act


def value(instructions):
    return of_torch(w.zipped(w.state_dict(a=instructions)))


def few(found, **more):
    """Reads a file of T-Few, for the toy."""

    def act(toy, at):
        (at / "f.pt").write_bytes(w.of_arrays(found))
        tfew.read(at / "f.pt", base(toy, **more))

    return act


def of_ours(change=lambda folder: None, **sizes):
    """Reads a folder that we wrote, with our record."""

    def act(toy, at):
        folder = adapters.write(toy.trained(toy.METHODS["qv"]()), at / "a", "toy")
        change(folder)
        network = toy.network("t5_1_1", **sizes).config
        adapters.read(folder, adapters.Base("hf:other", network, "x") if sizes else None)

    return act


def other_alpha(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 7}))


def fewer(folder):
    path = folder / "adapter_model.safetensors"
    found, record = safetensors_files.open_file(path), safetensors_files.read_metadata(path)
    keep = {key: leaf for key, leaf in found.items() if ".block.1." not in key}
    header = {"format": "pt", **safetensors_files.encode_metadata(record)}
    keep = {key: tensors.leaves.from_array(leaf.read(), "") for key, leaf in keep.items()}
    safetensors_files.write_file(path, keep, header)


def command(*, base=None, kind="peft", **more):
    """What `convert --from` and `load` read."""

    def act(toy, at):
        by_hand.write(at / "a", {**by_hand.OLD, **more}, by_hand.tensors(QV))
        (at / "f.pt").write_bytes(w.of_arrays({"x": np.ones(2, np.float32)}))
        place = targets.source(f"{kind}:{at / ('a' if kind == 'peft' else 'f.pt')}")
        foreign.read(place, base and base.replace("AT", str(at)))

    return act


def refused(key, shown, reason=None):
    if reason is None:
        how = "expected None or nothing. If it does not change what a trained adapter computes"
        return f"{CONFIG}: {key} is {shown}, which is not known here; {how}, remove that line."
    return f"{CONFIG}: {key} is {shown} ({reason}), which no adapter here can express; {MERGE}."


def unsupported(kind):
    what = f"expected one of LORA, IA3, POLY. If PEFT can merge that kind, {MERGE}"
    return f"{CONFIG}: peft_type is {kind!r}; {what}."


def init(name):
    how = (
        "convert the adapter to a plain LoRA with PEFT first (save_pretrained with "
        "path_initial_model_for_weight_conversion), or merge it with PEFT"
    )
    how = "merge it with PEFT, on the base that LoftQ made" if name == "loftq" else how
    what = f"init_lora_weights is {name!r}, which changes the frozen weights"
    return f"{CONFIG}: {what}; {how}."


def to_save(shown):
    what = f"only ['lm_head'] of a LoRA can be expressed; {MERGE}"
    return f"{CONFIG}: modules_to_save is {shown}, and {what}."


def no_place(key, suffixes="lora_A.weight or lora_B.weight"):
    what = f"is not {suffixes} of a linear map in a block of a T5. Where it was trained, {MERGE}"
    return f"{FILE}: {key} {what}."


def torch(reason):
    return f"AT/a.bin cannot be read as torch's (its pickle is read and never run): {reason}."


UNSUPPORTED = ("ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "XLORA", "PREFIX_TUNING")
UNSUPPORTED += ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "LN_TUNING", "TINYLORA")
INITS = ("pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga")
IA3 = {"peft_type": "IA3", "feedforward_modules": [], "target_modules": [Q[17:]]}
IA3_Q = {f"{Q}.ia3_l": np.ones((16, 1), np.float32)}
HEAD = {"modules_to_save": ["lm_head"]}
WEIGHTS = "does not say which weights it was trained on; name them with --base hf:FOLDER (in "
WEIGHTS += "Python: backbone=)."
VECTOR = "decoder.block.0.layer.1.EncDecAttention.k.multi_lora_b"
SERIAL = w.serial(w.state_dict(a=w.tensor(w.storage(last=b"N"))))
INNER = b"}" + w.text("a") + w.tensor() + b"s"
GOOD = w.zipped(w.state_dict(a=w.tensor()))
LINES = [
    # The config.
    *((unsupported(kind), options(peft_type=kind)) for kind in UNSUPPORTED),
    (
        f"{CONFIG}: task_type is 'CAUSAL_LM'; expected an encoder-decoder's, 'SEQ_2_SEQ_LM'.",
        options(task_type="CAUSAL_LM"),
    ),
    (
        f"{CONFIG}: auto_mapping says the base model is a LlamaForCausalLM; expected a T5 or mT5.",
        options(auto_mapping={"base_model_class": "LlamaForCausalLM"}),
    ),
    (f"{CONFIG} has no 'r'.", options(r="nothing")),
    (f"{CONFIG}: a rank is '8'; expected a whole number from 1.", options(r="8")),
    (f"{CONFIG}: a rank is 0; expected a whole number from 1.", options(rank_pattern={"q": 0})),
    (f"{CONFIG}: an alpha is '8'; expected a number.", options(alpha_pattern={"q": "8"})),
    (
        f"{CONFIG}: '(q' is not a regular expression: missing ), unterminated subpattern at "
        "position 0.",
        options(target_modules="(q"),
    ),
    *((init(name), options(init_lora_weights=name)) for name in INITS),
    (to_save("['shared']"), options(modules_to_save=["shared"])),
    (to_save("['lm_head', 'shared']"), options(modules_to_save=["lm_head", "shared"])),
    (
        refused("use_dora", True, "DoRA rescales columns by a learned magnitude"),
        options(use_dora=True),
    ),
    (refused("lora_bias", True, "trained biases"), options(lora_bias=True)),
    (
        refused("trainable_token_indices", [1], "trained rows of the embedding"),
        options(trainable_token_indices=[1]),
    ),
    (
        refused("layer_replication", [[0, 1]], "layers that are there several times"),
        options(layer_replication=[[0, 1]]),
    ),
    (
        refused("target_parameters", ["q"], "adapters of parameters that are no modules"),
        options(target_parameters=["q"]),
    ),
    (
        refused("enable_lora", [True], "one layer for queries, keys and values"),
        options(enable_lora=[True]),
    ),
    (
        refused("alora_invocation_tokens", [1], "an adapter of some tokens only"),
        options(alora_invocation_tokens=[1]),
    ),
    (refused("some_new_option", 3), options(some_new_option=3)),
    # Config and tensors together.
    (
        f"{CONFIG} and adapter_model.safetensors: target_modules does not select "
        "decoder.block.0.layer.0.SelfAttention.v, of which there are tensors; PEFT would not load "
        "them.",
        options(target_modules=["q"]),
    ),
    (
        f"{CONFIG} and adapter_model.safetensors: target_modules selects "
        "decoder.block.0.layer.0.SelfAttention.k, of which there are no tensors.",
        options(target_modules=["q", "k", "v"]),
    ),
    (f"{FILE} has no base_model.model.lm_head.weight.", options(**HEAD)),
    (
        f"{FILE}: base_model.model.lm_head.weight is the embedding in "
        f"{TIED}, so it does not train alone; {MERGE}.",
        arrays(plus("base_model.model.lm_head.weight", 32, 16), "t5_1_0", **HEAD),
    ),
    (
        f"{FILE}: base_model.model.lm_head.weight has the shape (33, 16); expected (32, 16).",
        arrays(plus("base_model.model.lm_head.weight", 33, 16), **HEAD),
    ),
    (
        f"{FILE}: {Q}.lora_A.weight has the shape (2, 16); expected (3, 16).",
        options(rank_pattern={"encoder.block.0.layer.0.SelfAttention.q": 3}),
    ),
    # Tensors.
    ("AT/a has no adapter_model.safetensors.", lambda toy, at: gone(toy, at)),
    (
        no_place("base_model.model.lm_head.lora_A.weight"),
        arrays(plus("base_model.model.lm_head.lora_A.weight", 2, 16)),
    ),
    (
        no_place("base_model.model.shared.lora_embedding_A"),
        arrays(plus("base_model.model.shared.lora_embedding_A", 2, 32)),
    ),
    (no_place(f"{Q}.lora_B.bias"), arrays(plus(f"{Q}.lora_B.bias", 16))),
    (no_place(f"{Q}.base_layer.weight"), arrays(plus(f"{Q}.base_layer.weight", 16, 16))),
    (
        f"{FILE}: {Q}.lora_A.other.weight is there of several adapters, None and other.",
        arrays(
            lambda found: {
                k.replace(f"{Q}.lora_A", f"{Q}.lora_A.other"): v for k, v in found.items()
            }
        ),
    ),
    (
        f"{FILE}: encoder.block.0.layer.0.SelfAttention.q.lora_A.weight is there of several "
        "adapters, two times.",
        arrays(plus(f"{Q}.lora_A.weight".removeprefix("base_model.model."), 2, 16)),
    ),
    (f"{FILE} has no {Q}.lora_B.weight.", arrays(without(f"{Q}.lora_B.weight"))),
    (f"{FILE} holds no tensors.", arrays(lambda found: {})),
    (
        f"{FILE}: base_model.model.encoder.block.7.layer.0.SelfAttention.q.lora_A.weight is not a "
        f"layer of {T5}.",
        arrays(renamed("block.1", "block.7")),
    ),
    (
        f"{FILE}: {Q}.ia3_l adapts a layer that IA3 leaves alone here; expected only k, v, wi_1.",
        arrays(lambda found: IA3_Q, **IA3),
    ),
    # Folders with our record.
    (
        "AT/a: lora_alpha is 7.0 in adapter_config.json and 3.0 in adapter_model.safetensors; they "
        "do not belong together.",
        of_ours(other_alpha),
    ),
    (
        "AT/a belongs to another network than hf:other: num_heads differ.",
        of_ours(num_heads=4),
    ),
    (
        f"{FILE} has no base_model.model.encoder.block.1.layer.0.SelfAttention.q.lora_A.weight.",
        of_ours(fewer),
    ),
    # The backbone.
    (
        f"AT/a {WEIGHTS}",
        command(base_model_name_or_path=None),
    ),
    (f"AT/a {WEIGHTS}", command(revision="v2")),
    (
        "AT/a is for the model './gone', which is not found; name it with --base hf:FOLDER (in "
        "Python: backbone=). There is no AT/gone.",
        command(base_model_name_or_path="./gone"),
    ),
    (
        "--base AT/a is in the format 'peft', which is not a whole model.",
        command(base="AT/a"),
    ),
    # Files of T-Few.
    (f"AT/f.pt {WEIGHTS}", command(kind="tfew")),
    (
        f"AT/f.pt: {VECTOR.replace('_b', '_a')} is not MODULE.multi_lora_b, a vector of T-Few's "
        "(IA)3; nothing else of T-Few is read.",
        few({VECTOR.replace("_b", "_a"): np.ones((1, 16), np.float32)}),
    ),
    (
        f"AT/f.pt: {VECTOR} has the shape (15, 1); expected (16, 1).",
        few({VECTOR: np.ones((15, 1), np.float32)}),
    ),
    ("AT/f.pt holds no tensors.", few({})),
    # Files of torch.
    (torch("it is no zip and has not torch's magic number"), of_torch(b"weights")),
    (
        torch(
            "it has 2 dictionaries of tensors, a, b; save the one by itself (expected tensors by "
            "name, as in a state dict)"
        ),
        value(INNER + w.text("b") + INNER),
    ),
    (torch("a is a dict; expected tensors by name, as in a state dict"), value(b"}")),
    (
        torch("a key is no text; expected tensors by name, as in a state dict"),
        of_torch(w.zipped(b"\x80\x02}(K\x01" + w.tensor() + b"u.")),
    ),
    (
        torch("it has 2 members FOLDER/data.pkl, expected one"),
        of_torch(w.zipped(b"", more=[("b/data.pkl", b"")])),
    ),
    (
        torch("its byte order is not little"),
        of_torch(w.zipped(b"", more=[("a/byteorder", b"big")])),
    ),
    (
        torch("the storage 0 of 28 bytes has 24 bytes"),
        value(w.tensor(w.storage(size=7))),
    ),
    (
        torch("its member '../x' is there twice, or leads out of the zip"),
        of_torch(w.zipped(b"", more=[("../x", b"")])),
    ),
    (
        torch("its version is not 1001, or its byte order not little"),
        of_torch(w.serial(w.state_dict(), keys=(), version=1002, storages=b"")),
    ),
    (
        torch("its storages are not those that the tensors need"),
        of_torch(w.serial(w.state_dict(), storages=b"")),
    ),
    (
        torch(f"the storage 0 has another size, or is cut short at {len(SERIAL) - 1}"),
        of_torch(SERIAL[:-1]),
    ),
    (
        torch("values have another checksum than when they were written; copy it again"),
        of_torch(GOOD.replace(bytes(range(24)), bytes(24))),
    ),
    (torch("a is there twice"), value(b"N" + w.text("a") + b"N")),
    (
        torch("its pickle has BUILD for more than a state dict's _metadata"),
        value(b"}}" + w.text("a") + b"Nsb"),
    ),
    (torch("its pickle takes value 7 before it is there"), value(b"h\x07")),
    (torch("its pickle has the opcode INST, which no tensor needs"), value(b"(ios\nsystem\n")),
    (torch("its pickle stops in the middle"), of_torch(w.zipped(b"\x80\x02}}."))),
    (
        torch("its pickle asks for 'os.system', which no tensor needs; nothing was run"),
        value(b"cos\nsystem\n("),
    ),
    (
        torch("the storage 0 has two types or sizes"),
        value(w.tensor() + w.text("b") + w.tensor(w.storage(size=7))),
    ),
    (
        torch("its pickle has a persistent id that is not that of a whole storage"),
        value(b"NQ"),
    ),
    (
        torch("its pickle calls torch FloatStorage for no tensor"),
        value(b"ctorch\nFloatStorage\n)R"),
    ),
    (
        torch("a tensor has no known dtype, or hooks or settings of its own"),
        value(w.tensor().replace(b"_v2", b"_v3")),
    ),
    (
        torch("a tensor has not one stride for each axis, or is larger than any file"),
        value(w.tensor(strides=(1,))),
    ),
    (
        torch("a tensor has 6 values, the last one number 7, but its storage 0 has 6"),
        value(w.tensor(offset=1)),
    ),
    (
        torch("a key or a name is no printable text of at most 500 characters"),
        of_torch(w.zipped(b"\x80\x02}(N" + w.tensor() + b"u.")),
    ),
    (
        torch("a size, an offset or a stride is negative, too large or not a number"),
        value(w.tensor(offset=-1)),
    ),
]


def gone(toy, at):
    folder = by_hand.write(at / "a", by_hand.OLD, by_hand.tensors(QV))
    (folder / "adapter_model.safetensors").unlink()
    adapters.read(folder, base(toy))


_raised = set()  # (module, line) of every reason that was met


@pytest.mark.parametrize(("line", "act"), LINES, ids=[line[-60:] for line, _ in LINES])
def test_one_line(toy, tmp_path, monkeypatch, line, act):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.UserError) as caught:
        act(toy, tmp_path)
    assert str(caught.value).replace(str(tmp_path), "AT") == line
    error = caught.value
    while error is not None:
        for frame in traceback.extract_tb(error.__traceback__):
            _raised.add((pathlib.Path(frame.filename).stem, frame.lineno))
        error = error.__cause__


# Ours alone: what was written differs; and files that are larger, or change while they are read.
ELSEWHERE = ["the layers differ", "its directory has more", "it is cut short"]


def test_every_reason_is_in_the_table(request):
    if len(_raised) < len(LINES) / 2:
        pytest.skip("only some of the lines were asked for")
    for module in (config, places, tensors, adapters, tfew, foreign, torch_files, torch_pickles):
        source = inspect.getsource(module)
        name = pathlib.Path(module.__file__).stem
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Raise):
                continue
            text = ast.get_source_segment(source, node)
            is_met = any((name, n) in _raised for n in range(node.lineno, node.end_lineno + 1))
            is_elsewhere = any(words in re.sub(r"\s+", " ", text) for words in ELSEWHERE)
            assert is_met or is_elsewhere, f"{name}, line {node.lineno}: {text}"
