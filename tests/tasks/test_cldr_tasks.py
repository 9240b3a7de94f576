import time

import seqio

from moe_peft.tasks import cldr


def test_every_task_is_registered():
    names = [name for name in seqio.TaskRegistry.names() if name.startswith("cldr_")]
    assert len(names) == 396
    assert {name for name in seqio.MixtureRegistry.names() if name.startswith("cldr_")} == {
        "cldr_train",
        "cldr_heldout",
        "cldr_fewshot",
        "cldr_new",
    }


def test_task_ids_number_training_tasks_first():
    ids = cldr.task_ids()
    assert list(ids.values()) == list(range(395))
    assert [ids[task] for task in cldr.suite.tasks("train")] == list(range(249))


def test_declared_sizes_are_the_rows():
    for task in list(cldr.task_ids())[::29]:
        source = seqio.TaskRegistry.get(task.name).source
        for split in source.splits:
            assert len(source.rows(split)) == source.num_input_examples(split)


def test_sentinels_are_the_vocabularys_last_ids():
    ids = cldr.encode("a" + cldr.corpus.SENTINELS[0] + cldr.corpus.SENTINELS[3])
    assert ids.tolist() == [100, 271, 268]


def test_registering_generates_nothing_and_is_fast(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path))
    cldr.task_ids.cache_clear()
    for registry in (seqio.MixtureRegistry, seqio.TaskRegistry):
        for name in [name for name in registry.names() if name.startswith("cldr_")]:
            registry.remove(name)
    start = time.process_time()
    cldr.register()
    assert time.process_time() - start < 2.0
    assert "cldr_train" in seqio.MixtureRegistry.names()
    assert not list(tmp_path.iterdir())
