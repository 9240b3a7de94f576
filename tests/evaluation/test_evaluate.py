"""Whole evaluations of a random model on tasks made from its own answers, so that every score is
known beforehand."""

import dataclasses
import functools
import json

import jax
import numpy as np
import optax
import pytest
import seqio
from sklearn import metrics as sklearn_metrics

from moe_peft import errors, methods
from moe_peft.data import registration
from moe_peft.data import rows as rows_lib
from moe_peft.evaluation import aggregation, evaluate, evaluator, infer, inference
from moe_peft.models import decoding as decoding_lib
from moe_peft.models import encoder_decoder, losses, scoring, t5
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import digest, json_files
from moe_peft.runtime import progress as progress_lib
from moe_peft.training import checkpoints
from moe_peft.training import step as step_lib
from moe_peft.weights import safetensors_files

LENGTHS = {"inputs": 40, "targets": 8}
FIRST, LETTERS = 3, "abcdefghijklmnop"  # ids 0, 1, 2: padding, end, unknown
VOCAB = FIRST + len(LETTERS)


class Letters(seqio.Vocabulary):
    """One id per letter: any answer without special ids can be spelled and read back."""

    _base_vocab_size = VOCAB
    bos_id, eos_id, unk_id = None, 1, 2

    def __init__(self):
        super().__init__()

    def _encode(self, s):
        return [FIRST + LETTERS.index(letter) for letter in s]

    def _decode(self, ids):
        return "".join(LETTERS[i - FIRST] for i in ids if i >= FIRST)

    def _encode_tf(self, s):
        raise NotImplementedError

    def _decode_tf(self, ids):
        raise NotImplementedError

    def __eq__(self, other):
        return isinstance(other, Letters)

    __hash__ = seqio.Vocabulary.__hash__


