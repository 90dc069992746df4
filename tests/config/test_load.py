"""Reading a run file: what is accepted, and every message a wrong one gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftray.config.load import dump_run, load_run, load_runs, run_from
from ftray.config.schema import Run
from ftray.errors import ConfigError

MINIMAL = "name: a\ndata: {sources: rows.jsonl}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_run(written(folder, text), overrides)
    return dict(caught.value.problems)


def test_two_keys_make_a_run_and_the_rest_has_defaults(tmp_path):
    run = load_run(written(tmp_path, MINIMAL))
    assert (run.name, run.data.sources[0].path, run.method.kind, run.objective.kind) == (
        "a",
        "rows.jsonl",
        "lora",
        "sft",
    )


def test_a_number_without_a_dot_before_its_exponent_is_a_number(tmp_path):
    run = load_run(written(tmp_path, MINIMAL + "optim: {lr: 1e-4, weight_decay: 1E-2}\n"))
    assert (run.optim.lr, run.optim.weight_decay) == (1e-4, 1e-2)


def test_on_and_off_are_words_and_true_is_true(tmp_path):
    run = load_run(written(tmp_path, "name: a\ndata: {sources: r.jsonl, packing: on, strict: true}\n"))
    assert (run.data.packing, run.data.strict) == ("on", True)


def test_a_section_whose_keys_are_all_commented_out_is_its_defaults(tmp_path):
    run = load_run(written(tmp_path, MINIMAL + "optim:\n  # lr: 1\nmethod:\n"))
    assert run == load_run(written(tmp_path, MINIMAL))


def test_a_dumped_run_reads_back_equal(tmp_path):
    text = """