MODULE = t5.Transformer(
    t5.T5Config(
        vocab_size=VOCAB,
        emb_dim=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=16,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dropout_rate=0.0,
    )
)
SHAPES = {
    "encoder_input_tokens": (1, LENGTHS["inputs"]),
    "decoder_input_tokens": (1, LENGTHS["targets"]),
    "decoder_target_tokens": (1, LENGTHS["targets"]),
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Spec of random weights that make answers differ from input to input."""
    model = encoder_decoder.EncoderDecoder(MODULE, losses.LossConfig())
    abstract = jax.eval_shape(functools.partial(model.init, batch_shapes=SHAPES), jax.random.key(0))
    rng = np.random.default_rng(3)  # one with which answers end

    def draw(path, leaf):
        offset = path[-1].key == "scale"  # of norms
        return offset + 0.5 * rng.normal(size=leaf.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, abstract)
    path = tmp_path_factory.mktemp("backbone") / "weights.safetensors"
    return f"file:{safetensors_files.save_tree(params, path)}"


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make_mesh(devices=jax.devices())


@pytest.fixture(scope="module")
def model_and_params(backbone):
    """On one device."""
    model = encoder_decoder.EncoderDecoder(MODULE, losses.LossConfig())
    params = safetensors_files.read_tree(backbone.removeprefix("file:"))
    return model, jax.device_put(
        params, mesh_lib.replicated(mesh_lib.make_mesh(devices=jax.devices()[:1]))
    )


@pytest.fixture(scope="module")
def asked(model_and_params):
    """(inputs, greedy answers) as texts; every answer ends and has letters only."""
    model, params = model_and_params
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(LETTERS), 1 + i % 38)) for i in range(600)]
    tokens = np.zeros((len(texts), LENGTHS["inputs"]), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text) + 1] = [*Letters().encode(text), 1]
    ids = np.asarray(
        jax.jit(model.predict, static_argnums=2)(
            params, {"encoder_input_tokens": tokens}, decoding_lib.Greedy(LENGTHS["targets"])
        )
    )
    found = {}
    for text, answer in zip(texts, ids, strict=True):
        length = int(np.argmax(answer == 1))
        if length > 0 and np.all(answer[:length] >= FIRST):
            found[text] = Letters().decode(answer[:length].tolist())
    assert len(found) >= 24, len(found)
    assert len(set(found.values())) >= 4
    return list(found.items())[:24]


def spoil(text):
    """Another answer of the same length."""
    return ("b" if text[0] == "a" else "a") + text[1:]


class Source(registration.RowsSource):
    """With what its benchmark says."""

    reporting = rows_lib.Reporting()


def add_task(name, inputs, targets, choices=(), references=(), metric=None):
    seqio.TaskRegistry.remove(name)
    encode = lambda texts: rows_lib.Ragged.from_sequences(
        [Letters().encode(text) for text in texts]
    )
    scalars = {
        "task_ids": np.zeros(len(inputs), np.int32),
        "template_ids": np.arange(len(inputs), dtype=np.int32) % 2,
    }
    found = rows_lib.Rows(encode(inputs), encode(targets), scalars, choices, references)
    source = Source(lambda split: found, {"validation": len(inputs)})
    source.reporting = rows_lib.Reporting(metric, "letters")
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[],
        output_features={k: seqio.Feature(Letters()) for k in ("inputs", "targets")},
    )


@pytest.fixture(scope="module")
def suite(asked):
    """A mixture of two tasks. Right: all of x's even rows, and every other odd one; none of y."""
    inputs, answers = zip(*asked, strict=True)
    half = len(inputs) // 2
    spoilt = [spoil(a) if i % 4 == 3 else a for i, a in enumerate(answers[:half])]
    add_task("toy_x_1", inputs[:half], spoilt)
    add_task("toy_y_1", inputs[half:], list(map(spoil, answers[half:])))
    seqio.MixtureRegistry.remove("toy")
    seqio.MixtureRegistry.add("toy", ["toy_x_1", "toy_y_1"], default_rate=1.0)
    return "toy"


def make_evaluator(mixture, **kwargs):
    return evaluator.Evaluator((mixture,), LENGTHS, "toy_([a-z]+)_.*", batch_size=8, **kwargs)


def test_one_forward_pass_and_greedy_decoding_find_the_known_scores(suite, model_and_params):
    want = [float(i % 4 != 3) for i in range(12)] + [0.0] * 12
    passing = make_evaluator(suite)
    by_pass = passing.predict(*model_and_params, suite)
    decoded = make_evaluator(suite, decoding=decoding_lib.Greedy())
    by_decoding = decoded.predict(*model_and_params, suite)
    assert [row["score"] for row in by_pass] == want
    assert [row["score"] for row in by_decoding] == want
    assert [row["prediction"] == row["targets"] for row in by_decoding] == [w == 1 for w in want]
    assert [row["index"] for row in by_pass] == list(range(24))
    assert {len(q.inputs) <= 20 for q in decoded.questions_of(suite).questions} == {True, False}
    # While training: 12 rows of x, templates 0 and 1 alternating; y has nothing right.
    means = passing(model_and_params[0], 7, model_and_params[1])
    assert means == {"toy/mean": (1.0 + 0.5) / 2 / 2, "toy/median": (1.0 + 0.5) / 2 / 2}


def test_choices_are_ranked_as_if_scored_one_by_one(asked, model_and_params, mesh):
    """On eight devices; one does not see whether rows get lost between them."""
    model, params = model_and_params
    params = jax.device_put(params, mesh_lib.replicated(mesh))
    rng = np.random.default_rng(1)
    inputs = [text for text, _ in asked[:9]]
    draw = lambda: "".join(rng.choice(list(LETTERS), rng.integers(1, 7)))
    choices = [tuple(draw() for _ in range(2 + i % 3)) for i in range(9)]
    pairs = [(i, choice) for i, options in enumerate(choices) for choice in options]
    rows = scoring.pack_choices([[[*Letters().encode(c), 1]] for _, c in pairs], length=8)
    del rows["decoder_segment_ids"]
    rows["encoder_input_tokens"] = np.zeros((len(pairs), LENGTHS["inputs"]), np.int32)
    for row, (i, _) in zip(rows["encoder_input_tokens"], pairs, strict=True):
        row[: len(inputs[i]) + 1] = [*Letters().encode(inputs[i]), 1]
    alone = np.asarray(jax.jit(model.score)(params, rows))
    scores = [
        [float(s) for s, (j, _) in zip(alone, pairs, strict=True) if j == i] for i in range(9)
    ]
    best = [choices[i][int(np.argmax(s))] for i, s in enumerate(scores)]
    per_token = [
        choices[i][int(np.argmax([x / (len(c) + 1) for x, c in zip(s, choices[i], strict=True)]))]
        for i, s in enumerate(scores)
    ]
    assert best != per_token

    add_task("toy_z_1", inputs, best, choices)
    by_sum = make_evaluator("toy_z_1", rank_choices=True).predict(model, params, "toy_z_1")
    for row, want in zip(by_sum, scores, strict=True):
        np.testing.assert_allclose(row["log_likelihoods"], want, rtol=1e-5)
        assert row["num_tokens"] == [len(choice) + 1 for choice in row["choices"]]
    assert [row["prediction"] for row in by_sum] == best
    assert [row["score"] for row in by_sum] == [1.0] * 9
    by_mean = make_evaluator("toy_z_1", rank_choices=True, length_normalized_choices=True)
    found = by_mean.predict(model, params, "toy_z_1")
    assert [row["prediction"] for row in found] == per_token


def save_run(folder, method, backbone):
    """What a training run of `method` leaves, vectors of 3 instead of ones."""
    model = encoder_decoder.EncoderDecoder(method.patch(MODULE), losses.LossConfig(), method)
    shapes = jax.eval_shape(functools.partial(model.init, batch_shapes=SHAPES), jax.random.key(0))
    trainable = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 3, np.float32), method.split(shapes)[1]
    )
    state = step_lib.create_state(jax.tree.map(jax.numpy.asarray, trainable), optax.sgd(0.1), 0)
    state = state.replace(step=jax.numpy.asarray(5, jax.numpy.int32))
    fingerprint = digest.of_tree(safetensors_files.read_tree(backbone.removeprefix("file:")))
    description = {
        "method": json.loads(json.dumps(method.describe())),
        "backbone": {"fingerprint": fingerprint},
        "backbone_spec": backbone,
    }
    with checkpoints.Checkpoints(folder, keep=1) as saver:
        saver.save(state, {"step": 5, "description": description})


def test_a_run_is_restored_checked_and_written_down(suite, backbone, tmp_path, capsys):

    def run(method, backbone, folder, **more):
        found = make_evaluator(suite)
        return evaluate.evaluate(
            model=MODULE,
            method=method,
            backbone=backbone,
            model_dir=folder,
            evaluator=found,
            **more,
        )

    frozen = run(methods.frozen(), backbone, str(tmp_path / "frozen"))["toy"]
    assert frozen["results"]["overall"]["mean"] == 0.375
    assert frozen["run"]["trainable_parameters"] == 0
    assert "37.5/37.5" in capsys.readouterr().out
    folder = tmp_path / "frozen" / "eval" / "toy"
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(frozen))
    kept = sorted((folder / "predictions").iterdir())
    assert [path.name for path in kept] == ["toy_x_1.jsonl", "toy_y_1.jsonl"]
    assert sum(len(list(json_files.read_jsonl(path))) for path in kept) == 24

    with pytest.raises(errors.UserError, match="no training checkpoint"):
        run(methods.ia3(), backbone, str(tmp_path / "ia3"))
    save_run(tmp_path / "ia3", methods.ia3(), backbone)
    adapted = run(methods.ia3(), backbone, str(tmp_path / "ia3"))["toy"]
    assert adapted["run"]["step"] == 5
    # Per layer: 8 keys and values in three attentions, 16 hidden units in two feed-forward blocks.
    assert adapted["run"]["trainable_parameters"] == 3 * 2 * 8 + 2 * 16
    assert adapted["results"]["overall"]["mean"] != 0.375
    with pytest.raises(errors.UserError, match="another method: .*ia3.*mov"):
        run(methods.mov(num_experts=2), backbone, str(tmp_path / "ia3"))
    with pytest.raises(errors.UserError, match="another backbone"):
        run(methods.ia3(), "random:1", str(tmp_path / "ia3"))
    with pytest.raises(errors.UserError, match="no checkpoint of step 4"):
        run(methods.ia3(), backbone, str(tmp_path / "ia3"), step=4)