name: a
data: {sources: [{path: x, columns: {prompt: "on", answer: "1e5"}, weight: 0.5}], system: "yes", template: "12:30"}
method: {kind: lora, targets: [q_proj], bits: 8}
model: {base: "007", revision: "1234567"}
optim: {lr: 1e-5, betas: [0.9, 0.95], steps: 3}
scale: {gpus_per_worker: 0.5, cpus_per_worker: auto}
"""
    run = load_run(written(tmp_path, text))
    assert load_run(written(tmp_path, dump_run(run))) == run
    assert run_from(run.model_dump()) == run


def test_a_misspelt_key_gets_the_nearest_one_and_its_line(tmp_path):
    found = problems(tmp_path, MINIMAL + "method:\n  kind: lora\n  rnak: 8\n")
    assert found == {"method.rnak": "unknown key; did you mean 'rank'? (line 5)"}


@pytest.mark.parametrize(
    ("extra", "key", "message"),
    [
        ("lr: 1", "lr", "'lr' belongs under optim"),
        ("optim: {workers: 2}", "optim.workers", "'workers' belongs under scale"),
        ("optim: {rank: 2}", "optim.rank", "'rank' belongs under method"),
        ("scale: {seed: 2}", "scale.seed", "'seed' stands at the top"),
        ("optmi: {lr: 1}", "optmi", "did you mean 'optim'?"),
        ("method: {kind: full, rank: 8}", "method.rank", "unknown key for kind: full; it belongs to kind: lora"),
        ("optim: {learning_rate: 1}", "optim.learning_rate", "here it is optim.lr"),
        ("lora_r: 8", "lora_r", "here it is method.rank"),
        ("scale: {zzz: 8}", "scale.zzz", "known here: workers,"),
        ("method: {kind: lroa}", "method.kind", "there is no 'lroa'; did you mean 'lora'?"),
        ("method: {kind: qlora}", "method.kind", "write kind: lora with bits: 4"),
        ("method: {rank: 8}", "method.kind", "missing; one of full, freeze, lora"),
        ("method: lora", "method", "write {kind: lora}"),
        ("method: qlora", "method", "write kind: lora with bits: 4"),
        ("optim: 3", "optim", "expected a section: keys with values, indented under it, got 3"),
        ("optim: {5: abc}", "optim.5", "a key is a word, got 5"),
        ("optim: {steps: abc}", "optim.steps", "expected a whole number, got 'abc'"),
        ("optim: {steps: 1.5}", "optim.steps", "expected a whole number, got 1.5"),
        ("optim: {lr: fast}", "optim.lr", "expected a number or 'auto', got 'fast'"),
        ("optim: {lr: autp}", "optim.lr", "did you mean 'auto'?"),
        ("optim: {lr: }", "optim.lr", "got nothing; leave the key out for its default (auto)"),
        ("optim: {lr: .inf}", "optim.lr", "must be a finite number"),
        ("optim: {lr: 0}", "optim.lr", "must be greater than 0, or 'auto'"),
        ("optim: {epochs: 0}", "optim.epochs", "must be greater than 0, got 0"),
        ("optim: {betas: [0.9]}", "optim.betas.1", "missing"),
        ("optim: {schedule: cosin}", "optim.schedule", "did you mean 'cosine'?"),
        ("scale: {zero: 4}", "scale.zero", "expected 0, 1, 2, 3 or 'auto', got 4"),
        ("scale: {gpus_per_worker: -1}", "scale.gpus_per_worker", "must be at least 0, got -1"),
        ("model: {revision: 1234}", "model.revision", "expected text, got 1234; put it in quotes"),
        ("track: {to: [tensorbord]}", "track.to.0", "did you mean 'tensorboard'?"),
        ("track: {to: wandb}", "track.to", "expected a list"),
        ("evaluate: {gate: [loss is low]}", "evaluate.gate", "cannot read 'loss is low'"),
        (
            "scale: {workers: [4, 2]}",
            "scale.workers",
            "[4, 2]: the smaller number stands first",
        ),
        ("scale: {workers: [0, 2]}", "scale.workers.0", "must be at least 1, got 0"),
        ("scale: {workers: [1, 2, 3]}", "scale.workers", "a whole number or a list of 2, each a whole number"),
        ("scale: {workers: [2, 64]}", "optim.batch_size", "16 examples are fewer than 64 workers; try 64"),
        (
            "optim: {batch_size: 33}\nscale: {workers: 2}",
            "optim.batch_size",
            "33 does not divide over 2 workers; try 32",
        ),
        ("scale: {offload: nvme, zero: 3}", "scale.nvme_path", "needs the folder"),
        ("evaluate: {every: -5}", "evaluate.every", "must be at least 0, got -5"),
    ],
)
def test_each_wrong_line_gets_its_key_and_the_way_out(tmp_path, extra, key, message):
    found = problems(tmp_path, f"{MINIMAL}{extra}\n")
    assert list(found) == [key]
    assert message in found[key]


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"data": {"packing": "on"}, "model": {"attention": "sdpa"}}, "sdpa attention knows no packed rows"),
        ({"optim": {"optimizer": "adamw_8bit"}, "scale": {"zero": 2}}, "scale.zero: optimizer adamw_8bit"),
        ({"scale": {"offload": "cpu", "zero": 1}}, "scale.zero: offload needs ZeRO 2 or 3"),
        ({"method": {"kind": "lora", "bits": 4}, "scale": {"zero": 3}}, "scale.zero: a quantised base"),
        ({"method": {"kind": "lora", "bits": 4, "init": "pissa"}}, "method.init: pissa changes the base"),
        ({"method": {"kind": "freeze", "last_layers": 0}}, "method.last_layers: nothing is left to train"),
        ({"objective": {"kind": "pretrain"}, "data": {"few_shot": 1}}, "data.few_shot: plain text has no prompts"),
    ],
)
def test_sections_that_do_not_go_together_are_told(sections, problem):
    raw = {"name": "a", **sections, "data": {"sources": "x", **sections.get("data", {})}}
    with pytest.raises(ConfigError) as caught:
        run_from(raw)
    assert problem in str(caught.value)


def test_all_problems_are_told_at_once_in_the_order_of_the_file(tmp_path):
    found = problems(tmp_path, "name: A b\nmodel: {bas: x}\ndata: {max_length: -1}\noptim: {lr: x}\n")
    assert list(found) == ["name", "model.bas", "data.sources", "data.max_length", "optim.lr"]


def test_a_missing_key_says_what_it_is(tmp_path):
    assert problems(tmp_path, "data: {sources: a}\n") == {
        "name": "missing; what it becomes in the registry: a-z, 0-9 and -"
    }


def test_an_empty_list_of_sources_is_told(tmp_path):
    assert "name at least one" in problems(tmp_path, "name: a\ndata: {sources: []}\n")["data.sources"]


def test_a_key_said_twice_is_told_with_both_lines(tmp_path):
    found = problems(tmp_path, MINIMAL + "optim:\n  lr: 1\n  lr: 2\n")
    assert found == {"optim.lr": "said twice, on lines 4 and 5; keep one"}


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("name: a\n  data: b\n", ":2", "one indent"),
        ("name: a\ndata:\n\tsources: x\n", ":3", "spaces, not tabs"),
        ("name: a\ndata: [x\n", ":3", "brackets"),
        ("name: [a]: b\n", ":1", "quotes"),
        ("name: a\n---\nname: b\n", ":2", "one run per file"),
        ("name: \x00\n", ":1", "U+0000"),
        ("", "", "the file is empty"),
        ("- a\n", "", "expected keys such as name"),
    ],
)
def test_text_that_is_not_a_run_file_is_told_with_its_line(tmp_path, text, where, message):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value).startswith(f"{path}{where}: 1 problem")
    assert message in str(caught.value)


def test_anchors_may_be_used_but_not_inside_themselves(tmp_path):
    run = load_run(written(tmp_path, "name: a\ndata: {sources: [&s {path: a}, {<<: *s, weight: 2}]}\n"))
    assert [source.weight for source in run.data.sources] == [1, 2]
    found = problems(tmp_path, "name: a\ndata: &d\n  sources: *d\n")
    assert found == {"data.sources": "holds itself through its anchor; write it out"}


def test_a_missing_file_names_its_near_one(tmp_path):
    written(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*run\.yaml\?"):
        load_run(tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match=r"this is a folder; name a file in it: run\.yaml"):
        load_run(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_run(tmp_path / "latin.yaml")


def test_overrides_are_yaml_values_at_dotted_keys(tmp_path):
    path = written(tmp_path, "name: a\ndata: {sources: [a.jsonl, b.jsonl]}\n")
    overrides = ["optim.lr=2e-4", "data.sources.1.weight=2", "method={kind: freeze, last_layers: 1}", "optim.steps="]
    overrides += ["data.packing=off", "data.system=Be brief: really", "evaluate.gate=[loss < base, exact_match >= 0.5]"]
    run = load_run(path, overrides)
    assert (run.optim.lr, run.optim.steps, run.data.packing) == (2e-4, None, "off")
    assert [source.weight for source in run.data.sources] == [1, 2]
    assert (run.method.kind, run.data.system) == ("freeze", "Be brief: really")
    assert run.evaluate.gate == ["loss < base", "exact_match >= 0.5"]


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("optim.lrr=1", "optim.lrr", "did you mean 'lr'? (on the command line)"),
        ("lr=1", "lr", "'lr' belongs under optim"),
        ("optim.lr", "", "cannot read the override 'optim.lr'; write key=value"),
        ("=1", "", "write key=value"),
        ("name.x=1", "name", "holds 'a', so there is no 'x' in it"),
        ("data.sources.3.weight=1", "data.sources.3", "data.sources has the entries [0]"),
        ("data.sources.x.weight=1", "data.sources.x", "data.sources has the entries [0]"),
        ("method.targets=[a", "method.targets", "quote the override in the shell"),
    ],
)
def test_a_wrong_override_is_told_like_a_wrong_line(tmp_path, override, key, message):
    found = problems(tmp_path, MINIMAL, override)
    assert message in found[key]


def test_data_beside_the_run_file_is_found_and_data_here_comes_first(tmp_path, monkeypatch):
    home, here = tmp_path / "runs", tmp_path / "here"
    home.mkdir(), here.mkdir()
    for name in ("rows.jsonl", "both.jsonl", "a1.csv"):
        (home / name).touch()
    (here / "both.jsonl").touch()
    monkeypatch.chdir(here)
    text = (
        "name: a\ndata: {sources: [rows.jsonl, both.jsonl, 'a*.csv', org/set, 's3://b/c'], eval_sources: rows.jsonl}\n"
    )
    run = load_run(written(home, text))
    assert [source.path for source in run.data.sources] == [
        str(home / "rows.jsonl"),
        "both.jsonl",
        str(home / "a*.csv"),
        "org/set",
        "s3://b/c",
    ]
    assert run.data.eval_sources[0].path == str(home / "rows.jsonl")


def test_a_run_is_the_same_from_plain_data_and_leaves_it_alone():
    raw = {"name": "a", "data": {"sources": "x"}}
    assert run_from(raw, ["optim.lr=1"]).optim.lr == 1
    assert raw == {"name": "a", "data": {"sources": "x"}}


def test_a_config_error_crosses_processes():
    import pickle

    error = pickle.loads(pickle.dumps(ConfigError("run.yaml", [("a", "b")])))
    assert error.problems == (("a", "b"),)


def test_every_key_has_a_description():
    def walk(section):
        for name, field in section.model_fields.items():
            if name == "kind":
                continue
            inner = sections_of(field.annotation)
            assert inner or field.description, f"{section.__name__}.{name}"
            for each in inner:
                walk(each)

    from ftray.config.explain import sections_of

    walk(Run)


@pytest.mark.parametrize(
    ("method", "override", "key", "said"),
    [
        ("prompt", "scale.zero=3", "scale.zero", "prompt trains under ZeRO 0 to 2, not 3; use zero: 2"),
        ("loha", "scale.offload=nvme", "scale.offload", "nvme needs ZeRO 3, under which loha does not train"),
        ("adalora", "scale.offload=cpu", "scale.offload", "adalora looks at every step's gradients"),
        ("adalora", "method.start_rank=8", "method.start_rank", "8 leaves no rank to give up; use more than 8"),
        ("prefix", "scale.gradient_checkpointing=true", "scale.gradient_checkpointing", "prefix is a cache"),
        ("p_tuning", "data.packing=on", "data.packing", "p_tuning puts its tokens before each example"),
        ("ia3", "method.rank=4", "method.rank", "unknown key for kind: ia3"),
        ("prefix", "method.num_virtual_tokens=4", "method.num_virtual_tokens", "here it is method.tokens"),
        ("promt", "seed=1", "method.kind", "there is no 'promt'; did you mean 'prompt'?"),
        ("houlsby", "seed=1", "method.kind", "write kind: bottleneck with placement: houlsby"),
    ],
)
def test_a_method_says_what_it_does_not_go_with(tmp_path, method, override, key, said):
    found = problems(tmp_path, MINIMAL, f"method={{kind: {method}}}", override)
    assert said in found[key]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("evaluate: {numeric: true, generate_rows: 0}", "set evaluate.generate_rows"),
        ("objective: {kind: pretrain}\nevaluate: {numeric: true}", "pretrain has none"),
        ("objective: {kind: classification}\nevaluate: {numeric: true}", "classification has none"),
        ("objective: {kind: rloo, rewards: [{kind: exact_match}]}\nevaluate: {numeric: true}", "objective.rewards say"),
    ],
)
def test_numbers_need_answers_that_nothing_else_judges(tmp_path, section, said):
    assert said in problems(tmp_path, f"{MINIMAL}{section}\n")["evaluate.numeric"]


def test_numbers_are_looked_for_unless_a_run_says_otherwise(tmp_path):
    assert load_run(written(tmp_path, MINIMAL)).evaluate.numeric == "auto"
    assert load_run(written(tmp_path, MINIMAL + "evaluate: {numeric: false}\n")).evaluate.numeric is False
    rewards = "objective: {kind: rloo, rewards: [{kind: length, tokens: 9}]}\nevaluate: {numeric: true}\n"
    assert not load_run(written(tmp_path, MINIMAL + rewards)).rewards_decide


def test_benchmarks_are_for_models_that_write_and_their_folder_may_lie_beside_the_run_file(tmp_path):
    asked = "evaluate: {lm_eval: {tasks: [own], folder: tasks}}\n"
    found = problems(tmp_path, MINIMAL + "objective: {kind: classification}\n" + asked)
    assert "models that write" in found["evaluate.lm_eval.tasks"]
    (tmp_path / "tasks").mkdir()
    assert load_run(written(tmp_path, MINIMAL + asked)).evaluate.lm_eval.folder == str(tmp_path / "tasks")


def test_what_is_said_of_benchmarks_needs_some(tmp_path):
    found = problems(tmp_path, MINIMAL + "evaluate: {lm_eval: {limit: 100, chat: true}}\n")
    assert "no benchmark for limit, chat" in found["evaluate.lm_eval.tasks"]
    run = load_run(written(tmp_path, MINIMAL))
    assert Run.model_validate(run.model_dump(mode="json")) == run


def test_baselines_need_answers_to_compare(tmp_path):
    found = problems(tmp_path, MINIMAL + "evaluate: {baselines: [0, 4], generate_rows: 0}\n")
    assert "set evaluate.generate_rows" in found["evaluate.baselines"]
    found = problems(tmp_path, MINIMAL + "objective: {kind: pretrain}\nevaluate: {baselines: [4]}\n")
    assert "no questions to ask" in found["evaluate.baselines"]
    assert load_run(written(tmp_path, MINIMAL + "evaluate: {baselines: [4, 0, 4]}\n")).evaluate.baselines == [0, 4]


@pytest.mark.parametrize(
    ("text", "command"), [("space: {optim.lr: [1]}", "ftray sweep"), ("http: {port: 1}", "--check` checks")]
)
def test_a_file_that_is_no_runs_is_named_with_its_command(tmp_path, text, command):
    with pytest.raises(ConfigError, match=command):
        load_runs(written(tmp_path, text))


TASKS = """
name: desks
data:
  sources: [{path: a.jsonl, task: billing}, {path: b.jsonl, task: travel}]
  eval_sources: [{path: c.jsonl, task: travel}, {path: d.jsonl, task: billing}]
method: {kind: multitask_prompt}
"""


@pytest.mark.parametrize(
    ("old", "new", "key", "said"),
    [
        (", task: billing", "", "data.sources.0.task", "name the task of these rows"),
        ("billing", "travel", "data.sources", "all rows are of 'travel'; use kind: prompt"),
        (
            "c.jsonl, task: travel",
            "c.jsonl, task: trave",
            "data.eval_sources.0.task",
            "no source trains a task 'trave'",
        ),
        ("c.jsonl, task: travel", "c.jsonl", "data.eval_sources.0.task", "there are billing, travel"),
        ("method:", "objective: {kind: dpo}\nmethod:", "method.kind", "use objective kind: sft, pretrain or distill"),
        (
            ", {path: d.jsonl, task: billing}",
            "",
            "data.eval_sources",
            "nothing would judge the version of task 'billing'",
        ),
        ("task: billing", "task: Billing Desk", "data.sources.0.task", "is not a name"),
        ("name: desks", f"name: {'d' * 60}", "name", "longer than 64 characters"),
    ],
)
def test_a_prompt_of_several_tasks_asks_for_their_names(tmp_path, old, new, key, said):
    assert load_run(written(tmp_path, TASKS)).tasks == ("billing", "travel")
    assert said in problems(tmp_path, TASKS.replace(old, new, 1))[key]


def test_a_prompt_begins_one_way(tmp_path):
    found = problems(tmp_path, MINIMAL + "method: {kind: prompt, text: Say it., begin: desks@v1}\n")
    assert "leave one of the two out" in found["method.begin"]
    assert (
        "names no version" in problems(tmp_path, MINIMAL + "method: {kind: prompt, begin: Desks v1}\n")["method.begin"]
    )