@pytest.fixture
def in_two_parts(suite, monkeypatch):
    """Evaluates the bare backbone, a task at a time; {tasks asked: how often}."""
    monkeypatch.setattr(evaluate, "_BATCHES_OF_A_PART", 1)
    asked = []

    def run(backbone, folder, kill_after=99, **kwargs):
        asked.clear()
        one = make_evaluator(suite, **kwargs)
        predict = one.predict

        def watched(model, params, mixture, progress, places):
            if len(asked) == kill_after:
                raise KeyboardInterrupt
            asked.append(one.questions_of(mixture).rows[places[0]]["task"])
            return predict(model, params, mixture, progress, places)

        one.predict = watched
        evaluate.evaluate(
            model=MODULE,
            method=methods.frozen(),
            backbone=backbone,
            model_dir=str(folder),
            evaluator=one,
        )
        return list(asked)

    return run


def test_an_evaluation_goes_on_where_it_stopped(in_two_parts, backbone, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_two_parts(backbone, whole) == ["toy_x_1", "toy_y_1"]
    with pytest.raises(KeyboardInterrupt):
        in_two_parts(backbone, killed, kill_after=1)
    assert not (killed / "eval" / "toy" / "results.json").exists()
    assert in_two_parts(backbone, killed) == ["toy_y_1"]
    assert "12 of 24 examples were answered before" in capsys.readouterr().err
    read = lambda folder, name: (folder / "eval" / "toy" / name).read_bytes()
    for name in ("predictions/toy_x_1.jsonl", "predictions/toy_y_1.jsonl", "table.md"):
        assert read(whole, name) == read(killed, name)
    was = json.loads(read(killed, "results.json"))
    assert was["results"] == json.loads(read(whole, "results.json"))["results"]
    # All is answered. Averages may change without asking, and so may groups.
    (killed / "eval" / "toy" / "results.json").unlink()
    assert in_two_parts(backbone, killed, average="groups") == []
    record = json.loads(read(killed, "evaluation.json"))
    assert record["settings"]["average"] == "groups"
    assert record["seconds"] == was["seconds"]
    # Another model is asked, whatever is there.
    assert in_two_parts("random:1", killed) == ["toy_x_1", "toy_y_1"]


def test_every_accepted_answer_counts_and_tasks_have_their_own_metrics(asked, model_and_params):
    inputs, answers = zip(*asked[:4], strict=True)
    wrong = list(map(spoil, answers))
    references = [(wrong[0], answers[0]), (wrong[1],), (answers[2], wrong[2]), ("p", answers[3])]
    add_task("toy_r_1", inputs, wrong, references=references, metric="exact_match_squad")
    add_task("toy_s_1", inputs, answers, references=references, metric="macro_f1")
    seqio.MixtureRegistry.remove("toys")
    seqio.MixtureRegistry.add("toys", ["toy_r_1", "toy_s_1"], default_rate=1.0)
    own = make_evaluator("toys", metric="task", decoding=decoding_lib.Greedy())
    rows = own.predict(*model_and_params, "toys")
    assert [row["metric"] for row in rows] == ["exact_match_squad"] * 4 + ["macro_f1"] * 4
    assert [row["references"] for row in rows] == 2 * [list(texts) for texts in references]
    assert [row["score"] for row in rows] == [1, 0, 1, 1, None, None, None, None]
    found = aggregation.aggregate(rows, own.average, own.bootstrap)
    assert found.tasks["toy_r_1"].mean == 0.75
    first = [texts[0] for texts in references]  # F1 looks at the first; templates alternate
    want = [
        sklearn_metrics.f1_score(first[i::2], answers[i::2], average="macro", zero_division=0)
        for i in range(2)
    ]
    assert list(found.tasks["toy_s_1"].templates.values()) == pytest.approx(want)
    (row,) = own.predict(*model_and_params, "toys", places=[5])
    assert row == rows[5]

    add_task("toy_q_1", inputs, answers)
    with pytest.raises(errors.UserError, match="'toy_q_1' has no metric of its own"):
        make_evaluator("toy_q_1", metric="task", decoding=decoding_lib.Greedy()).questions_of(
            "toy_q_1"
        )
    reported = evaluator.Evaluator("toy_r_1", LENGTHS, None).questions_of("toy_r_1")
    assert reported.rows[0]["group"] == "letters"


def test_infer_answers_lines_and_choices(suite, asked, backbone, tmp_path):
    run = functools.partial(
        infer.infer,
        model=MODULE,
        method=methods.frozen(),
        backbone=backbone,
        model_dir="",
        mixture=suite,
        feature_lengths=LENGTHS,
        outputs=str(tmp_path / "out.jsonl"),
        decoding=decoding_lib.Greedy(),
        batch_size=8,
    )
    text = tmp_path / "in.txt"
    text.write_text("\n\n".join(question for question, _ in asked[:3]) + "\n")
    run(inputs=str(text))
    found = list(json_files.read_jsonl(tmp_path / "out.jsonl"))
    assert [(row["inputs"], row["prediction"]) for row in found] == asked[:3]

    lines = tmp_path / "in.jsonl"
    (one, answer), (two, _) = asked[0], asked[1]
    rows = [{"inputs": two, "choices": ["a", answer], "id": 7}, {"inputs": one}]
    json_files.write_jsonl(lines, rows)
    ranked, free = run(inputs=str(lines))
    assert ranked["prediction"] in rows[0]["choices"]
    assert ranked["id"] == 7
    assert len(ranked["log_likelihoods"]) == 2
    assert free["prediction"] == answer

    lines.write_text('{"question": "a"}\n')
    with pytest.raises(errors.UserError, match="in.jsonl, line 1: 'inputs' is missing"):
        run(inputs=str(lines))
    text.write_text("\n")
    with pytest.raises(errors.UserError, match="holds no questions"):
        run(inputs=str(text))


def test_mistakes_are_named_before_anything_is_computed(suite, asked, backbone, mesh, tmp_path):
    with pytest.raises(errors.UserError, match="'rouge_l' needs answers in text"):
        make_evaluator(suite, metric="rouge_l")
    with pytest.raises(errors.UserError, match="has no parenthesis"):
        evaluator.Evaluator((suite,), LENGTHS, "toy_.*")
    with pytest.raises(errors.UserError, match="'toy_x_1' does not match task_group"):
        evaluator.Evaluator((suite,), LENGTHS, "t0_(.*)").questions_of(suite)
    with pytest.raises(errors.UserError, match="No task or mixture is called 'toj'. Did you mean"):
        make_evaluator("toj").questions_of("toj")
    with pytest.raises(errors.UserError, match="divided evenly over 8 devices"):
        inference.AnsweringModel(encoder_decoder.EncoderDecoder(MODULE), 6, LENGTHS, mesh)
    add_task("toy_w_1", [asked[0][0]], ["abc"], [("a", "b")])
    with pytest.raises(errors.UserError, match="its target 'abc' is none of its choices"):
        make_evaluator("toy_w_1", rank_choices=True).questions_of("toy_w_1")
    small = t5.Transformer(dataclasses.replace(MODULE.config, vocab_size=8))
    with pytest.raises(errors.UserError, match="another vocabulary"):
        evaluate.evaluate(
            model=small,
            method=methods.frozen(),
            backbone=backbone,
            model_dir=str(tmp_path),
            evaluator=make_evaluator(suite),
        )


def test_a_target_that_was_cut_is_never_right(asked, model_and_params):
    """What is left of a long target may all be right, end mark included; the target is not."""
    text, answer = asked[0]
    lengths = {**LENGTHS, "targets": len(answer) + 1}
    add_task("toy_v_1", [text], [answer + "aaaa"])
    cut = evaluator.Evaluator(("toy_v_1",), lengths, "toy_([a-z]+)_.*", batch_size=8)
    assert cut.questions_of("toy_v_1").is_cut == [True]
    (row,) = cut.predict(*model_and_params, "toy_v_1")
    assert row["score"] == 0


def test_few_input_lengths():
    lengths = [inference.padded_length(n, 56) for n in (1, 16, 28, 29, 56)]
    assert lengths == [28, 28, 28, 56, 56]
    assert inference.padded_length(3, 1024) == 16
    assert inference.padded_length(3, 10) == 10
    with pytest.raises(ValueError, match="longer than the limit"):
        inference.padded_length(11, 10)


def test_progress_lines_name_what_is_done(capsys):
    with progress_lib.shown("toy", 3) as progress:
        progress.advance(3)
    assert "toy: 3/3 in" in capsys.readouterr().err
